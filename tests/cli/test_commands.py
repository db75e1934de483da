"""The commands of both stages under each launcher, and what a run leaves behind."""

import json
import random
import subprocess
import time
from pathlib import Path

import pytest
import yaml

DS = "ds_configs/z3.json"
SMALL = ("--global-batch-size", "8", "--micro-batch-size", "4", "--learning-rate", "1e-3")


def losses(output: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step is doubled or missing"
    return {row["step"]: row["loss"] for row in rows}


@pytest.fixture(scope="module")
def stage1(tmp_path_factory, records, run) -> Path:
    """Stage I by plain python, one process."""
    output = tmp_path_factory.mktemp("runs") / "stage1"
    done = run("python", "launch/stage1.py", "--ds", DS, "--train", records["stage1"], "--output", str(output), *SMALL)
    assert "global batch 8 = micro-batch 4 x accumulation 2 x 1 rank" in done.stdout
    return output


def stage2_command(stage1: Path, records: dict, output: Path) -> tuple[str, ...]:
    return (
        "launch/stage2.py", "--ds", DS, "--model", str(stage1), "--train", records["stage2"],
        "--eval", records["stage2"],
        "--output", str(output), "--epochs", "3", "--save-every", "2", "--eval-every", "4", *SMALL,
        "--set", "objective={sigmoid: 0.8, bco_pair_shifted: 0.2, nll: 1}",  # carries a state from update to update
    )  # fmt: skip


@pytest.fixture(scope="module")
def stage2(stage1, records, run) -> Path:
    """Stage II by deepspeed, two ranks, undisturbed."""
    output = stage1.parent / "stage2"
    done = run("deepspeed", *stage2_command(stage1, records, output), LOCAL_SIZE="2")
    assert "global batch 8 = micro-batch 4 x accumulation 1 x 2 ranks" in done.stdout
    return output


def test_a_run_leaves_a_model_its_settings_and_its_metrics(stage1):
    summary = json.loads((stage1 / "summary.json").read_text())
    assert summary["updates"] == 5
    assert summary["export_logps_difference"] < 1e-4
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json", "chat_template.jinja",
            "generation_config.json", "README.md"} <= {path.name for path in stage1.iterdir()}  # fmt: skip
    assert list((stage1 / "tensorboard").iterdir())
    recipe = (stage1 / "settings.yaml").read_text()
    assert "learning_rate: 0.001  # flag" in recipe
    assert yaml.safe_load(recipe)["global_batch_size"] == 8
    curve = losses(stage1)
    assert curve[5] < curve[1]


def test_stage2_reports_rewards_and_starts_at_log_two(stage2):
    first, *_, last = (json.loads(line) for line in (stage2 / "metrics.jsonl").read_text().splitlines())
    assert first["loss/sigmoid"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["eval/rewards/margins"] > 0
    assert {
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "grad_norm",
        "tokens_per_s",
        "step_ms",
    } <= last.keys()


def test_the_same_command_again_finds_the_run_done(stage1, records, run):
    done = run("python", "launch/stage1.py", "--ds", DS, "--train", records["stage1"], "--output", str(stage1), *SMALL)
    assert "done; --resume never runs it again" in done.stdout


def test_other_settings_in_the_same_output_are_refused_by_name(stage1, records, run):
    done = run(
        "python", "launch/stage1.py", "--ds", DS, "--train", records["stage1"], "--output", str(stage1), *SMALL,
        "--seed", "3", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "seed: 0 there, 3 now" in done.stderr
    assert "Traceback" not in done.stderr


def test_ranks_leave_their_group_before_they_end(records, run):
    """A process that ends inside it aborts now and then, in the group's own threads."""
    program = (
        "import torch.distributed as group; from mede2.trainer.commandline import stage_command; "
        "stage_command(1).main(standalone_mode=False); assert not group.is_initialized(); print('left')"
    )
    done = run("torchrun", "--nproc_per_node", "2", "--no-python", "python", "-c", program, "--ds", DS, "--dry-run",
               "--train", records["stage1"], "--output", "runs/never-written", *SMALL)  # fmt: skip
    assert done.stdout.count("left") == 2


@pytest.mark.parametrize("launcher", [("deepspeed",), ("torchrun", "--nproc_per_node", "2")], ids=" ".join)
def test_other_launchers_and_ranks_have_the_same_loss_curve(launcher, stage1, stage2, records, run):
    output = stage1.parent / launcher[0] / "stage2"
    done = run(*launcher, *stage2_command(stage1, records, output))
    assert "reference log-probabilities of the train records: computing" in done.stdout
    assert losses(output) == pytest.approx(losses(stage2), abs=1e-5)


def test_killed_at_a_random_moment_it_continues_as_if_nothing_had_happened(stage1, stage2, records, run, start):
    """kill -9 of the launcher and both ranks, then the same command again: no update doubled or missing."""
    output = stage1.parent / "killed" / "stage2"
    command = stage2_command(stage1, records, output)
    cache = ("--set", f"reference_cache={stage1.parent / 'reference_cache'}")
    process = start("deepspeed", *command, *cache, LOCAL_SIZE="2")
    wanted = random.randint(1, 8)
    metrics = output / "metrics.jsonl"
    deadline = time.monotonic() + 180
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= wanted):
        assert process.poll() is None, "the run ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    subprocess.run(["pkill", "-KILL", "-f", str(output)], check=True)
    process.wait()
    assert not (output / "summary.json").exists(), f"killed too late (after step {wanted})"

    done = run("deepspeed", *command, *cache, LOCAL_SIZE="2")
    assert f"found in {stage1.parent / 'reference_cache'}" in done.stdout
    assert losses(output) == losses(stage2), f"killed after {wanted}"


def test_everything_at_once_resumes_to_the_same_numbers(stage1, records, run):
    """Two ranks, packed rows, shared prefix, an adapter, 8-bit Adam and a mixed objective."""
    together = (
        "--set", "pack_length=600", "--set", "micro_batch_size=1", "--set", "lora_rank=8", "--set",
        "optimizer=adamw_8bit", "--set", "corruption=crop", "--set",
        "objective={sigmoid: 0.6, bco_pair_shifted: 0.2, image_conditional: 0.2, nll: 1}",
    )  # fmt: skip
    shared = tuple(part for part in SMALL if part not in ("--micro-batch-size", "4"))
    files = ("--train", records["stage2"], "--eval", records["stage2"])
    command = (
        "launch/stage2.py", "--ds", DS, "--model", str(stage1), *files,
        "--epochs", "2", "--save-every", "2", *shared, *together,
    )  # fmt: skip
    whole, again = stage1.parent / "together" / "stage2", stage1.parent / "together" / "again"
    done = run("deepspeed", *command, "--output", str(whole), LOCAL_SIZE="2")
    assert "trained parameters: language_model" in done.stdout
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss/sigmoid"] == pytest.approx(0.6931471805599453, abs=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert "eval/image_gap" in rows[-1]

    checkpoint = whole / "checkpoints" / "step-000002"
    run("deepspeed", *command, "--output", str(again), "--resume", str(checkpoint), LOCAL_SIZE="2")
    resumed = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in resumed] == [row["step"] for row in rows[2:]]
    for name in ("loss", "grad_norm", "rewards/margins", "rewards/shift", "image_gap"):
        assert [row[name] for row in resumed] == [row[name] for row in rows[2:]], name
