"""The doctor on a node as it is, and on one of which something is broken."""

import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from mede2.trainer.doctor.examine import ranks_of_slurm
from mede2.trainer.doctor.findings import FAIL, OK, WARN, Finding, of_all_nodes
from mede2.trainer.doctor.node import clock, flash_attn, gpus, models, openness, scratch, versions, writing

LINE = re.compile(r"(ok|warn|FAIL) +(\S+) +(.+)")
OF_A_NODE = ["versions", "GPUs", "flash-attn", "output", "readers", "/tmp", "/dev/shm", "clock", "models"]
CHECKS = [*OF_A_NODE, "skew", "gloo", "shared", "step"]


def read(output: str) -> dict[str, tuple[str, str]]:
    """By check, its level and what stands behind it."""
    found = [LINE.fullmatch(line) for line in output.splitlines()]
    return {one[2]: (one[1], one[3]) for one in found if one}


def test_a_healthy_node(run, tmp_path):
    """Alone, it starts two ranks; they train a step, and leave nothing behind."""
    done = run("python", "launch/doctor.py", "--output", str(tmp_path / "runs"), "--need-gib", "0.01")
    found = read(done.stdout)
    assert list(found) == CHECKS
    assert [check for check, (level, _) in found.items() if level == FAIL] == []
    assert found["GPUs"][0] == WARN, "a laptop may run all"
    assert re.search(r"all-reduce of 16 MiB over 2 ranks: [\d.]+ GB/s, bus [\d.]+ GB/s", found["gloo"][1])
    assert re.search(r"ZeRO-3, 2 ranks.*loss \d.*weights moved and are alike on all ranks", found["step"][1])
    assert len(done.stdout.splitlines()) == len(CHECKS), done.stdout
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_folder_that_cannot_be_written_and_packages_that_are_not_the_pinned_ones(run, tmp_path):
    """By two ranks of a launcher; the step is not tried."""
    (tmp_path / "file").write_text("")
    other = tmp_path / "packages" / "click-7.1.2.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: click\nVersion: 7.1.2\n")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(other.parent)]))
    done = run(
        "torchrun", "--nproc_per_node", "2", "--master_port", port, "launch/doctor.py",
        "--output", str(tmp_path / "file" / "runs"), check=False, PYTHONPATH=path,
    )  # fmt: skip
    assert done.returncode == 1
    found = read(done.stdout)
    assert found["versions"][0] == FAIL
    assert "click 7.1.2, not <9,>=8.1; pip install -e ." in found["versions"][1]
    assert found["output"][0] == FAIL
    assert f"{tmp_path / 'file' / 'runs'} cannot be written (Not a directory)" in found["output"][1]
    assert found["step"] == (WARN, "not tried, for want of a folder that all ranks can write and read")
    assert "shared" not in found


def test_ranks_that_do_not_find_each_other(tmp_path):
    """Where nobody listens a rank says so itself, for there is no other to hear it."""
    code = (
        "import sys, mede2.trainer.doctor.examine as e;"
        "e.PATIENCE_MINUTES = 0.03; from pathlib import Path;"
        "print(e.examine(Path(sys.argv[1]), 0, None))"
    )
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | alone, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "['ranks']", done.stderr[-2000:]
    level, text = read(done.stdout)["ranks"]
    assert level == FAIL
    assert text.startswith("rank 0 of 2 cannot join at 127.0.0.1:0 (")


def test_room_and_readers(tmp_path):
    assert writing(tmp_path / "new", 0.0).level in (OK, WARN)
    assert list((tmp_path / "new").iterdir()) == []
    little = writing(tmp_path, 1e9)
    assert little.level == FAIL
    assert "1e+09 GiB are asked for (--need-gib)" in little.remedy
    (tmp_path / "new").chmod(0o755)
    assert openness(tmp_path / "new").level == WARN
    assert openness(tmp_path / "new").remedy.endswith(f"chmod o-rwx {tmp_path / 'new'}")
    (tmp_path / "new").chmod(0o750)
    assert openness(tmp_path / "new").level == OK
    assert scratch(str(tmp_path / "none"), "make it").level == FAIL


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="only root mounts a small disk")
def test_a_full_disk(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        full = writing(tmp_path, 0.0)
        assert full.level == FAIL
        assert "(No space left on device)" in full.found
        assert list(tmp_path.iterdir()) == []
        assert scratch(str(tmp_path), "a larger one") == Finding(
            str(tmp_path), WARN, "0.000977 GiB free", "a larger one"
        )  # fmt: skip
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_models(model_folder, tmp_path, monkeypatch):
    assert models(str(model_folder)) == Finding("models", OK, f"{model_folder} is there")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert models(str(tmp_path)).level == FAIL
    unknown = models("nobody/nothing")  # the tests run offline
    assert unknown.level == FAIL
    assert "hf download nobody/nothing" in unknown.remedy
    assert models(None).level == OK


def test_a_clock_before_the_packages_and_a_driver_without_its_torch(monkeypatch):
    assert clock().level == OK
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert clock() == Finding(
        "clock", FAIL, clock().found, "set the time (chronyc makestep)"
    )  # fmt: skip
    assert "is before torch was installed" in clock().found
    monkeypatch.setattr("mede2.trainer.doctor.node._driver", lambda: "13.1")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpus().level == FAIL
    assert "sees none, but a driver (CUDA 13.1) is there" in gpus().found


@pytest.mark.parametrize(
    ("there", "binary", "level", "told"),
    [
        ("2.8.3.post2", None, OK, "2.8.3.post2 loads beside torch "),
        ("2.8.3", b"", FAIL, "file too short"),
        ("2.7.4.post1", None, FAIL, "2.7.4.post1, not <3,>=2.8"),
    ],
)
def test_flash_attn(there, binary, level, told, tmp_path, monkeypatch):
    """Its package imports a library that was linked against one torch."""
    info, package = tmp_path / f"flash_attn-{there}.dist-info", tmp_path / "flash_attn"
    info.mkdir()
    package.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash_attn\nVersion: {there}\n")
    (package / "__init__.py").write_text("" if binary is None else "import flash_attn_2_cuda\n")
    if binary is not None:
        (tmp_path / "flash_attn_2_cuda.so").write_bytes(binary)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    found = flash_attn()
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert found.level == level
    assert told in found.found


def test_no_flash_attn_is_no_fault(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("mede2.trainer.doctor.node.version", missing)
    assert flash_attn() == Finding("flash-attn", OK, "not installed; attention=sdpa and eager go without it")


def test_the_installed_versions_are_those_of_setup_py():
    assert versions().level == OK


def test_nodes_that_differ_are_named():
    same, old, new = Finding("clock", OK, "now"), Finding("versions", FAIL, "2.1"), Finding("versions", OK, "2.13")
    nodes = [("n1", [new, same]), ("n2", [old, same]), ("n3", [new, same])]
    assert of_all_nodes(nodes) == [
        Finding("versions", OK, "n1, n3: 2.13"), Finding("versions", FAIL, "n2: 2.1"), same
    ]  # fmt: skip


def test_ranks_of_srun():
    step = {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "70123",
        "MASTER_ADDR": "n1",
    }  # fmt: skip
    wanted = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_PORT": "20123"}
    assert ranks_of_slurm(step) == wanted
    assert ranks_of_slurm(step | {"MASTER_PORT": "5"}) == {name: wanted[name] for name in list(wanted)[:3]}
    assert ranks_of_slurm(step | {"RANK": "0"}) == {}, "torchrun under srun has said it"
    assert ranks_of_slurm({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == {}, "a batch script is no task of its step"
