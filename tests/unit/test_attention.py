"""The attention of shared prompts and packed rows: span by span what the mask says, forward and backward."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from mede2.trainer.attention import Span, branch_mask, branched_attention, spans_of

HEADS, KEY_VALUE_HEADS, WIDTH = 4, 2, 8
ROWS = {  # (piece, branch, tokens) of each run of each row
    "one_pair": [[(1, 0, 7), (1, 1, 4), (1, 2, 5)]],
    "padded": [[(1, 0, 7), (1, 1, 4), (1, 2, 5)], [(1, 0, 3), (1, 1, 1), (1, 2, 1), (0, 0, 11)]],
    "packed": [[(1, 0, 5), (1, 1, 3), (1, 2, 4), (2, 0, 1), (2, 1, 2), (2, 2, 1), (3, 0, 6)]],
    "three_answers": [[(1, 0, 5), (1, 1, 3), (1, 2, 4), (1, 3, 2), (-1, 0, 4)]],
    "apart": [[(1, 0, 5), (2, 0, 6)], [(1, 0, 9), (0, 0, 2)]],
}
DEVICE = torch.device("cpu")


class Layer(nn.Module):
    """What of an attention layer transformers' sdpa looks at."""

    is_causal = True
    num_key_value_groups = HEADS // KEY_VALUE_HEADS


def laid_out(rows) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces and branches (R, T)."""
    pieces, branches = (
        torch.tensor([[run[place] for run in row for _ in range(run[2])] for row in rows]) for place in (0, 1)
    )
    return pieces, branches


def states(num_rows, length):
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_rows, heads, length, WIDTH) for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


def results(attend, pieces):
    """(R, T, heads, D), and the gradients of query, key and value, under a random upstream gradient."""
    leaves = states(*pieces.shape)
    found, weights = attend(*leaves)
    assert weights is None
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found.backward(upstream)
    return [found.detach(), *(leaf.grad for leaf in leaves)]


def gaps(spans, pieces, branches) -> list[float]:
    """Largest differences from the attention under the mask."""
    mask = branch_mask(pieces, branches, torch.float64)
    masked = results(lambda q, k, v: sdpa_attention_forward(Layer(), q, k, v, mask), pieces)
    ours = results(lambda q, k, v: branched_attention(Layer(), q, k, v, None, spans=spans), pieces)
    return [float((left - right).abs().max()) for left, right in zip(ours, masked, strict=True)]


@pytest.mark.parametrize("rows", ROWS)
def test_it_is_the_attention_under_the_mask(rows):
    pieces, branches = laid_out(ROWS[rows])
    spans = spans_of(pieces, branches, torch.float64, DEVICE)
    assert max(gaps(spans, pieces, branches)) < 1e-12


FAULTS = {
    "a_second_answer_sees_the_first": lambda span: Span(span.row, span.start, span.end - span.start, span.end, ()),
    "a_shorter_prefix": lambda span: dataclasses.replace(
        span, prefix=span.prefix - 1, masks=tuple(mask[..., 1:] for mask in span.masks)
    ),
    "an_answer_sees_what_comes_later": lambda span: dataclasses.replace(
        span, masks=tuple(torch.zeros_like(mask) for mask in span.masks)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault):
    """In the output, and in the gradients of queries, keys and values."""
    pieces, branches = laid_out(ROWS["one_pair"])
    (span,) = spans_of(pieces, branches, torch.float64, DEVICE)
    broken = FAULTS[fault](span)
    if fault == "a_second_answer_sees_the_first":
        broken = dataclasses.replace(broken, end=pieces.shape[1])
    assert min(gaps([broken], pieces, branches)) > 1e-3


def test_spans_by_hand():
    pieces, branches = laid_out([[(1, 0, 5), (1, 1, 3), (1, 2, 2), (2, 0, 4), (0, 0, 2)]])
    first, second, padding = spans_of(pieces, branches, torch.float32, DEVICE)
    assert (first.row, first.start, first.prefix, first.end) == (0, 0, 5, 8)
    assert [(mask == 0).tolist() for mask in first.masks] == [[[[[True] * 6 + [False], [True] * 7]]]]
    assert (second.start, second.prefix, second.end, second.masks) == (10, 4, 14, ())
    assert (padding.start, padding.end) == (14, 16)


def test_without_spans_it_is_plain_causal_attention():
    query, key, value = states(2, 6)
    found, _ = branched_attention(Layer(), query, key, value, None)
    keys, values = (repeat_kv(tensor, HEADS // KEY_VALUE_HEADS) for tensor in (key, value))
    scores = query @ keys.mT / WIDTH**0.5
    weights = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    torch.testing.assert_close(found, (weights @ values).transpose(1, 2), rtol=0, atol=1e-12)


def test_no_answer_meets_another():
    """By operations: a causal square of the prefix and the first answer, and a rectangle for the second, where the mask
    takes the whole square. (torch counts a causal square whole.)"""
    pieces, branches = laid_out([[(1, 0, 64), (1, 1, 16), (1, 2, 16)]])
    query, key, value = (tensor.detach() for tensor in states(1, 96))
    spans = spans_of(pieces, branches, torch.float64, DEVICE)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        branched_attention(Layer(), query, key, value, None, spans=spans)
    assert counter.get_total_flops() == 4 * HEADS * WIDTH * (80 * 80 + 16 * 80)
