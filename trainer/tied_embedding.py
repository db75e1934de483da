"""The gradient of an embedding whose weight is the head's too, in the head's gradient: no second tensor of V x H, zero
but for the rows of a few hundred tokens, beside the first."""

import torch
from torch import Tensor, nn


def join_gradients(embedding: nn.Module, head: nn.Linear) -> None:
    """Have a lookup's gradient wait for that of the head, and be added to its rows; the sum is the same to the bit.

    Does nothing where the weight is not one, or the embedding is no plain table. As autograd sums up all gradients of
    a weight before it accumulates them, whoever looks at it then, as ZeRO does, sees the whole.

    Args:
        embedding: of V tokens, called at most once in a forward, and only where the head is called too.
        head: over the same tokens.
    """
    if embedding.weight is head.weight and type(embedding) is nn.Embedding:
        embedding.forward = _Tied(embedding)


class _Tied:
    def __init__(self, embedding: nn.Embedding):
        self.embedding, self.waiting, self.hooked = embedding, [], False

    def __call__(self, ids: Tensor) -> Tensor:
        weight = self.embedding.weight
        if weight.requires_grad and not self.hooked:
            weight.register_hook(self.add)
            self.hooked = True
        return _Lookup.apply(weight, ids, self.waiting)

    def add(self, gradient: Tensor | None) -> Tensor:
        """The head's gradient (V, H), and to its rows those of the lookup, summed up by token."""
        if gradient is None:
            raise RuntimeError("an embedding has a gradient, and the head that shares its weight has none to add it to")
        while self.waiting:
            ids, of_tokens = self.waiting.pop()
            rows, places = ids.unique(return_inverse=True)
            sums = torch.ops.aten.embedding_dense_backward(of_tokens, places, len(rows), -1, False)
            if self.embedding.padding_idx is not None:  # which learns nothing
                sums[rows == self.embedding.padding_idx] = 0
            gradient.index_add_(0, rows, sums)
        return gradient


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, ids: Tensor, waiting: list) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.waiting = waiting
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, of_tokens: Tensor):
        ctx.waiting.append((*ctx.saved_tensors, of_tokens))
        return None, None, None
