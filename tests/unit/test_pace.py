"""Which rank is slow, from figures made by hand."""

from types import SimpleNamespace

import pytest
import torch

from mede2.trainer.pace import Look, Pace, product_ms, slowness
from mede2.trainer.world import World


def looks(*products_ms: float, waits: tuple[float, ...] = ()) -> list[Look]:
    waits = waits or (0.0,) * len(products_ms)
    return [Look(f"node{rank}", *figures) for rank, figures in enumerate(zip(products_ms, waits, strict=True))]


@pytest.fixture
def pace() -> Pace:
    return Pace(World(0, 0, 4, torch.device("cpu")), SimpleNamespace(waited_in_all_s=0.0), every=5)


def test_the_measure_is_the_median():
    assert slowness(looks(4, 4, 6, 4)) == [1, 1, 1.5, 1]
    assert slowness(looks(2, 5, 10, 4)) == [1, 1.25, 2.5, 1]  # of an even number, the lower one
    assert slowness(looks(6, 3)) == [2, 1]


def test_waiting_for_data_counts_as_it_holds_up_all_ranks():
    """Half the time lost by one rank alone: all would be twice as fast without it; what all lose is nobody's fault."""
    assert slowness(looks(4, 4, 4, waits=(0.5, 0, 0))) == [2, 1, 1]
    assert slowness(looks(4, 4, 4, waits=(0.5, 0.5, 0.5))) == [1, 1, 1]


def test_a_rank_is_named_once_when_it_is_slow_twice_in_a_row(pace, capsys):
    marks = [pace.judge(looks(4, 4, 4, ms), 5 * number) for number, ms in enumerate((8, 4, 8, 6, 9, 4, 4), start=1)]
    assert [mark["pace/slowest"] for mark in marks] == [2, 1, 2, 1.5, 2.25, 1, 1]
    assert [mark.get("alarms/slow_rank") for mark in marks] == [None, None, None, 1, 1, 0, None]
    assert capsys.readouterr().out == (
        "alarm at update 20, slow_rank: rank 3 on node3 is 1.5 times slower than the median: a matrix product takes "
        "6 ms (4 elsewhere), waiting for data 0 % of the time (0 %)\n"
    )


def test_another_rank_each_time_is_chance(pace, capsys):
    for number in range(4):
        pace.judge(looks(*(8 if rank == number else 4 for rank in range(4))), number)
    assert capsys.readouterr().out == ""


def test_one_rank_and_updates_between_two_looks_cost_nothing(monkeypatch, pace):
    monkeypatch.setattr(Pace, "look", lambda self: pytest.fail("looked"))
    alone = Pace(World(0, 0, 1, torch.device("cpu")), SimpleNamespace(waited_in_all_s=0.0), every=1)
    assert [alone(1), pace(4), pace(6)] == [{}, {}, {}]
    pace.every = 0
    assert pace(5) == {}


def test_a_look_draws_no_random_number():
    before = torch.get_rng_state()
    assert product_ms(torch.device("cpu")) > 0
    assert torch.equal(torch.get_rng_state(), before)
