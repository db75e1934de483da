"""The gradient of a tied embedding is that of autograd, to the bit."""

import copy

import pytest
import torch
from torch import nn

from mede2.trainer.tied_embedding import join_gradients

TOKENS, HIDDEN = 50, 8


class Model(nn.Module):
    def __init__(self, padding: int | None = None, tied: bool = True, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, HIDDEN, padding_idx=padding, dtype=dtype)
        self.middle = nn.Linear(HIDDEN, HIDDEN, dtype=dtype)
        self.head = nn.Linear(HIDDEN, TOKENS, bias=False, dtype=dtype)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, use_head=True):
        hidden = self.middle(self.embedding(ids)).tanh()
        logits = self.head.weight @ hidden.flatten(0, 1).t()  # as its gradient is laid out like the weight
        return (logits if use_head else hidden).float().square().sum()


def joined(model: Model) -> Model:
    model = copy.deepcopy(model)
    join_gradients(model.embedding, model.head)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("padding", [None, 3])
def test_repeated_tokens_and_several_backwards(dtype, padding):
    model = Model(padding, dtype=dtype)
    ours = joined(model)
    for ids in (torch.tensor([[3, 7, 7, 3, 49, 0, 7]]), torch.tensor([[1, 3], [3, 1]])):
        for m in (model, ours):
            m(ids).backward()
        assert model.embedding.weight.grad.abs().max() > 0
        for one, other in zip(model.parameters(), ours.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


def test_no_second_gradient_of_its_size_is_made():
    ours, made = joined(Model()), []
    ours.embedding.weight.register_post_accumulate_grad_hook(lambda weight: made.append(weight.grad))

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == (TOKENS, HIDDEN) and "detach" not in str(function):
                storages.add(result.untyped_storage().data_ptr())
            return result

    loss, storages = ours(torch.tensor([[1, 2, 1]])), set()
    with Count():
        loss.backward()
    assert storages == {made[0].untyped_storage().data_ptr()}


def test_frozen_untied_and_unknown_embeddings_are_left_alone():
    frozen = Model()
    frozen.embedding.weight.requires_grad_(False)
    ours = joined(frozen)
    ours(torch.tensor([[1, 2]])).backward()
    assert ours.embedding.weight.grad is None
    assert ours.middle.weight.grad is not None
    assert "forward" not in vars(joined(Model(tied=False)).embedding)

    class Scaled(nn.Embedding):
        pass

    model = Model()
    model.embedding = Scaled(TOKENS, HIDDEN)
    model.head.weight = model.embedding.weight
    assert "forward" not in vars(joined(model).embedding)


def test_a_gradient_without_the_heads_is_not_lost_in_silence():
    ours = joined(Model())
    with pytest.raises(RuntimeError, match="the head that shares its weight has none"):
        ours(torch.tensor([[1, 2]]), use_head=False).backward()
