"""Sequence parallelism in the manner of DeepSpeed-Ulysses (arXiv 2309.14509): ranks share the tokens of a micro-batch.

All ranks of a group get the same micro-batch. Each embeds it whole, images included, and then runs the text decoder on
its own share of every row. Around attention alone, which must see whole rows, an all-to-all gives each rank all tokens
of its share of the heads. So masks, shared prefixes and packed rows are what they are on one rank.
"""

import types
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn

from mede2.trainer.heads import check_heads
from mede2.trainer.world import TIMEOUT_MINUTES, World


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share this rank's micro-batches, S of them.

    Attributes:
        group: of torch.distributed.
        rank: of this process in the group.
        size: S.
    """

    group: dist.ProcessGroup
    rank: int
    size: int

    def shard(self, language_model: nn.Module) -> None:
        """Let a language model of transformers run on this rank's share of what it is called with."""
        language_model.register_forward_pre_hook(self._cut_inputs, with_kwargs=True)

    def _cut_inputs(self, module: nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
        own = self._share(inputs["inputs_embeds"].shape[1])
        cut = {
            "inputs_embeds": inputs["inputs_embeds"][:, own].clone(),  # a view would keep the whole
            "position_ids": inputs["position_ids"][..., own],  # (R, T), or of M-RoPE (3 or 4, R, T)
        }
        if (is_image := inputs.get("visual_pos_masks")) is not None:  # (R, T); Qwen3-VL adds features in deeper layers
            in_share = torch.zeros_like(is_image)
            in_share[:, own] = is_image[:, own]
            kept = in_share[is_image]
            cut["visual_pos_masks"] = is_image[:, own]
            cut["deepstack_visual_embeds"] = [features[kept] for features in inputs["deepstack_visual_embeds"]]
        return args, inputs | cut

    def own_rows(self, rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Which of `rows` (N,), places in flattened (R, length), are this rank's: (n,) their numbers, and (n,) their
        places in its flattened (R, length / S)."""
        own = self._share(length)
        place = rows % length
        mine = ((place >= own.start) & (place < own.stop)).nonzero()[:, 0]
        return mine, (rows // length * (length // self.size) + place - own.start)[mine]

    def whole(self, values: Tensor, mine: Tensor, num_values: int) -> Tensor:
        """(num_values,) on every rank, of which `values` (n,) are those numbered `mine`.

        Each rank then computes the same loss and counts 1 / S of it (`Slot.weight`); backward adds these up.
        """
        return _Sum.apply(values.new_zeros(num_values).index_copy(0, mine, values), self.group)

    def to_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From (R, heads, T / S, D), all heads on a share of the tokens, to (R, heads / S, T, D). Of fewer than S
        key-value heads each goes to several ranks."""
        repeats = max(1, self.size // key.shape[1])
        parts = (query, *(tensor.repeat_interleave(repeats, 1) for tensor in (key, value)))
        for_rank = zip(*(part.chunk(self.size, 1) for part in parts), strict=True)
        received = self._exchange(torch.cat([part for share in for_rank for part in share], 1))
        return received.split([part.shape[1] // self.size for part in parts], 1)

    def to_tokens(self, attended: Tensor) -> Tensor:
        """From (R, T, heads / S, D) to (R, T / S, heads, D)."""
        return self._exchange(attended)

    def _exchange(self, tensor: Tensor) -> Tensor:
        """Cut dimension 1 over the ranks, and join what they give along dimension 2."""
        return torch.cat(_AllToAll.apply(torch.stack(tensor.chunk(self.size, 1)), self.group).unbind(), 2)

    def _share(self, length: int) -> slice:
        share = length // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


def join_group(world: World, size: int) -> SequenceGroup | None:
    """This rank's group, `size` consecutive ranks; None where each is alone. All ranks call it."""
    if size == 1:
        return None
    group, _ = dist.new_subgroups(size, timeout=timedelta(minutes=TIMEOUT_MINUTES))
    return SequenceGroup(group, world.rank % size, size)


def check_sequence_parallel(size: int, attention: str, text_config: transformers.PreTrainedConfig) -> None:
    """Raise ValueError for a model or an attention that groups of `size` ranks cannot share."""
    if size == 1:
        return
    if attention != "sdpa":
        raise ValueError(f"sequence_parallel_size: {size} needs attention: sdpa, not {attention}")
    if others := sorted({*(getattr(text_config, "layer_types", None) or ())} - {"full_attention"}):
        raise ValueError(f"sequence_parallel_size: {size}, but this model has layers of {', '.join(others)}; use 1")
    check_heads(size, text_config.num_attention_heads, text_config.num_key_value_heads)


def local_heads(query: Tensor, key: Tensor) -> types.SimpleNamespace:
    """What transformers' sdpa asks of an attention layer, for the heads of one rank."""
    return types.SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)


class _AllToAll(torch.autograd.Function):
    """(S, ...): part s goes to rank s of the group, and the parts of the ranks come back in their order."""

    @staticmethod
    def forward(ctx, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradient.contiguous(), ctx.group), None


class _Sum(torch.autograd.Function):
    """The sum over the group; its gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(gradient, ctx.group), None
