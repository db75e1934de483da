"""What ZeRO-3 is spared; that its updates stay what they are is tested with its engine, in tests/distributed."""

import torch

from mede2.trainer.lean_zero3 import NORM_AT_ONCE, _flatten, _in_pieces


def test_neighbours_in_one_storage_are_one_view():
    buffer = torch.arange(10.0)
    flat = _flatten([buffer[2:4], buffer[4:5], buffer[5:9]])
    assert torch.equal(flat, buffer[2:9])
    flat.zero_()
    assert buffer.tolist() == [0.0, 1.0] + 7 * [0.0] + [9.0]


def test_others_are_copied():
    buffer = torch.arange(10.0)
    for parts in ([buffer[0:2], buffer[3:4]], [buffer[4:6], buffer[0:4]], [buffer[:2], buffer[:2].clone()]):
        flat = _flatten(parts)
        assert torch.equal(flat, torch.cat(parts))
        flat.fill_(-1.0)
        assert buffer.tolist() == list(range(10))


def test_the_norm_sees_every_value_once_with_its_parameter():
    gradients = [torch.randn(size) for size in (3, NORM_AT_ONCE, 2 * NORM_AT_ONCE + 5)]
    pieces, parameters = _in_pieces(gradients, ["a", "b", "c"])
    assert parameters == ("a", "b", "c", "c", "c")
    assert torch.equal(torch.cat(pieces), torch.cat(gradients))
    assert max(map(len, pieces)) <= NORM_AT_ONCE
