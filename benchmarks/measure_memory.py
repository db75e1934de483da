"""One rank of a run that says what its memory holds: live tensor bytes by category, and bytes sent. Imports deepspeed.

`launch/plan.py check` starts it, for every case of one number of ranks, and compares the planner's figures with these.
A rank trains three updates of a small model with random weights; the third is measured, as the first two make the
optimizer's state and DeepSpeed's order of gathering.
"""

import gc
import json
import sys
import weakref
from pathlib import Path

import deepspeed.comm.comm
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mede2.trainer.data.collate import MicroBatch
from mede2.trainer.deepspeed_file import fill_deepspeed_config, read_deepspeed_file
from mede2.trainer.engine import Engine, make_optimizer
from mede2.trainer.losses import sum_by_sequence
from mede2.trainer.planning.cases import CASES, Case
from mede2.trainer.policy import PARTS, freeze, largest_parameter, load_policy, quiet_transformers
from mede2.trainer.sequence_parallel import join_group
from mede2.trainer.settings import BatchArithmetic, Settings
from mede2.trainer.world import World, join_world

DS_CONFIGS = Path(__file__).parents[1] / "ds_configs"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VISION = {
    "qwen2_5_vl": dict(depth=4, hidden_size=128, intermediate_size=256, num_heads=4, patch_size=14, window_size=112,
                       spatial_merge_size=2, temporal_patch_size=2, fullatt_block_indexes=[1, 3]),
    "internvl": dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
                     attention_bias=True, image_size=[112, 112]),
}  # fmt: skip


