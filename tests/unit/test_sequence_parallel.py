"""Ranks that share micro-batches: who gets which, whose answer tokens are whose, and what cannot be shared. (Their
updates are those of ranks apart: tests/distributed/test_gradients.py.)"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from mede2.trainer.data.sampler import Sampler
from mede2.trainer.sequence_parallel import SequenceGroup, check_sequence_parallel
from mede2.trainer.settings import BatchArithmetic
from mede2.trainer.tiled_mlp import tile_mlps


@pytest.mark.parametrize("pack_length", [0, 60])
def test_groups_get_one_micro_batch_and_count_it_once(pack_length):
    """8 ranks in groups of 4 have the micro-batches of 2 ranks, of which each counts a quarter."""
    lengths = tuple((10 + 7 * index % 40,) for index in range(22))
    apart, shared = (
        Sampler(lengths, batch, seed=5, pack_length=pack_length)
        for batch in (BatchArithmetic(8, 1, 2), BatchArithmetic(8, 1, 8, sequence_parallel_size=4))
    )
    counts = Counter()
    for step in range(shared.steps_per_epoch):
        for rank in range(8):
            micro_batches = shared.micro_batches(step, rank)
            alone = apart.micro_batches(step, rank // 4)
            assert [[slot.index for slot in micro] for micro in micro_batches] == [
                [slot.index for slot in micro] for micro in alone
            ]
            for micro in micro_batches:
                counts.update({slot.index: slot.weight for slot in micro if slot.weight})
    assert counts == dict.fromkeys(range(22), 1)


def test_batch_arithmetic_counts_groups():
    batch = BatchArithmetic(16, 2, 8, sequence_parallel_size=4)
    assert (batch.data_parallel_size, batch.grad_accum_steps) == (2, 4)
    assert str(batch) == "global batch 16 = micro-batch 2 x accumulation 4 x 2 x 4 ranks that share it"
    with pytest.raises(ValueError, match="sequence_parallel_size: 8 ranks are not groups of 3; choose a divisor"):
        BatchArithmetic(16, 1, 8, sequence_parallel_size=3)


def test_every_answer_token_is_one_ranks():
    """Two rows of 12 tokens over 3 ranks, 4 each: a rank's (2, 4) hidden states hold what the whole (2, 12) hold."""
    whole = torch.arange(24).view(2, 12)
    rows = torch.tensor([0, 3, 4, 11, 12, 15, 16, 23, 20])
    owners = []
    for rank in range(3):
        mine, places = SequenceGroup(None, rank, 3).own_rows(rows, 12)
        own = whole[:, rank * 4 : rank * 4 + 4].flatten()
        assert torch.equal(own[places], rows[mine])
        owners += mine.tolist()
    assert sorted(owners) == list(range(9))


def model(heads, keys, layers=()):
    return SimpleNamespace(num_attention_heads=heads, num_key_value_heads=keys, layer_types=layers)


@pytest.mark.parametrize(("heads", "keys", "fitting"), [(28, 4, (1, 2, 4, 28)), (64, 8, (1, 2, 4, 8, 16, 32, 64))])
def test_heads_that_ranks_can_share(heads, keys, fitting):
    for size in range(1, heads + 1):
        if size in fitting:
            check_sequence_parallel(size, "sdpa", model(heads, keys))
        else:
            possible = ", ".join(map(str, fitting))
            with pytest.raises(
                ValueError, match=f" {size} ranks cannot share .* {heads} heads with {keys} .*; possible: {possible}$"
            ):
                check_sequence_parallel(size, "sdpa", model(heads, keys))


@pytest.mark.parametrize("attention", ["eager", "flash_attention_2"])
def test_another_attention_is_refused(attention):
    with pytest.raises(ValueError, match=f"sequence_parallel_size: 2 needs attention: sdpa, not {attention}"):
        check_sequence_parallel(2, attention, model(4, 2))
    check_sequence_parallel(1, attention, model(4, 2))


@pytest.mark.parametrize("kind", ["sliding_attention", "linear_attention", "chunked_attention", "conv"])
def test_layers_that_are_not_of_full_attention_are_refused(kind):
    """Those that go along a row, as linear attention does, would go along a rank's share of it without a word."""
    with pytest.raises(ValueError, match=f"sequence_parallel_size: 2, but this model has layers of {kind}; use 1"):
        check_sequence_parallel(2, "sdpa", model(4, 2, ("full_attention", kind)))
    check_sequence_parallel(2, "sdpa", model(4, 2, ("full_attention", "full_attention")))


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4)).double()


@pytest.mark.parametrize(("tokens", "num_tiles"), [(10, 3), (12, 4), (2, 5), (0, 2)])
def test_tiles_change_no_gradient(tokens, num_tiles):
    """Fewer tokens than tiles too: every rank calls the same modules equally often, whatever rows it has."""
    torch.manual_seed(0)
    layer = Layer()
    hidden = torch.randn(2, tokens // 2, 4, dtype=torch.float64, requires_grad=True)

    def gradients() -> list[torch.Tensor]:
        inputs = (hidden, *layer.parameters())
        return torch.autograd.grad(layer.mlp(hidden).square().sum(), inputs)

    whole = gradients()
    calls = []
    layer.mlp[0].register_forward_pre_hook(lambda *_: calls.append(1))
    tile_mlps(layer, num_tiles)
    for of_tiles, of_whole in zip(gradients(), whole, strict=True):
        torch.testing.assert_close(of_tiles, of_whole, rtol=1e-12, atol=1e-12)
    assert len(calls) == 2 * num_tiles, "forward, and again in backward"


def test_an_mlp_of_experts_can_be_tiled():
    """As those of transformers, it unpacks rows, tokens and sizes."""
    layer = Layer()
    whole, shapes = layer.mlp.forward, []

    def experts(hidden: torch.Tensor) -> torch.Tensor:
        rows, tokens, size = hidden.shape
        shapes.append((rows, tokens, size))
        return whole(hidden.view(-1, size)).view(rows, tokens, size)

    layer.mlp.forward = experts
    hidden = torch.randn(2, 5, 4, dtype=torch.float64)
    tile_mlps(layer, 3)
    torch.testing.assert_close(layer.mlp(hidden), whole(hidden), rtol=1e-12, atol=1e-12)
    assert shapes == [(1, 4, 4), (1, 3, 4), (1, 3, 4)]


def test_a_model_without_mlps_is_refused():
    with pytest.raises(ValueError, match="mlp_tiles: no layer of Linear has an mlp; leave mlp_tiles out"):
        tile_mlps(torch.nn.Linear(2, 2), 2)
