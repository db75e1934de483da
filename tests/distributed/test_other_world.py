"""A run of two ranks that was cut short and goes on with one, then with four, against the one that was not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

TOLERANCE = 1e-5
CONTINUED = {"z3-1": (1, 4), "z3-4": (2, 4), "z1-1": (2, 3), "lora-4": (1, 3)}  # from and to which update


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("other worlds")


@pytest.fixture(scope="session")
def results(launch, models, records, runs) -> dict[str, list[dict]]:
    """What every rank of every run said, by the run's folder."""
    job = {"models": models, "records": records, "runs": str(runs)}
    asked = {
        2: {"z3 whole": "z3-2", "z1 whole": "z1-2", "lora whole": "lora-2", "z1 forgotten": "z1-2-otherwise"},
        1: {"z3 from two": "z3-1", "z1 from two": "z1-1", "z3 undivided": "z3-1-otherwise"},
        4: {"z3 from one": "z3-4", "lora from two": "lora-4"},
    }
    found = {}
    for world_size, names in asked.items():
        ranks = launch("other_world", world_size, scenarios=list(names), **job)
        found |= {folder: [rank[name] for rank in ranks] for name, folder in names.items()}
    return found


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def weights(folder: Path) -> dict:
    (file,) = folder.glob("*model.safetensors")  # of a model, or of an adapter
    return load_file(file)


def apart(one: Path, other: Path) -> float:
    """The largest difference of a final weight."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def whole(name: str) -> str:
    return f"{name.partition('-')[0]}-2"


@pytest.mark.parametrize("name", CONTINUED)
def test_losses_and_gradient_norms_are_those_of_the_undisturbed_run(results, runs, name):
    undisturbed, continued = rows(runs / whole(name)), rows(runs / name)
    assert [row["step"] for row in continued] == list(range(1, CONTINUED[name][1] + 1))
    for theirs, ours in zip(undisturbed, continued, strict=True):
        assert ours.keys() == theirs.keys()
        for metric in ours.keys() - {"step_ms", "data_wait_ms", "tokens_per_s", "peak_gib"}:
            assert ours[metric] == pytest.approx(theirs[metric], rel=TOLERANCE, abs=TOLERANCE), metric


@pytest.mark.parametrize("name", CONTINUED)
def test_so_are_the_final_weights(results, runs, name):
    assert apart(runs / name, runs / whole(name)) <= TOLERANCE


def test_that_comparison_would_tell_lost_moments(results, runs):
    assert apart(runs / "z1-2-otherwise", runs / "z1-2") > 10 * TOLERANCE


@pytest.mark.parametrize("name", CONTINUED)
def test_every_update_trains_on_the_same_rows(results, name):
    def of_steps(run: str) -> dict[int, list[int]]:
        ranks = [rank["rows"] for rank in results[run]]
        return {step: sorted(row for rank in ranks for row in rank[step]) for step in ranks[0]}

    continued, undisturbed = of_steps(name), of_steps(whole(name))
    assert list(continued) == list(range(*CONTINUED[name]))
    assert continued == {step: undisturbed[step] for step in continued}


@pytest.mark.parametrize("name", CONTINUED)
def test_all_counts_of_updates_go_on(results, name):
    """Adam's correct its moments; ZeRO-3's universal format has one for all groups of parameters."""
    for rank in results[name]:
        assert rank["counts"] == results[whole(name)][0]["counts"]
        assert (rank["global_steps"], rank["skipped_steps"]) == (CONTINUED[name][1], 0)


@pytest.mark.parametrize(("name", "line"), [
    ("z3-1", "checkpoint of 2 ranks, continued by 1 through the universal format"),
    ("z3-4", "checkpoint of 1 rank, continued by 4 through the universal format"),
])  # fmt: skip
def test_the_run_says_so_and_keeps_nothing_of_it(results, runs, name, line):
    assert line in results[name][0]["said"].splitlines()
    assert not [path.name for path in (runs / name / "checkpoints").iterdir() if "universal" in path.name]


def test_random_numbers_go_on_where_there_were_some_and_differ_everywhere(results, runs):
    states = [rank["generator"] for rank in results["z3-4"]]
    saved = load_file(runs / "z3-1" / "checkpoints" / "step-000002" / "generators-rank-00000.safetensors")
    assert torch.equal(states[0], saved["cpu"])
    assert len({bytes(state.tolist()) for state in states}) == 4


def test_a_global_batch_that_does_not_divide_is_refused(results):
    message = results["z3-1-otherwise"][0]["refused"]
    assert message.startswith("global_batch_size: 4 is not micro_batch_size 3 x accumulation x 1 rank;")
    assert "a run that continues keeps its global batch" in message