class Live(TorchDispatchMode):
    """Storages that operations made and that are still alive, and the most bytes of them at once."""

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[weakref.ref, int]] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                self._see(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.storages and storage.nbytes():
            size = storage.nbytes()
            self.storages[key] = (weakref.ref(storage, lambda _, key=key: self._gone(key)), size)
            self.bytes += size

    def _gone(self, key: int) -> None:
        _, size = self.storages.pop(key, (None, 0))
        self.bytes -= size

    def alive(self) -> dict[int, int]:
        """Bytes of the storages alive, by their keys."""
        return {key: size for key, (_, size) in self.storages.items()}


def storages(tensors) -> dict[int, int]:
    """Bytes of the distinct storages behind tensors."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage._cdata] = storage.nbytes()
    return found


def make_model(case: Case, folder: Path) -> None:
    """A folder with a config.json and random weights."""
    text = dict(case.text)
    vocabulary = text["vocab_size"]
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    share = 3 * half // 8
    vision = dict(VISION[case.family])
    ids = {"image_token_id": vocabulary - 1}
    text |= dict(max_position_embeddings=1024, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    if case.family == "qwen2_5_vl":
        vision["out_hidden_size"] = text["hidden_size"]
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2 * share, share, share]}
        text["rope_parameters"] = rope
        ids |= dict(video_token_id=vocabulary - 2, vision_start_token_id=vocabulary - 3,
                    vision_end_token_id=vocabulary - 4)  # fmt: skip
    else:
        text["model_type"] = "qwen2"
    config = CONFIG_MAPPING[case.family](text_config=text, vision_config=vision, tie_word_embeddings=case.tied, **ids)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)


def make_batch(case: Case, config, micro_batch_size: int, shared: bool) -> MicroBatch:
    """A micro-batch of the case's lengths: image, words, answers; nothing in it but its shapes matters."""
    image_tokens = case.num_patches // 4
    pixels_of_patch = 3 * 2 * 14**2
    prompt = [config.image_token_id] * image_tokens + [5] * (case.prompt - image_tokens)
    layouts = [case.answers] if shared or len(case.answers) == 1 else [(answer,) for answer in case.answers]
    length = max(case.prompt + sum(layout) for layout in layouts)
    rows, pieces, branches, places, sequence = [], [], [], [], []
    sides = len(case.answers)
    for example in range(micro_batch_size):
        for number, layout in enumerate(layouts):
            row = len(rows)
            rows.append(prompt + [7] * (length - case.prompt))
            piece, branch, start = [0] * length, [0] * length, case.prompt
            for side, answer in enumerate(layout):
                before = [case.prompt - 1, *range(start, start + answer - 1)]
                places += [row * length + place for place in before]
                sequence += [(number if len(layouts) > 1 else side) * micro_batch_size + example] * answer
                branch[start : start + answer] = [side + 1] * answer
                start += answer
            piece[start:] = [-1] * (length - start)
            pieces.append(piece)
            branches.append(branch)
    ids = torch.tensor(rows)
    inputs = {"input_ids": ids}
    if case.family == "qwen2_5_vl":
        side = round(case.num_patches**0.5)
        inputs["position_ids"] = torch.arange(length).expand(4, len(rows), length).clone()
        inputs["image_grid_thw"] = torch.tensor([[1, side, side]] * len(rows))
        inputs["pixel_values"] = torch.zeros(len(rows) * case.num_patches, pixels_of_patch)
    else:
        inputs["position_ids"] = torch.arange(length).expand(len(rows), length).clone()
        inputs["pixel_values"] = torch.zeros(len(rows), 3, 112, 112)
    order = torch.tensor(sequence).argsort(stable=True)
    shares = torch.tensor([pieces, branches]) if shared and sides > 1 else None
    return MicroBatch(
        inputs, shares, torch.tensor(places)[order], torch.full((len(places),), 9), torch.tensor(sequence)[order],
        torch.ones(sides * micro_batch_size), torch.ones(micro_batch_size), tuple(range(micro_batch_size)), (),
    )  # fmt: skip


def optimizer_tensors(zero) -> list[torch.Tensor]:
    """Masters and moments."""
    masters = [parameter for group in zero.optimizer.param_groups for parameter in group["params"]]
    masters += getattr(zero, "fp32_partitioned_groups_flat", ())  # of ZeRO-3, whose groups are empty between updates
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    return masters + [value for value in states if isinstance(value, torch.Tensor)]


def measure(case: Case, folder: Path, world: World) -> dict:
    """Live bytes of the case on this rank, by category, its peak, and what it sent."""
    given = {"global_batch_size": case.ranks, **case.settings}
    settings = Settings(**given, dtype=case.dtype)
    batch = BatchArithmetic.of(settings, world.size)
    dtype, config = DTYPES[case.dtype], AutoConfig.from_pretrained(folder)
    file = read_deepspeed_file(DS_CONFIGS / f"{case.zero}.json")
    filled = fill_deepspeed_config(
        file, settings, batch, dtype, config.get_text_config().hidden_size, largest_parameter(config)
    )
    filled["comms_logger"] = {"enabled": True, "verbose": False, "prof_all": True, "debug": False}
    policy = load_policy(
        folder, dtype=dtype, attention=settings.attention, implementation="torch", deepspeed_config=filled,
        activation_checkpointing=settings.activation_checkpointing,
        adapter=settings if settings.lora_rank else None,
        sharing=join_group(world, settings.sequence_parallel_size), mlp_tiles=settings.mlp_tiles,
    )  # fmt: skip
    trained = freeze(policy, {part: getattr(settings, f"train_{part}") for part in PARTS})
    live, found = Live(), {}
    with live:
        engine = Engine(policy, filled, world, dtype, make_optimizer(policy, settings))
    logger = deepspeed.comm.comm.comms_logger
    micro_batch = make_batch(case, config, settings.micro_batch_size, settings.shared_prefix).to(world.device, dtype)
    num_sequences = len(micro_batch.weights)
    tensors = [value for value in vars(micro_batch).values() if isinstance(value, torch.Tensor)]
    inputs = set(storages([*micro_batch.inputs.values(), *tensors]))

    for update in range(3):
        measured = update == 2
        if measured:
            gc.collect()
            logger.comms_dict.clear()
            held = held_now(engine)
            found["weights"] = sum(held["weights"].values())
            found["optimizer"] = sum(held["optimizer"].values())
        live.peak = live.bytes
        with live:
            for turn in range(batch.grad_accum_steps):
                before = set(live.storages)
                logps = engine(micro_batch)
                if measured:
                    gc.collect()  # what hangs together in circles, as the frames of checkpoints do
                    new = {key: size for key, size in live.alive().items() if key not in before}
                    gathered = storages(parameter for parameter in policy.parameters() if parameter.requires_grad)
                    gathered |= storages(parameter for parameter in policy.parameters())
                    found["activations"] = sum(size for key, size in new.items() if key not in gathered)
                    found["gathered"] = sum(size for key, size in new.items() if key in gathered)
                loss = -sum_by_sequence(logps, micro_batch.sequence, num_sequences).mean()
                engine.backward(loss)
                del logps, loss
                if measured and turn == batch.grad_accum_steps - 1:
                    gc.collect()
                    aside = inputs | {key for part in held_now(engine).values() for key in part}
                    found["gradients"] = sum(size for key, size in live.alive().items() if key not in aside)
            engine.update()
        if measured:
            static = {key: size for part in held_now(engine).values() for key, size in part.items()}
            static |= storages([*micro_batch.inputs.values(), *tensors])
            tracked = set(live.storages)
            found["peak"] = live.peak + sum(size for key, size in static.items() if key not in tracked)
    sent = {}
    for operation, sizes in logger.comms_dict.items():
        sent[operation] = sum(size * values[0] for size, values in sizes.items())
    total = sum(getattr(p, "ds_numel", p.numel()) for p in policy.parameters())
    largest = max(sum(getattr(p, "ds_numel", p.numel()) for p in m.parameters(recurse=False)) for m in policy.modules())
    if case.zero == "z3":
        _, estimate, _ = estimate_zero3_model_states_mem_needs(
            total, largest, world.size, 1, cpu_offload=False, cpu_offload_params=False, zero_init=True,
            additional_buffer_factor=1.0,
        )  # fmt: skip
    else:
        _, estimate = estimate_zero2_model_states_mem_needs(total, world.size, 1, False, 1.0)
    found |= {"sent": sent, "deepspeed_estimate": estimate, "trained": sum(trained.values())}
    del micro_batch
    engine.close()
    return found


def held_now(engine: Engine) -> dict[str, dict[int, int]]:
    """Storages of weights and of the optimizer's state."""
    parameters = list(engine.policy.parameters())
    weights = storages(parameters) | storages(p.ds_tensor for p in parameters if hasattr(p, "ds_tensor"))
    optimizer = storages(optimizer_tensors(engine.deepspeed.optimizer))
    return {"weights": weights, "optimizer": {k: s for k, s in optimizer.items() if k not in weights}}


def main(folder: Path) -> None:
    """Measure the cases that job.json names, and write what this rank found."""
    quiet_transformers()
    names = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    with join_world() as world:
        for case in CASES:
            if case.name in names:
                model = folder / f"model of {case.name}"
                if world.is_main:
                    make_model(case, model)
                world.barrier()
                found = measure(case, model, world)
                (folder / f"{case.name} rank {world.rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
