"""Weights & Biases: a run offline, and gone on with; one clear error where the package is not installed."""

import sys
import time
from pathlib import Path

import pytest

from mede2.trainer.metrics import Metrics
from mede2.trainer.resolution import resolve
from mede2.trainer.run import run_stage
from mede2.trainer.weights_and_biases import check_wandb, start_wandb, started_run

Z3 = str(Path(__file__).parents[2] / "ds_configs/z3.json")


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """The package with nothing configured, and as nobody has yet used it."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    yield wandb
    wandb.teardown()


def test_a_missing_package_stops_a_run_before_it_starts(tmp_path, world, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])  # of metadata
    resolved = resolve(2, [("test", {"wandb": "medicine", "output": str(tmp_path / "stage2")})])
    with pytest.raises(ValueError, match=r"wandb: the package is not installed; pip install 'mede2\[watch\]'"):
        run_stage(resolved, Z3, world)
    assert not list(tmp_path.iterdir())


def test_without_a_key_a_run_does_not_start(wandb):
    with pytest.raises(ValueError, match="wandb: no API key; `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=off"):
        check_wandb()


def test_with_a_malformed_key_a_run_does_not_start(wandb, monkeypatch, world):
    """As a ValueError, the kind that rank 0 passes on to the ranks that wait for it."""
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(ValueError, match="wandb: WANDB_API_KEY invalid"):
        world.on_main(check_wandb)


def test_a_continued_run_goes_on_writing_the_same_run(wandb, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    settings = resolve(2, [("test", {"wandb": "medicine"})]).settings
    check_wandb()
    ids = []
    for first, last in ((0, 5), (4, 8)):  # the fifth update is done again
        start_wandb(settings, tmp_path, "Stage II")
        metrics = Metrics(tmp_path, first, 8, "stage 2", started_run())
        ids.append(started_run().id)
        for step in range(first + 1, last + 1):
            loss = float("nan") if step == 6 else 0.5
            metrics.row(step, {"loss": 0.5, "eval/loss": loss, "num_tokens": 30}, seconds=0.5)
        metrics.close()
        assert wandb.run is None
        time.sleep(1.0)  # wandb names the folder of an offline run by the second
    assert ids[0] == ids[1]
    first, second = (file.read_bytes() for file in sorted(tmp_path.glob(f"wandb/offline-run-*-{ids[0]}/run-*.wandb")))
    assert b"tokens_per_s" in first
    assert b"not finite: eval/loss" in second
