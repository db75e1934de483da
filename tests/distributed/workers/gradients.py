"""One update of many configurations: its loss, its gradient norm and the gradients that the optimizer got."""

import torch
from harness import applied_gradients, main, make_batches, make_engine, make_settings, no_hook

from mede2.trainer.data.batches import Batches, Totals
from mede2.trainer.loop import train
from mede2.trainer.objectives import Enhance, elicit
from mede2.trainer.settings import ELICIT
from mede2.trainer.world import World

EVERY_PART = {"train_language_model": True, "train_vision_tower": True, "train_merger": True}
SMALL = EVERY_PART | {"global_batch_size": 4}
RECOMPUTED = EVERY_PART | {"activation_checkpointing": True, "micro_batch_size": 2}
SHARED = {"sequence_parallel_size": 2}
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "internvl3")
MDPO = {"objective": {"sigmoid": 1.0, "image_conditional": 0.5, "anchor": 0.25}, "corruption": "blank"}
# name: model, records, stage, ZeRO file, settings beyond the usual
CASES = {
    "elicit": ("tied", "texts", 1, "z3", {}),
    "elicit_mixed": ("tied", "mixed", 1, "z3", {"micro_batch_size": 2}),
    "enhance": ("tied", "pairs", 2, "z3", {}),
    "enhance_micro_2": ("tied", "pairs", 2, "z3", {"micro_batch_size": 2}),
    "enhance_micro_4": ("tied", "pairs", 2, "z3", {"micro_batch_size": 4}),
    "enhance_every_part": ("tied", "pairs", 2, "z3", EVERY_PART),
    "enhance_recomputed": ("tied", "pairs", 2, "z3", RECOMPUTED),
    "enhance_offloaded": ("tied", "pairs", 2, "z3", RECOMPUTED | {"activation_offload": True}),
    "enhance_untied": ("untied", "pairs", 2, "z3", {"micro_batch_size": 4}),
    "enhance_z1": ("tied", "pairs", 2, "z1", {"micro_batch_size": 4}),
    "enhance_z2": ("tied", "pairs", 2, "z2", {}),
    "enhance_z2_untied": ("untied", "pairs", 2, "z2", {"micro_batch_size": 4}),
    "enhance_z3_offload": ("tied", "pairs", 2, "z3_offload", {"micro_batch_size": 2}),
    "enhance_clipped": ("tied", "pairs", 2, "z3", {"max_grad_norm": 1e-2, "micro_batch_size": 4}),
    "enhance_triton": ("tied", "pairs", 2, "z3", {"logps": "triton", "micro_batch_size": 4}),
    "enhance_triton_untied": ("untied", "pairs", 2, "z3", {"logps": "triton", "micro_batch_size": 4}),
    "enhance_triton_bf16": ("tied", "pairs", 2, "z3", {"logps": "triton", "dtype": "bf16", "micro_batch_size": 4}),
    "enhance_apart": ("tied", "pairs", 2, "z3", {"shared_prefix": False, "micro_batch_size": 2}),
    "enhance_packed": ("tied", "pairs", 2, "z3", EVERY_PART | {"pack_length": 200}),
    "enhance_packed_apart": ("tied", "pairs", 2, "z3", {"pack_length": 400, "shared_prefix": False}),
    "enhance_packed_triton": ("tied", "pairs", 2, "z3", {"pack_length": 1000, "logps": "triton"}),
    "elicit_packed": ("tied", "mixed", 1, "z3", {"pack_length": 130, "num_workers": 2}),
    "mdpo": ("tied", "pairs", 2, "z3", MDPO | {"micro_batch_size": 2}),
    "mdpo_packed": ("tied", "pairs", 2, "z3", MDPO | {"pack_length": 300}),
    "enhance_bf16": ("tied", "pairs", 2, "z3", {"dtype": "bf16", "micro_batch_size": 4}),
    "elicit_shared": ("tied", "mixed", 1, "z3", SHARED | {"micro_batch_size": 2}),
    "enhance_shared": ("tied", "pairs", 2, "z3", SHARED | EVERY_PART),
    "enhance_shared_apart": ("tied", "pairs", 2, "z2", SHARED | {"shared_prefix": False, "micro_batch_size": 2}),
    "enhance_shared_packed": ("untied", "pairs", 2, "z3", SHARED | {"pack_length": 1000}),
    "enhance_shared_recomputed": ("tied", "pairs", 2, "z3", SHARED | RECOMPUTED | {"mlp_tiles": 3}),
    "mdpo_shared": ("tied", "pairs", 2, "z3", SHARED | MDPO | {"pack_length": 300}),
    "enhance_tiled": ("tied", "pairs", 2, "z3", EVERY_PART | {"mlp_tiles": 3}),
    "enhance_one_key": ("one_key", "pairs", 2, "z3", SHARED | {"micro_batch_size": 2}),
    **{family: (family, "pairs", 2, "z3", SMALL) for family in FAMILIES},
    **{f"{family}_shared": (family, "pairs", 2, "z3", SMALL | SHARED) for family in FAMILIES},
}


