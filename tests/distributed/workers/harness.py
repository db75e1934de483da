"""What every worker shares: joining the ranks, building an engine from settings, and one result file per rank."""

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.utils import safe_get_full_optimizer_state
from transformers import AutoConfig

from mede2.kernels.logps import choose_implementation
from mede2.trainer.data.batches import Batches
from mede2.trainer.data.collate import Collator
from mede2.trainer.data.dataset import load_dataset
from mede2.trainer.data.encoding import Encoder
from mede2.trainer.data.layout import Layout
from mede2.trainer.data.positions import Positions
from mede2.trainer.data.processing import load_processor
from mede2.trainer.data.sampler import Sampler
from mede2.trainer.deepspeed_file import fill_deepspeed_config, read_deepspeed_file
from mede2.trainer.engine import Engine, make_optimizer
from mede2.trainer.policy import PARTS, freeze, largest_parameter, load_policy, quiet_transformers
from mede2.trainer.resolution import resolve
from mede2.trainer.sequence_parallel import join_group
from mede2.trainer.settings import BatchArithmetic, Settings
from mede2.trainer.world import World, join_world

DS_CONFIGS = Path(__file__).parents[3] / "ds_configs"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(scenarios: dict[str, Callable[[World, dict], object]]) -> None:
    """Run the scenarios that the job names, in its order, and store what each returns.

    The job file holds {"scenarios": [names], "results": folder, ...}; a scenario gets the world and the whole job.
    """
    pr_set_pdeathsig = 1  # of prctl(2): a pytest that is killed takes its workers with it
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    quiet_transformers()
    world = join_world(timeout_minutes=2)
    results = {}
    try:
        for name in job["scenarios"]:
            started = time.perf_counter()
            results[name] = scenarios[name](world, job)
            print(f"scenario {name}: {time.perf_counter() - started:.1f} s", flush=True)
        torch.save(results, Path(job["results"]) / f"rank-{world.rank}.pt")
        world.barrier()
    except BaseException:  # a rank that fails must not wait in its exit handlers for ranks that wait for it
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def make_settings(stage: int, **values) -> Settings:
    """Settings whose first Adam moment, after one update, is the gradient that the optimizer saw, to the bit."""
    defaults = {
        "global_batch_size": 8, "micro_batch_size": 1, "learning_rate": 1e-3, "adam_beta1": 0.0, "max_grad_norm": 0.0,
        "scheduler": "constant", "warmup_ratio": 0.0, "dtype": "fp32", "max_length": 512,
        "num_workers": 0,
    }  # fmt: skip
    return resolve(stage, [("test", defaults | values)]).settings


def make_batches(world: World, model: str, records: str, stage: int, settings: Settings) -> Batches:
    """The records in the order of the file, so that a test knows which rank holds which row."""
    processor = load_processor(Path(model))
    dataset = load_dataset((records,), stage, Encoder(processor, settings.max_length), "stop", world)
    batch = BatchArithmetic.of(settings, world.size)
    layout = Layout(settings.shared_prefix, corrupted="image_conditional" in settings.objective)
    lengths = tuple(map(layout.lengths, dataset.examples))
    collator = Collator(
        processor, Positions(Path(model)), dataset.has_images, layout, packed=settings.pack_length > 0,
        corruption=(settings.corruption, settings.seed), multiple=settings.sequence_parallel_size,
    )  # fmt: skip
    return Batches(dataset, Sampler(lengths, batch, None, settings.pack_length), collator, world, settings.num_workers)


def make_engine(
    world: World, model: str, settings: Settings, zero: str = "z3", *, trains: bool = True, adapter: Path | None = None
) -> Engine:
    """The engine of a run, assembled as `trainer/run.py` does; `adapter`: a saved one that trains on."""
    dtype = DTYPES[settings.dtype]
    batch = BatchArithmetic.of(settings, world.size)
    model_config = AutoConfig.from_pretrained(model)
    hidden_size = model_config.get_text_config().hidden_size
    file = read_deepspeed_file(DS_CONFIGS / f"{zero}.json")
    config = fill_deepspeed_config(file, settings, batch, dtype, hidden_size, largest_parameter(model_config))
    policy = load_policy(
        Path(model), dtype=dtype, attention=settings.attention, implementation=choose_implementation(settings.logps),
        deepspeed_config=config, activation_checkpointing=settings.activation_checkpointing,
        activation_offload=settings.activation_offload,
        adapter=adapter or (settings if settings.lora_rank else None), quantize=settings.quantize,
        sharing=join_group(world, settings.sequence_parallel_size), mlp_tiles=settings.mlp_tiles,
    )  # fmt: skip
    if not trains:
        return Engine(policy, config, world, dtype)
    freeze(policy, {part: getattr(settings, f"train_{part}") for part in PARTS})
    return Engine(policy, config, world, dtype, make_optimizer(policy, settings))


def trained_parameters(engine: Engine) -> dict[str, torch.nn.Parameter]:
    """The trained parameters under transformers' names."""
    named = engine.policy.named_parameters()
    return {name.removeprefix("model."): parameter for name, parameter in named if parameter.requires_grad}


def applied_gradients(engine: Engine) -> dict[str, torch.Tensor]:
    """What the optimizer got in its last update, whole and fp32: with adam_beta1 = 0 the first moment is that gradient.
    All ranks call it."""
    if engine.deepspeed.zero_optimization_stage() != 3:  # DeepSpeed links the state of the first parameter group only
        engine.deepspeed.optimizer._hp_optimizer_states_linked = False
        engine.deepspeed.optimizer._lazy_init_hp_params_optimizer_state()
    return {
        name: safe_get_full_optimizer_state(parameter, "exp_avg").clone()
        for name, parameter in trained_parameters(engine).items()
    }


def no_hook(step: int, metrics: dict[str, float]) -> None:
    """A hook of the loop that does nothing."""
