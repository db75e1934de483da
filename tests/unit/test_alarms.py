"""Alarms on series made by hand: each sounds where it must, once, and never on noise."""

import json
import math

import numpy as np
import pytest

from mede2.trainer.alarms import ALARMS, WINDOW, Alarms
from mede2.trainer.metrics import Metrics, read_metrics

STEPS = 200
START = 100  # where each series below goes wrong
NAMES = [alarm.__name__ for alarm in ALARMS]


def honest(seed: int = 0, steps: int = STEPS) -> list[dict[str, float]]:
    """Rows of a run that goes well: margins rise, the chosen answers too, a fifth of the pairs stays wrong."""
    noise = np.random.default_rng(seed).standard_normal((steps, 6))
    rising = np.linspace(0, 2, steps)
    columns = {
        "loss": 0.7 - 0.1 * rising + 0.05 * noise[:, 0],
        "rewards/chosen": 0.3 * rising + 0.2 * noise[:, 1],
        "rewards/margins": rising + 0.3 * noise[:, 2],
        "rewards/accuracies": np.clip(0.8 + 0.1 * noise[:, 3], 0, 1),
        "length/chosen": 60 + 5 * noise[:, 4],
        "length/rejected": np.full(steps, 55.0),
        "grad_norm": np.exp(0.5 * noise[:, 5]),
    }
    series = {name: values.tolist() for name, values in columns.items()}
    return [{"step": step + 1} | {name: values[step] for name, values in series.items()} for step in range(steps)]


def chosen_falls(rows):
    for late, row in enumerate(rows[START:]):
        row["rewards/chosen"] -= 0.05 * late


def length_drift(rows):
    for row in rows[START:]:
        row["rewards/margins"] += 0.2 * (row["length/chosen"] - 60)


def saturated(rows):
    for row in rows[START:]:
        row["rewards/accuracies"] = 1.0


def gradient_spike(rows):
    rows[START]["grad_norm"] = 30.0


def not_finite(rows):
    rows[START]["eval/loss"] = float("nan")


WRONGS = [  # what goes wrong, and within how many updates the alarm must sound
    (chosen_falls, WINDOW), (length_drift, WINDOW), (saturated, WINDOW), (gradient_spike, 1), (not_finite, 1),
]  # fmt: skip


def sound(rows) -> list[tuple[int, str]]:
    alarms = Alarms()
    return [(row["step"], name) for row in rows for name in alarms(row)[0]]


def test_every_alarm_has_a_series():
    assert [wrong.__name__ for wrong, _ in WRONGS] == NAMES


@pytest.mark.parametrize(("wrong", "within"), WRONGS, ids=NAMES)
def test_it_sounds_once_and_soon_and_no_other_does(wrong, within):
    rows = honest()
    wrong(rows)
    [(step, name)] = sound(rows)
    assert name == wrong.__name__
    assert START < step <= START + within


def test_silent_on_an_honest_run_of_five_thousand_updates():
    assert sound(honest(seed=1, steps=5000)) == []


def test_silent_while_both_stand_still():
    """No trend, no spread: nothing to divide by."""
    row = honest()[0] | {"grad_norm": 0.0}
    assert sound([row | {"step": step} for step in range(100)]) == []


def test_silent_where_the_chosen_answers_fall_alone():
    """Margins that fall with them are another matter, and so is a dip of a tenth of what margins gain."""
    rows = honest()
    for late, row in enumerate(rows[START:]):
        row["rewards/chosen"] -= 0.05 * late
        row["rewards/margins"] -= 0.05 * late
    assert sound(rows) == []
    for late, row in enumerate(rows):
        row |= {"rewards/chosen": -0.001 * late, "rewards/margins": 0.05 * late}
    assert sound(rows) == []


def test_silent_where_answers_are_nearly_of_one_length():
    """A token more or less says something else; margins may well follow it."""
    rows = honest()
    length_drift(rows)
    for row in rows:
        row["length/rejected"] = row["length/chosen"] - (row["length/chosen"] - 60) / 5
    assert sound(rows) == []


def test_stage_one_has_alarms_for_what_it_measures():
    rows = [{"step": row["step"], "loss": row["loss"], "grad_norm": row["grad_norm"]} for row in honest()]
    gradient_spike(rows)
    assert sound(rows) == [(START + 1, "gradient_spike")]


def test_an_alarm_ends_and_sounds_again():
    rows = honest()
    for start in (40, 120):
        for row in rows[start : start + 40]:
            row["rewards/accuracies"] = 1.0
    assert [name for _, name in sound(rows)] == ["saturated", "saturated"]
    alarms = Alarms()
    marks = [alarms(row)[1].get("alarms/saturated") for row in rows]
    first = marks.index(1.0)
    last = marks.index(0.0)  # one row says that it is over
    assert marks[:first] == [None] * first
    assert set(marks[first:last]) == {1.0}
    assert marks[last + 1] is None


def test_it_does_not_flicker_about_its_threshold():
    rows = honest()
    for step, row in enumerate(rows):
        row["rewards/accuracies"] = 0.995 + 0.002 * math.sin(step / 10)
    assert [name for _, name in sound(rows)] == ["saturated"]


@pytest.mark.parametrize("stopped", [START - 10, START + 10, START + 60])
def test_a_continued_run_hears_what_an_undisturbed_one_hears(stopped, tmp_path, capsys):
    """Stopped before, between and after what sounds; five updates beyond the checkpoint are done again."""
    rows = honest()
    chosen_falls(rows)
    gradient_spike(rows)

    def write(folder, parts) -> tuple[list[dict], list[str]]:
        folder.mkdir()
        said = []
        for first, last in parts:
            metrics = Metrics(folder, first, STEPS, "stage 2")
            for row in rows[first:last]:
                values = {name: value for name, value in row.items() if name != "step"}
                metrics.row(row["step"], values | {"num_tokens": 1}, seconds=1.0)
            metrics.close()
            said += [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm")]
        kept = [row | {"peak_gib": 0} for row in read_metrics(folder / "metrics.jsonl")]
        return kept, said

    whole, said = write(tmp_path / "whole", [(0, STEPS)])
    assert len(said) == 2
    assert sum("alarms/chosen_falls" in row for row in whole) > 10
    continued, said_continued = write(tmp_path / "continued", [(0, stopped + 5), (stopped, STEPS)])
    assert json.dumps(continued) == json.dumps(whole)
    assert said_continued == said


def test_an_update_that_was_left_out_neither_sounds_an_alarm_nor_ends_one():
    """Its row has no grad_norm, nor what else was not finite."""
    rows = honest()
    gradient_spike(rows)
    left_out = {"step": 0, "num_skipped": 1, "learning_rate": 1e-5, "num_tokens": 30}
    alarms, marks = Alarms(), []
    for row in rows:
        assert alarms(left_out)[0] == {}
        starting, mark = alarms(row)
        marks.append((starting, mark, alarms(left_out)))
    alone = Alarms()
    assert [(starting, mark) for starting, mark, _ in marks] == [alone(row) for row in rows]
    assert marks[START][2] == ({}, {"alarms/gradient_spike": 1.0})
