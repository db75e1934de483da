"""Layers that keep less for their backward compute what transformers' do."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen3 import modeling_qwen3 as qwen3
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3_vl

from mede2.trainer.lean_layers import keep_less

HIDDEN, INNER, TOKENS = 24, 40, 11
MLPS = {
    "qwen2": (qwen2.Qwen2MLP, qwen2.Qwen2Config),
    "qwen3": (qwen3.Qwen3MLP, qwen3.Qwen3Config),
    "qwen2_5_vl": (qwen2_5_vl.Qwen2MLP, qwen2.Qwen2Config),
    "qwen3_vl": (qwen3_vl.Qwen3VLTextMLP, qwen3_vl.Qwen3VLTextConfig),
}
NORMS = (
    qwen2.Qwen2RMSNorm, qwen3.Qwen3RMSNorm, qwen2_5_vl.Qwen2_5_VLRMSNorm, qwen3_vl.Qwen3VLTextRMSNorm,
)  # fmt: skip


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


def make_mlp(name: str, dtype) -> nn.Module:
    torch.manual_seed(0)
    kind, config = MLPS[name]
    return kind(config(hidden_size=HIDDEN, intermediate_size=INNER)).to(dtype)


def make_norm(kind, dtype) -> nn.Module:
    norm = kind(HIDDEN).to(dtype)
    nn.init.normal_(norm.weight)
    return norm


def lean(module: nn.Module) -> nn.Module:
    module = copy.deepcopy(module)
    keep_less(nn.ModuleList([module]))
    assert "forward" in vars(module)
    return module


def compare(ours: nn.Module, theirs: nn.Module, dtype) -> None:
    """Outputs to the bit; gradients of the input and of what trains but for the order of sums."""
    torch.manual_seed(1)
    values, upstream = (torch.randn(2, TOKENS, HIDDEN, dtype=dtype) for _ in range(2))
    inputs = [values.clone().requires_grad_(), values.clone().requires_grad_()]
    outputs = [module(x) for module, x in zip((ours, theirs), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.backward(upstream.clone())
    wanted = {"input": inputs[1].grad} | {name: p.grad for name, p in theirs.named_parameters()}
    found = {"input": inputs[0].grad} | {name: p.grad for name, p in ours.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            scale = gradient.float().abs().max()
            assert scale > 0
            gap = (found[name].float() - gradient.float()).abs().max() / scale
            assert gap <= (1e-6 if dtype == torch.float32 else 2**-8), name


def saved_shapes(module: nn.Module, dtype) -> list[tuple[int, int]]:
    """Rows and columns of tensors kept for the backward that are neither weights nor the input."""
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = (tensor.numel() // tensor.shape[-1], tensor.shape[-1])
        return tensor

    hidden = torch.randn(1, TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(hidden)
    known = {tensor.untyped_storage().data_ptr() for tensor in (hidden, *module.parameters())}
    del output
    return sorted(shape for place, shape in found.items() if place not in known)


@pytest.mark.parametrize("name", MLPS)
def test_mlps(name, dtype):
    mlp = make_mlp(name, dtype)
    compare(lean(mlp), mlp, dtype)
    assert saved_shapes(mlp, dtype) == 4 * [(TOKENS, INNER)]
    assert saved_shapes(lean(mlp), dtype) == 2 * [(TOKENS, INNER)]


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj", ""])
def test_frozen_weights_have_no_gradient(frozen, dtype):
    mlp = make_mlp("qwen2_5_vl", dtype)
    mlp.get_submodule(frozen).requires_grad_(False)
    compare(lean(mlp), mlp, dtype)


def test_a_bias_trains(dtype):
    mlp = make_mlp("qwen2", dtype)
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = mlp.get_submodule(name)
        linear.bias = nn.Parameter(torch.randn(linear.out_features, dtype=dtype))
    compare(lean(mlp), mlp, dtype)


def test_a_down_projection_that_is_more_than_a_linear_reads_the_product(dtype):
    """As an adapter's is."""

    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mlp = make_mlp("qwen2", dtype)
    mlp.down_proj = Scaled(INNER, HIDDEN, dtype=dtype)
    compare(lean(mlp), mlp, dtype)
    assert len([shape for shape in saved_shapes(lean(mlp), dtype) if shape[-1] == INNER]) == 3


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("trains", [True, False])
def test_norms(kind, trains, dtype):
    norm = make_norm(kind, dtype).requires_grad_(trains)
    compare(lean(norm), norm, dtype)
    assert saved_shapes(lean(norm), dtype) == [(TOKENS, 1)]


def test_the_product_that_autograd_hands_over_stays_as_it_is():
    """Others may read it: here the loss has it twice."""
    mlp = make_mlp("qwen2", torch.float32)
    adapter = nn.Linear(INNER, HIDDEN)

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + adapter(x)

    mlp.down_proj = Adapted(INNER, HIDDEN, bias=False)
    compare(lean(mlp), mlp, torch.float32)


def test_others_stay_as_they_are():
    layers = nn.ModuleList([LlamaRMSNorm(HIDDEN), nn.LayerNorm(HIDDEN), nn.Linear(2, 2)])
    mlp = qwen2.Qwen2MLP(qwen2.Qwen2Config(hidden_size=HIDDEN, intermediate_size=INNER, hidden_act="gelu"))
    keep_less(nn.ModuleList([*layers, mlp]))
    assert not any("forward" in vars(module) for module in (*layers, mlp, *mlp.children()))
