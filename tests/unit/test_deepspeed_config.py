"""The DeepSpeed file: what is filled, what must agree, what the settings own."""

import copy
import json
from pathlib import Path

import pytest
import torch

from mede2.trainer.deepspeed_file import fill_deepspeed_config, read_deepspeed_file
from mede2.trainer.engine import AsyncIOBuilder, check_nvme
from mede2.trainer.prepare import prepare
from mede2.trainer.resolution import resolve
from mede2.trainer.settings import BatchArithmetic, Settings

ROOT = Path(__file__).parents[2]
AUTO = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "stage3_param_persistence_threshold": "auto"},
}  # fmt: skip


def fill(config: dict, dtype=torch.float32, **settings):
    given = Settings(**{"global_batch_size": 24, "micro_batch_size": 3, "max_grad_norm": 0.5} | settings)
    return fill_deepspeed_config(config, given, BatchArithmetic(24, 3, 4), dtype, hidden_size=32, largest_parameter=999)


@pytest.mark.parametrize(("dtype", "bf16"), [(torch.float32, False), (torch.bfloat16, True)])
@pytest.mark.parametrize("given", [AUTO, {"zero_optimization": AUTO["zero_optimization"]}], ids=["auto", "absent"])
def test_every_auto_is_filled_from_the_settings(given, dtype, bf16):
    before = copy.deepcopy(given)
    filled = fill(given, dtype)
    assert given == before, "the caller's configuration changed"
    batch_sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [filled[name] for name in batch_sizes] == [24, 3, 2]
    assert filled["gradient_clipping"] == 0.5
    assert filled["bf16"]["enabled"] is bf16
    assert filled["zero_optimization"] == {
        "stage": 3, "reduce_bucket_size": 32 * 32, "stage3_param_persistence_threshold": 10 * 32,
    }  # fmt: skip
    assert '"auto"' not in json.dumps(filled)


def test_explicit_values_that_agree_stay():
    filled = fill(AUTO | {"train_batch_size": 24, "zero_optimization": {"stage": 2, "reduce_bucket_size": 7}})
    assert (filled["train_batch_size"], filled["zero_optimization"]["reduce_bucket_size"]) == (24, 7)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").iterdir()), ids=lambda path: path.name)
def test_shipped_files_fill(path):
    nvme = {"nvme_path": "/nvme/run"} if "nvme" in path.name else {}
    filled = fill(read_deepspeed_file(path), **nvme)
    assert '"auto"' not in json.dumps(filled)
    assert json.dumps(filled).count("/nvme/run") == 2 * len(nvme)


def test_the_folder_on_nvme_and_the_file_must_ask_for_each_other():
    nvme = read_deepspeed_file(ROOT / "ds_configs" / "z3_nvme.json")
    with pytest.raises(ValueError, match=r"nvme_path: not set, .*offload_optimizer\..*, .*offload_param\.nvme_path"):
        fill(nvme)
    with pytest.raises(ValueError, match="nvme_path: /nvme/run, but no offload to NVMe in the --ds file asks for it"):
        fill(AUTO, nvme_path="/nvme/run")
    for what in ("optimizer", "param"):
        nvme["zero_optimization"][f"offload_{what}"]["nvme_path"] = "/explicit"
    assert json.dumps(fill(nvme)).count("/explicit") == 2


def test_a_buffer_between_nvme_and_memory_holds_a_rank_s_share_of_the_largest_parameter():
    """DeepSpeed stops in an assertion where it does not, and an embedding's share was larger than its default."""
    nvme = read_deepspeed_file(ROOT / "ds_configs" / "z3_nvme.json")
    offload = nvme["zero_optimization"]["offload_param"]
    assert fill(nvme, nvme_path="/nvme")["zero_optimization"]["offload_param"]["buffer_size"] == 250
    offload["buffer_size"] = 249
    with pytest.raises(ValueError, match=r"offload_param\.buffer_size is 249, but a rank holds 250 values of the "):
        fill(nvme, nvme_path="/nvme")
    del offload["buffer_size"]
    assert fill(nvme, nvme_path="/nvme")["zero_optimization"]["offload_param"]["buffer_size"] == 250


@pytest.mark.skipif(AsyncIOBuilder().is_compatible(verbose=False), reason="libaio is here")
def test_offload_to_nvme_without_libaio_is_refused(tmp_path, world):
    resolved = resolve(1, [("test", {"nvme_path": str(tmp_path), "output": str(tmp_path / "stage1")})])
    with pytest.raises(ValueError, match=r"nvme_path: .*needs libaio with its headers"):
        prepare(resolved, str(ROOT / "ds_configs" / "z3_nvme.json"), tmp_path / "stage1", world)


def test_cpu_adam_is_let_through_where_the_file_offloads():
    filled = fill(read_deepspeed_file(ROOT / "ds_configs" / "z3_offload.json"), optimizer="cpu_adam")
    assert filled["zero_force_ds_cpu_optimizer"] is True


def test_a_run_with_its_optimizer_on_nvme_is_not_continued():
    """Loaded again it went on from the weights of its first step."""
    with pytest.raises(ValueError, match="resume: a run with its optimizer on NVMe cannot be continued"):
        check_nvme(read_deepspeed_file(ROOT / "ds_configs" / "z3_nvme.json"), resumes=True)
    check_nvme(read_deepspeed_file(ROOT / "ds_configs" / "z3_offload.json"), resumes=True)
