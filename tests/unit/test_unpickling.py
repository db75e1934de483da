"""A checkpoint's pickles make tensors and values, whatever DeepSpeed asks of torch, and a forged one runs nothing."""

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from mede2.trainer.unpickling import FORCED, tensors_only


class Touches:
    """When it is unpickled without a guard, the file `path` is there."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def save(tmp_path, request):
    def write(value) -> Path:
        torch.save(value, tmp_path / "file.pt", _use_new_zipfile_serialization=request.param)
        return tmp_path / "file.pt"

    return write


def test_what_runs_code_is_refused_and_nothing_runs(save, tmp_path):
    touched = tmp_path / "touched"
    file = save({"module": {"weight": torch.ones(2)}, "step": Touches(touched)})
    told = r"a file of step-000002 is not read.*\(io\.open\) and could run code"
    with pytest.raises(ValueError, match=told), tensors_only("step-000002"):
        torch.load(file, weights_only=False)
    assert not touched.exists()
    torch.load(file, weights_only=False)["step"].close()  # the file does what it is said to do
    assert touched.exists()


def test_what_deepspeed_writes_is_read(save):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    written = {
        "zero_stage": ZeroStageEnum.weights, "loss_scaler": LossScaler(scale=4.0), "shapes": [torch.Size((2, 3))],
        "slices": OrderedDict({"weight": fragment_address(numel=3, start=6)}), "flat": torch.arange(6).bfloat16(),
    }  # fmt: skip
    file = save(written)
    with tensors_only(file):
        read = torch.load(file, weights_only=False)
    assert read["zero_stage"] is ZeroStageEnum.weights
    assert read["loss_scaler"].loss_scale == 4.0
    assert (read["shapes"], read["slices"]) == (written["shapes"], written["slices"])
    assert torch.equal(read["flat"], written["flat"])


class Fetches:
    """What getattr fetches of an object; enumerations are pickled so by Python 3.11.2, but nothing else."""

    def __init__(self, of, name: str):
        self.of, self.name = of, name

    def __reduce__(self):
        return getattr, (self.of, self.name)


def test_members_of_enumerations_are_fetched_and_nothing_else(save):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = save({"stage": Fetches(ZeroStageEnum, "gradients")})
    with tensors_only(file):
        assert torch.load(file, weights_only=False)["stage"] is ZeroStageEnum.gradients
    for of, name in ((LossScaler, "__init__"), (ZeroStageEnum, "mro"), ([1], "append")):
        file = save({"stage": Fetches(of, name)})
        with pytest.raises((ValueError, KeyError)), tensors_only(file):
            torch.load(file, weights_only=False)


def test_only_within(save, monkeypatch):
    file = save({"path": Path("/")})
    monkeypatch.delenv(FORCED, raising=False)
    with tensors_only(file):
        assert os.environ[FORCED] == "1"
    assert FORCED not in os.environ
    monkeypatch.setenv(FORCED, "true")
    with pytest.raises(ValueError, match="is not read"), tensors_only(file):
        torch.load(file, weights_only=False)
    assert os.environ[FORCED] == "true"


def test_a_program_is_held_to_it_with_its_workers(tmp_path):
    """As DeepSpeed's converter to the universal format reads them: in forked processes."""
    (tmp_path / "converter.py").write_text(
        "import sys, torch; from concurrent.futures import ProcessPoolExecutor\n"
        "def read(file): return int(torch.load(file, weights_only=False)['step'])\n"
        "if __name__ == '__main__':\n"
        "    with ProcessPoolExecutor(1) as workers: print('read', *workers.map(read, sys.argv[1:]))\n"
    )
    honest, forged = tmp_path / "honest.pt", tmp_path / "forged.pt"
    torch.save({"step": torch.tensor(7)}, honest)
    torch.save({"step": Touches(tmp_path / "touched")}, forged)
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(tmp_path)]))

    def convert(file: Path) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "mede2.trainer.unpickling", "converter", str(file)]
        environment = os.environ | {"PYTHONPATH": path}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    assert convert(honest).stdout.splitlines()[-1] == "read 7"
    refused = convert(forged)
    assert refused.returncode != 0
    assert "a file of the checkpoint is not read" in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "touched").exists()
