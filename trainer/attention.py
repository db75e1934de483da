"""Which tokens of a row see each other when several answers share a prompt, or several examples a row. Imports
transformers."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mede2.trainer.sequence_parallel import SequenceGroup, local_heads

BRANCHED = "mede2_branched_sdpa"  # our attention's name in transformers


def branch_mask(pieces: Tensor, branches: Tensor, dtype: torch.dtype) -> Tensor:
    """The 4-D attention mask of packed rows: a token sees earlier ones of its piece, in the prefix or its own branch.

    Args:
        pieces: (R, T) int64, number of the piece that a token belongs to.
        branches: (R, T) int64, 0 in a piece's prefix, else the number of its answer.
        dtype: of the model.

    Returns:
        (R, 1, T, T), to be added to the scores: 0, or the lowest number of `dtype`. (Eager attention would add a
        boolean mask as 0 and 1 without a word, and sdpa would convert it in every layer.) Every token sees itself, so
        no row of the softmax is empty.
    """
    length = pieces.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=pieces.device).tril()
    same_piece = pieces[:, :, None] == pieces[:, None, :]
    in_view = (branches[:, None, :] == 0) | (branches[:, :, None] == branches[:, None, :])
    return _additive(~(earlier & same_piece & in_view)[:, None], dtype)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows begin at multiples of 16 bytes, or CUDA's memory-efficient attention would copy the mask in every layer."""
    length = hidden.shape[-1]
    mask = torch.zeros(*hidden.shape[:-1], -(-length // 8) * 8, dtype=dtype, device=hidden.device)[..., :length]
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Span:
    """A piece in its row: its prefix and first answer, which are one causal sequence, then its other answers.

    Attributes:
        row: of the micro-batch.
        start: of the piece in the row.
        prefix: its tokens.
        end: of the first answer; of the prefix, where there is none.
        masks: (1, 1, A, prefix + A) of each further answer, whose A tokens see the prefix and their own earlier ones.
    """

    row: int
    start: int
    prefix: int
    end: int
    masks: tuple[Tensor, ...]


def spans_of(pieces: Tensor, branches: Tensor, dtype: torch.dtype, device: torch.device) -> tuple[Span, ...]:
    """What `branch_mask` says, as spans that cover every row in order, for `branched_attention`.

    Args:
        pieces, branches: as in `branch_mask`, on the CPU; a piece's tokens lie together, its answers in order.
        dtype: of the model.
        device: of the model.
    """
    found = []
    length = pieces.shape[1]
    changes = torch.ones(pieces.shape, dtype=torch.bool)
    changes[:, 1:] = (pieces.diff() != 0) | (branches.diff() != 0)
    for row in range(len(pieces)):
        starts = changes[row].nonzero()[:, 0].tolist()
        runs = [(start, end - start, int(branches[row, start]), int(pieces[row, start]))
                for start, end in zip(starts, [*starts[1:], length], strict=True)]  # fmt: skip
        while runs:
            (start, prefix, branch, piece), *runs = runs
            assert branch == 0, "a piece begins with its prefix"
            answers = []
            while runs and runs[0][2] and runs[0][3] == piece:
                answers.append(runs.pop(0)[1])
            masks = tuple(_answer_mask(prefix, answer, dtype, device) for answer in answers[1:])
            found.append(Span(row, start, prefix, start + prefix + sum(answers[:1]), masks))
    return tuple(found)


def _answer_mask(prefix: int, answer: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    hidden = torch.ones(1, 1, answer, prefix + answer, dtype=torch.bool, device=device).triu(prefix + 1)
    return _additive(hidden, dtype)


def branched_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    spans: tuple[Span, ...] | None = None,
    sharing: SequenceGroup | None = None,
    **options,
) -> tuple[Tensor, None]:
    """sdpa as `branch_mask` would have it, but with no mask for a prefix and its first answer, and none of T x T.

    Nothing is computed across branches or pieces; what has no mask may take a flash kernel. Registered with
    transformers under the name BRANCHED.

    Args:
        module: the attention layer, causal.
        query: (R, heads, T, D).
        key, value: (R, key-value heads, T, D).
        attention_mask: of transformers, None.
        spans: from `spans_of`; None where plain causal attention is right.
        sharing: the ranks that hold T / S tokens each; `spans` are of the whole rows.
        options: of transformers' sdpa.

    Returns:
        (R, T, heads, D), and None for the weights.
    """
    if sharing is not None:
        query, key, value = sharing.to_heads(query, key, value)
        found, _ = branched_attention(local_heads(query, key), query, key, value, None, spans=spans, **options)
        return sharing.to_tokens(found), None
    if spans is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    rows: list[list[Tensor]] = [[] for _ in query]
    for span in spans:
        q, k, v = (tensor[span.row : span.row + 1] for tensor in (query, key, value))
        trunk = slice(span.start, span.end)
        found, _ = sdpa_attention_forward(module, q[:, :, trunk], k[:, :, trunk], v[:, :, trunk], None, **options)
        rows[span.row].append(found)
        start, prefix = span.end, slice(span.start, span.start + span.prefix)
        for mask in span.masks:
            own = slice(start, start + mask.shape[2])
            k_seen, v_seen = (torch.cat([t[:, :, prefix], t[:, :, own]], 2) for t in (k, v))
            rows[span.row].append(_grouped_attention(q[:, :, own], k_seen, v_seen, mask, **options))
            start = own.stop
    return torch.cat([torch.cat(row, 1) for row in rows]), None


def _grouped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, dropout: float = 0.0, scaling: float | None = None, **_
) -> Tensor:
    """sdpa of one row under a mask, (1, A, heads, D). Query heads that share a key head are a batch over it, where
    transformers' repeats keys and values for them, and keeps that for backward."""
    groups = query.shape[1] // key.shape[1]
    query = query[0].unflatten(0, (-1, groups)).transpose(0, 1)
    key, value = (tensor.expand(groups, -1, -1, -1) for tensor in (key, value))
    found = nn.functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
    return found.transpose(0, 1).flatten(0, 1).transpose(0, 1)[None]


ALL_ATTENTION_FUNCTIONS.register(BRANCHED, branched_attention)