class LocalTotals(Batches):
    """The bug that the gradient tests must catch: denominators of this rank's own rows."""

    def totals(self, step: int) -> Totals:
        slots = [slot for group in self.sampler.micro_batches(step, self.world.rank) for slot in group if slot.weight]
        examples = [self.dataset.examples[slot.index] for slot in slots]
        return Totals(
            num_examples=len(examples),
            num_with_image=sum(bool(example.images) for example in examples),
            num_answer_tokens=sum(example.sequences[0].num_answer_tokens for example in examples),
            num_tokens=super().totals(step).num_tokens,
        )


def one_update(world: World, job: dict, case: str, batches_type: type[Batches] = Batches) -> dict:
    model, records, stage, zero, values = CASES[case]
    settings = make_settings(stage, **values)
    usual = make_batches(world, job["models"][model], job["records"][records], stage, settings)
    batches = batches_type(usual.dataset, usual.sampler, usual.collator, usual.world, usual.num_workers)
    objective = elicit
    if stage != ELICIT:
        num_sides = 3 if settings.corruption else 2
        objective = Enhance(settings, torch.tensor(job["reference"], dtype=torch.float64)[:, :num_sides])
    engine = make_engine(world, job["models"][model], settings, zero)
    result = {"decoder_tokens": [], "mlp_tokens": []}  # of every call
    layer = engine.policy.model.model.language_model.layers[0]
    layer.register_forward_pre_hook(lambda _, inputs: result["decoder_tokens"].append(inputs[0].shape[1]))
    layer.mlp.gate_proj.register_forward_pre_hook(lambda _, inputs: result["mlp_tokens"].append(inputs[0].shape[-2]))

    def keep(step: int, metrics: dict[str, float]) -> None:
        result.update(metrics=dict(metrics), gradients=applied_gradients(engine))

    train(
        engine, objective, batches.feed(range(1)), settings, num_steps=1, before_update=no_hook, after_update=keep
    )  # fmt: skip
    pixels = [part.inputs.get("pixel_values", torch.zeros(1)) for part in batches.micro_batches(0)]
    offload = getattr(engine.policy, "offload", None)
    result["bytes_offloaded"] = offload.bytes_moved if offload else 0
    optimizer = engine.deepspeed.optimizer
    if engine.deepspeed.zero_optimization_stage() == 3:
        flats = zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True)
        result["own_masters"] = [weights.data_ptr() == master.data_ptr() for weights, master in flats]
    engine.close()
    return result | {"micro_batches_with_image": [bool(values.any()) for values in pixels]}


SCENARIOS = {case: lambda world, job, case=case: one_update(world, job, case) for case in CASES}
SCENARIOS |= {
    f"{case}_local_totals": lambda world, job, case=case: one_update(world, job, case, LocalTotals)
    for case in ("elicit", "enhance")
}

if __name__ == "__main__":
    main(SCENARIOS)
