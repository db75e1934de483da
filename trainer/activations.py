"""What checkpointed layers keep for backward waits in host memory."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Offload:
    """Between forward and backward the inputs of a model's checkpointed layers are in host memory (pinned, on CUDA).

    They pass hooks on what autograd saves, which are set around the call of torch's checkpoint and hidden inside it by
    its own. So nothing else comes by: no parameter, which ZeRO-3 frees and gathers again, and nothing recomputed. The
    stream that computes does the copies too, in order; none is read before it is written.

    Args:
        model: after `gradient_checkpointing_enable`, not reentrant.

    Attributes:
        bytes_moved: to the host so far.

    Raises:
        ValueError: no layer of the model can be checkpointed.
    """

    def __init__(self, model: nn.Module):
        self.bytes_moved = 0
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        if not layers:
            raise ValueError(f"activation_offload: no layer of {type(model).__name__} can be checkpointed")
        for layer in layers:
            layer._gradient_checkpointing_func = partial(self._checkpoint, layer._gradient_checkpointing_func)

    def _checkpoint(self, checkpoint, function, *inputs):
        if not any(isinstance(value, Tensor) and value.requires_grad for value in inputs):  # of a frozen tower
            return checkpoint(function, *inputs)
        with saved_tensors_hooks(self._to_host, _from_host):
            return checkpoint(function, *inputs)

    def _to_host(self, tensor: Tensor) -> tuple[torch.device, Tensor]:
        self.bytes_moved += tensor.nbytes
        kept = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return tensor.device, kept.copy_(tensor, non_blocking=True)


def _from_host(packed: tuple[torch.device, Tensor]) -> Tensor:
    device, kept = packed
    return kept.to(device, non_blocking=True)
