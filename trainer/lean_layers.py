"""Decoder layers that keep less for their backward: not what is cheap to compute again from what is kept anyway.

The forward is transformers' to the bit. Of an MLP with a gate stay the gate and the other factor, not the gate's
activation and the product; of an RMSNorm stays the input as it came, not its copy in fp32 and the normalized values.
That costs no matrix product, and is what fused kernels spare too.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import SiLUActivation
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm  # of InternVL3's language model
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm  # of InternVL3.5's
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

MLPS = (Qwen2MLP, Qwen3MLP, qwen2_5_vl.Qwen2MLP, qwen3_vl.Qwen3VLTextMLP)
NORMS = (Qwen2RMSNorm, Qwen3RMSNorm, qwen2_5_vl.Qwen2_5_VLRMSNorm, qwen3_vl.Qwen3VLTextRMSNorm)


def keep_less(language_model: nn.Module) -> None:
    """Replace the forwards of the layers that are known here; others stay as they are.

    Args:
        language_model: with its adapter, if it has one.
    """
    for module in language_model.modules():
        if isinstance(module, MLPS) and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
            if type(module.down_proj) is nn.Linear:
                module.down_proj.forward = _Down(module.down_proj)
            module.forward = _GatedMLP(module)
        elif isinstance(module, NORMS):
            module.forward = _Norm(module)


class _GatedMLP:
    def __init__(self, mlp: nn.Module):
        self.mlp = mlp

    def __call__(self, hidden: Tensor) -> Tensor:
        mlp = self.mlp
        gate, up = mlp.gate_proj(hidden), mlp.up_proj(hidden)
        if isinstance(mlp.down_proj.forward, _Down):
            return mlp.down_proj(gate, up)
        return mlp.down_proj(_Product.apply(gate, up))


class _Down:
    """The forward of a down projection, which takes its input's two factors; called by the module, as ZeRO-3's hooks
    gather the weight around that."""

    def __init__(self, linear: nn.Linear):
        self.linear = linear

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor:
        return _DownProduct.apply(gate, up, self.linear.weight, self.linear.bias)


class _Norm:
    def __init__(self, norm: nn.Module):
        self.norm = norm

    def __call__(self, hidden: Tensor) -> Tensor:
        return _RMSNorm.apply(hidden, self.norm.weight, self.norm.variance_epsilon)


def _product(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate).mul_(up)


def _factors(grad_product: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the gate and of the other factor; the product's is overwritten."""
    grad_up = nn.functional.silu(gate).mul_(grad_product)
    return torch.ops.aten.silu_backward(grad_product.mul_(up), gate), grad_up


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_product: Tensor):
        return _factors(grad_product.clone(), *ctx.saved_tensors)


class _DownProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return nn.functional.linear(_product(gate, up), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up, weight = ctx.saved_tensors
        needs_gate, needs_up, needs_weight, needs_bias = ctx.needs_input_grad
        grad_rows = grad.flatten(0, -2)
        grad_weight = grad_rows.t() @ _product(gate, up).flatten(0, -2) if needs_weight else None
        grad_gate, grad_up = _factors(grad @ weight, gate, up) if needs_gate or needs_up else (None, None)
        return grad_gate, grad_up, grad_weight, grad_rows.sum(0) if needs_bias else None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (wide * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        hidden, weight, scale = ctx.saved_tensors
        needs_hidden, needs_weight, _ = ctx.needs_input_grad
        normalized = hidden.float() * scale
        grad_weight = grad_hidden = None
        if needs_weight:
            grad_weight = (grad * normalized.to(hidden.dtype)).flatten(0, -2).sum(0)
        if needs_hidden:
            inner = (grad * weight).float()
            along = (inner * normalized).mean(-1, keepdim=True)
            grad_hidden = (inner - normalized.mul_(along)).mul_(scale).to(hidden.dtype)
        return grad_hidden, grad_weight, None
