"""Runs that are killed, and checkpoints and inputs that change between two starts, on two real ranks.

The first test is a small campaign of benchmarks/campaign_faults.py; the two after it show that it can fail.
"""

import importlib
import json
import shutil
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # the runs are many; on a busy machine each takes a minute


@pytest.fixture(scope="module")
def faults():
    """The module campaign_faults."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield importlib.import_module("campaign_faults")


@pytest.fixture(scope="module")
def campaign(faults, tmp_path_factory):
    """A campaign whose undisturbed run is done."""
    campaign = faults.Campaign(tmp_path_factory.mktemp("campaign"), seed=5)
    campaign.see()
    return campaign


@pytest.fixture(scope="module")
def killed(faults, campaign):
    """A run that was killed twice: as it began, and in update 7, with checkpoints of updates 4 and 6."""
    run = faults.Run(campaign.folder / "killed")
    begun = next(m for _, m in campaign.moments if m.name == "before os.replace" and m.target == "identity.json")
    in_7 = next(m for _, m in campaign.moments if m.phase == "step" and m.name == "before a backward" and m.update == 7)
    for moment in (begun, in_7):
        start = campaign.start(run, moment=moment, victims=(0, 1))
        assert (start.codes, start.moment, start.came_from) == ([-9, -9], moment, None)
    assert [path.name for path in checkpoints(run)] == ["step-000004", "step-000006"]
    return run


def checkpoints(run) -> list[Path]:
    return sorted(run.output.glob("checkpoints/step-*"))


def flip_a_bit(checkpoint: Path) -> Path:
    """In the largest file, DeepSpeed's; returns the file."""
    path = max(checkpoint.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def refusal(start) -> str:
    """What the only error says of a start that ends with one."""
    assert start.codes[0] > 0  # rank 1 waits for rank 0 to speak, and is sent away before it would
    assert "Traceback" not in start.log
    (line,) = (line for line in start.log.splitlines() if line.startswith("Error: "))
    return line


def test_runs_that_are_killed_end_as_if_they_had_not_been(faults, campaign):
    runs = list(campaign.kill(3))
    assert faults.headline(runs) == {"kills": 3, "runs": len(runs), "identical": len(runs), "lost": 0}


@pytest.mark.parametrize("sabotage", ["rng", "data"])
def test_the_campaign_fails_where_something_is_not_restored(faults, campaign, sabotage):
    (run,) = runs = list(campaign.kill(1, sabotage))
    assert faults.headline(runs) == {"kills": 1, "runs": 1, "identical": 0, "lost": 0}
    assert (run.identical_losses, run.identical_weights) == (False, False)


def test_a_kill_that_does_not_happen_does_not_count(faults, campaign):
    """The undisturbed run is done and comes to nothing any more."""
    done = faults.Run(campaign.folder / "undisturbed")
    with pytest.raises(click.ClickException, match="rank 0 never came to Moment"):
        campaign._kill_at(done, *campaign.moments[0], None)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_gives_the_same_run(faults, campaign, killed):
    run = faults.Run(campaign.folder / "damaged")
    shutil.copytree(killed.folder, run.folder)
    damaged = flip_a_bit(checkpoints(run)[-1])
    start = campaign.start(run)
    assert (start.codes, start.came_from) == ([0, 0], 4)
    assert f"warning: {damaged} is damaged (its sha256 is not the one that was written)" in start.log
    assert faults.outcome_of(run.output) == campaign.undisturbed


def test_a_run_without_a_whole_checkpoint_says_so(faults, campaign, killed):
    run = faults.Run(campaign.folder / "hopeless")
    shutil.copytree(killed.folder, run.folder)
    older, newer = checkpoints(run)
    lost = max(older.iterdir(), key=lambda path: path.stat().st_size)
    lost.unlink()
    (newer / "complete.json").write_text((newer / "complete.json").read_text()[:100])
    said = refusal(campaign.start(run))
    assert said.startswith("Error: resume: ")
    assert f"{newer} is no complete checkpoint (complete.json is missing or damaged); {lost} is damaged (no " in said
    assert said.endswith("; start over with --resume never")


@pytest.mark.parametrize("changed", ["train", "model"])
def test_an_input_that_changed_between_two_starts_is_refused_by_name(campaign, killed, changed):
    file = campaign.train if changed == "train" else campaign.model / "model.safetensors"
    before = file.read_bytes()
    if changed == "train":
        rows = [json.loads(line) for line in before.decode().splitlines()]
        rows[0]["chosen"], rows[0]["rejected"] = rows[0]["rejected"], rows[0]["chosen"]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    try:
        said = refusal(campaign.start(killed))
    finally:
        file.write_bytes(before)
    assert said.startswith(f"Error: resume: {killed.output} holds another run ({changed}: another one)")
    assert said.endswith("give that run's settings, name another --output, or start over with --resume never")
