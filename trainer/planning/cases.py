"""The small configurations on which the planner's memory is compared with what is measured.

Those that are held out were chosen, with their sizes, before the model of memory was written, and are not looked at
while it is worked on.
"""

from dataclasses import dataclass, field
from typing import Any

NARROW = dict(vocab_size=8192, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
              num_key_value_heads=2)  # fmt: skip
DEEP = dict(vocab_size=4096, hidden_size=192, intermediate_size=640, num_hidden_layers=10, num_attention_heads=6,
            num_key_value_heads=3)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One run to measure.

    Attributes:
        name: says what matters.
        ranks, zero, dtype: how it is run; `zero` names a file of ds_configs/.
        settings: of the run, where they are not the defaults.
        stage: 1 or 2.
        prompt, answers: tokens, image tokens counted in the prompt; Stage II has two answers.
        num_patches: of the one image in each prompt.
        family, text, tied: of the model.
        held_out: not looked at while the model of memory is written.
        quick: part of `check --quick`.
    """

    name: str
    ranks: int
    zero: str
    dtype: str
    settings: dict[str, Any] = field(default_factory=dict)
    stage: int = 2
    prompt: int = 160
    answers: tuple[int, ...] = (96, 80)
    num_patches: int = 256
    family: str = "qwen2_5_vl"
    text: dict[str, int] = field(default_factory=lambda: NARROW)
    tied: bool = False
    held_out: bool = False
    quick: bool = False


_LORA = dict(lora_rank=8, lora_alpha=16)
CASES = (
    Case("fp32", 1, "z1", "fp32", quick=True),
    Case("bf16", 1, "z2", "bf16"),
    Case("bf16, recomputed", 1, "z3", "bf16", dict(activation_checkpointing=True)),
    Case("bf16, tied, accumulated", 2, "z1", "bf16", dict(global_batch_size=4), tied=True),
    Case("bf16, tower and merger train", 2, "z2", "bf16", dict(train_vision_tower=True, train_merger=True)),
    Case("fp32, accumulated", 2, "z3", "fp32", dict(global_batch_size=4), quick=True),
    Case("bf16, Stage I, two rows", 2, "z3", "bf16", dict(micro_batch_size=2, global_batch_size=4), stage=1,
         answers=(96,)),
    Case("fp32, LoRA, 8-bit Adam", 2, "z2", "fp32", _LORA | dict(optimizer="adamw_8bit"), quick=True),
    Case("bf16, rows shared by two ranks", 2, "z3", "bf16", dict(sequence_parallel_size=2, global_batch_size=1)),
    Case("fp32, rows shared, tiles, recomputed", 2, "z3", "fp32",
         dict(sequence_parallel_size=2, global_batch_size=1, mlp_tiles=4, activation_checkpointing=True),
         quick=True),
    Case("fp32, tiles", 2, "z2", "fp32", dict(mlp_tiles=4)),
    Case("fp32, prompts apart, two pairs", 2, "z2", "fp32",
         dict(shared_prefix=False, micro_batch_size=2, global_batch_size=4), tied=True, held_out=True),
    Case("bf16, LoRA, recomputed, Stage I", 2, "z3", "bf16",
         _LORA | dict(activation_checkpointing=True, micro_batch_size=2, global_batch_size=4), stage=1,
         prompt=192, answers=(160,), text=DEEP),
    Case("InternVL3, fp32", 1, "z3", "fp32", family="internvl", prompt=128, num_patches=64, text=DEEP, held_out=True),
)  # fmt: skip
