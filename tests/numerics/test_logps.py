"""linear_logps against an fp64 reference: values, gradients, memory, work, determinism and its error messages.

The Triton kernels run in Triton's interpreter (conftest.py asks for it), on the CPU.

Legend: N token rows, H hidden size, V vocabulary; U = 2NVH operations.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mede2.kernels import logps_torch, logps_triton
from mede2.kernels.logps import IGNORE_INDEX, IMPLEMENTATIONS, choose_implementation, linear_logps

eager = partial(linear_logps, implementation="reference")

# How far our error against fp64 may exceed that of eager PyTorch in the same dtype. Errors are the largest difference
# over the largest exact magnitude. A gradient may be off by one more unit of rounding in bf16, half a one in fp16, and
# four in fp32.
EXCESS_ERROR = {
    torch.float64: dict.fromkeys(("logps", "entropy", "hidden", "weight", "bias"), 1e-14),
    torch.float32: dict.fromkeys(("logps", "entropy", "hidden", "weight", "bias"), 5e-7),
    torch.float16: {"logps": 2e-4, "entropy": 2e-4, "hidden": 5e-4, "weight": 5e-4, "bias": 5e-4},
    torch.bfloat16: {"logps": 1e-3, "entropy": 1e-3, "hidden": 4e-3, "weight": 4e-3, "bias": 4e-3},
}
SHAPES = [(1, 1, 1), (7, 13, 101), (64, 32, 512), (252, 123, 507)]


def make_inputs(shape, dtype=torch.float32, *, ignored=0.0, with_bias=True, seed=0):
    """Leaf tensors of one case and the (N,) gradient that comes in; the part `ignored` of the rows is masked."""
    num_rows, hidden_size, num_vocab = shape
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, hidden_size, generator=generator).to(dtype).requires_grad_()
    weight = (2 * torch.randn(num_vocab, hidden_size, generator=generator) / math.sqrt(hidden_size)).to(dtype)
    bias = torch.randn(num_vocab, generator=generator).to(dtype).requires_grad_() if with_bias else None
    targets = torch.randint(num_vocab, (num_rows,), generator=generator)
    targets[torch.randperm(num_rows, generator=generator)[: round(ignored * num_rows)]] = IGNORE_INDEX
    upstream = torch.randn(num_rows, generator=generator)
    return hidden, weight.requires_grad_(), targets, bias, upstream


def run(hidden, weight, targets, bias, upstream, function=linear_logps, **options):
    """Log-probabilities and every gradient, by name, computed from fresh leaves that keep the inputs' strides. With
    entropies, their sum is minimized too."""
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    leaves = {
        name: leaf.detach().requires_grad_(leaf.requires_grad) for name, leaf in leaves.items() if leaf is not None
    }
    results = function(leaves["hidden"], leaves["weight"], targets, bias=leaves.get("bias"), **options)
    values = dict(zip(("logps", "entropy"), results if isinstance(results, tuple) else (results,), strict=False))
    loss = (values["logps"] * upstream.to(values["logps"].dtype)).sum()
    (loss + values["entropy"].sum() if "entropy" in values else loss).backward()
    return {name: value.detach() for name, value in values.items()} | {n: leaf.grad for n, leaf in leaves.items()}


def run_fp64(hidden, weight, targets, bias, upstream, **options):
    doubles = [tensor if tensor is None else tensor.detach().double() for tensor in (hidden, weight, bias)]
    for original, double in zip((hidden, weight, bias), doubles, strict=True):
        if double is not None:
            double.requires_grad_(original.requires_grad)
    return run(doubles[0], doubles[1], targets, doubles[2], upstream, eager, **options)


def error(value, exact):
    if exact.numel() == 0:
        return 0.0
    return ((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)).item()


def assert_as_exact_as_eager(inputs, function=linear_logps, **options):
    dtype = inputs[0].dtype
    ours, theirs = run(*inputs, function, **options), run(*inputs, eager, **options)
    exact = run_fp64(*inputs, **options)
    for name, tolerance in EXCESS_ERROR[dtype].items():
        if name in exact:
            our_error, eager_error = error(ours[name], exact[name]), error(theirs[name], exact[name])
            assert our_error <= eager_error + tolerance, f"{name}: {our_error:.3g}, eager {eager_error:.3g}"


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def chunks_of(monkeypatch):
    """`chunks_of(size)`: vocabulary rows in a chunk, of every implementation."""

    def patch(size: int) -> None:
        for module in (logps_torch, logps_triton):
            monkeypatch.setattr(module, "chunk_size", lambda *_: size)

    return patch


@pytest.fixture(params=["torch", "triton"])
def ours(request):
    return partial(linear_logps, implementation=request.param)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hand_computed(implementation):
    """H = 1, weight (0, log 3): the probabilities of the two words are 1/4 and 3/4 for hidden 1."""
    hidden, weight = torch.ones(2, 1), torch.tensor([[0.0], [math.log(3)]])
    logps = linear_logps(hidden, weight, torch.tensor([0, 1]), implementation=implementation)
    torch.testing.assert_close(logps, torch.tensor([math.log(1 / 4), math.log(3 / 4)]))
    with_bias = linear_logps(
        hidden, weight, torch.tensor([0, 1]), bias=torch.tensor([math.log(3), 0.0]), implementation=implementation
    )
    torch.testing.assert_close(with_bias, torch.full((2,), math.log(1 / 2)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.6])
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_as_exact_as_eager(shape, ignored, with_bias, dtype, chunks_of):
    chunks_of(100)
    assert_as_exact_as_eager(make_inputs(shape, dtype, ignored=ignored, with_bias=with_bias))


@pytest.mark.parametrize("shape", [*SHAPES, (37, 72, 4099)], ids=str)
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_triton_as_exact_as_eager(shape, ignored, dtype, chunks_of):
    chunks_of(300)
    assert_as_exact_as_eager(make_inputs(shape, dtype, ignored=ignored), partial(linear_logps, implementation="triton"))


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"with_entropy": True}, {"softcap": 5.0, "with_entropy": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap_and_entropy(options, dtype, ours, chunks_of):
    chunks_of(100)
    inputs = make_inputs((37, 24, 301), dtype, ignored=0.3)
    assert_as_exact_as_eager(inputs, ours, **options)
    if "with_entropy" in options:
        entropy = run(*inputs, ours, **options)["entropy"]
        counted = inputs[2] != IGNORE_INDEX
        assert not entropy[~counted].any()
        assert (entropy[counted] > 0).all()
        assert (entropy <= math.log(301)).all()


def test_entropy_by_hand(ours):
    """Probabilities 1/4 and 3/4, then 1/2 and 1/2."""
    hidden, weight = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [math.log(3)]])
    _, entropy = ours(hidden, weight, torch.tensor([0, 1]), with_entropy=True)
    by_hand = [math.log(4) - 0.75 * math.log(3), math.log(2)]
    torch.testing.assert_close(entropy, torch.tensor(by_hand))


def test_probabilities_of_the_whole_vocabulary_sum_to_one(ours):
    hidden, weight, _, bias, _ = make_inputs((3, 13, 507))
    every = torch.arange(507).repeat(3)
    logps = ours(hidden.repeat_interleave(507, 0), weight, every, bias=bias).view(3, 507)
    torch.testing.assert_close(logps.exp().sum(1), torch.ones(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("product_dtype", [torch.float32, None], ids=["widened", "native"])
def test_half_precision_both_ways(shape, dtype, product_dtype, chunks_of, monkeypatch):
    """The products widened, as on a plain CPU, and in the inputs' own dtype, as on CUDA, whatever this CPU picks."""
    monkeypatch.setattr(logps_torch, "product_dtype", lambda hidden: product_dtype or hidden.dtype)
    chunks_of(100)
    inputs = make_inputs(shape, dtype, ignored=0.3)
    assert_as_exact_as_eager(inputs)
    results = run(*inputs)
    assert results.pop("logps").dtype == torch.float32
    assert {gradient.dtype for gradient in results.values()} == {dtype}


@pytest.mark.parametrize("size", [1, 37, 50, 100, 101, 102])
def test_chunk_boundaries(size, ours, chunks_of):
    chunks_of(size)
    dtype = torch.float64 if ours.keywords["implementation"] == "torch" else torch.float32  # Triton's widest
    inputs = make_inputs((7, 13, 101), dtype)
    inputs[2][:5] = torch.tensor([0, size - 1, size, 99, 100]).clamp(max=100)
    assert_as_exact_as_eager(inputs, ours)


@pytest.mark.parametrize("product_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hidden_gradient_is_summed_in_fp32(product_dtype, chunks_of, monkeypatch):
    """128 chunks: a sum rounded to bf16 after each would be several units off."""
    monkeypatch.setattr(logps_torch, "product_dtype", lambda hidden: product_dtype)
    chunks_of(4)
    assert_as_exact_as_eager(make_inputs((64, 32, 512), torch.bfloat16))


def test_chunk_size_follows_the_budget():
    assert logps_torch.chunk_size(1024, 512, 4, 4) == logps_torch.CHUNK_BYTES // (1024 * 4 + 2 * 512 * 4) == 4096
    assert logps_torch.chunk_size(10**6, 512, 6, 4) == logps_torch.MIN_CHUNK
    assert logps_torch.chunk_size(0, 0, 4, 4) == logps_torch.CHUNK_BYTES


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_rows", [0, 5])
def test_no_counted_rows_gives_zero_gradients(num_rows, implementation):
    hidden, weight, targets, bias, upstream = make_inputs((num_rows, 13, 101), ignored=1.0)
    logps = linear_logps(hidden, weight, targets, bias=bias, implementation=implementation)
    logps.backward(upstream)
    torch.testing.assert_close(logps, torch.zeros(num_rows), rtol=0, atol=0)
    for leaf in (hidden, weight, bias):
        torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ignored_rows_are_never_read(implementation):
    inputs = make_inputs((7, 13, 101), ignored=0.6)
    counted = inputs[2] != IGNORE_INDEX
    with torch.no_grad():
        inputs[0][~counted] = math.nan
    results = run(*inputs, lambda *args, **kwargs: linear_logps(*args, **kwargs, implementation=implementation))
    assert not results["logps"][~counted].any()
    assert not results["hidden"][~counted].any()
    kept = run(inputs[0][counted], inputs[1], inputs[2][counted], inputs[3], inputs[4][counted])
    torch.testing.assert_close(results["logps"][counted], kept["logps"])
    torch.testing.assert_close(results["weight"], kept["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("product_dtype", [torch.float32, None], ids=["widened", "native"])
def test_extreme_logits(dtype, product_dtype, ours, chunks_of, monkeypatch):
    monkeypatch.setattr(logps_torch, "product_dtype", lambda hidden: product_dtype or hidden.dtype)
    chunks_of(256)
    hidden, weight, targets, bias, upstream = make_inputs((7, 13, 507), dtype)
    with torch.no_grad():
        hidden *= 1e4 / (hidden.float() @ weight.float().t()).abs().max()
    targets[:3] = F.linear(hidden.double(), weight.double(), bias.double()).argmax(1)[:3]
    inputs = hidden, weight, targets, bias, upstream
    assert_as_exact_as_eager(inputs, ours)
    results = run(*inputs, ours)
    assert run(*inputs, ours, with_entropy=True)["entropy"].min() >= 0
    assert all(value.isfinite().all() for value in results.values())
    assert results["logps"].max() <= 0
    assert results["logps"].min() < -5e3


def test_vocabulary_masked_by_infinite_bias(ours, chunks_of):
    """Padded vocabulary rows are often given -inf; here they fill the first chunk and part of the next."""
    chunks_of(25)
    hidden, weight, targets, _, upstream = make_inputs((7, 13, 101))
    bias = torch.zeros(101)
    bias[:30] = -math.inf
    targets = targets.clamp(min=30)
    masked = run(hidden, weight, targets, bias, upstream, ours, with_entropy=True)
    without = run(hidden, weight[30:], targets - 30, None, upstream, ours, with_entropy=True)
    for name in ("logps", "entropy", "hidden"):
        torch.testing.assert_close(masked[name], without[name])
    torch.testing.assert_close(masked["weight"], F.pad(without["weight"], (0, 0, 30, 0)))


def test_gradcheck(chunks_of):
    chunks_of(7)
    hidden, weight, targets, bias, _ = make_inputs((6, 4, 17), torch.float64, ignored=0.4)
    for options in ({}, {"softcap": 1.5}, {"with_entropy": True}, {"softcap": 1.5, "with_entropy": True}):
        function = partial(linear_logps, targets=targets, **options)
        assert torch.autograd.gradcheck(lambda h, w, b: function(h, w, bias=b), (hidden, weight, bias))  # noqa: B023


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
def test_partial_gradients(trained, ours, chunks_of):
    """A frozen argument gets None, and the others the same bits as when all are trained."""
    chunks_of(37)
    inputs = make_inputs((7, 13, 101), ignored=0.3)
    expected = run(*inputs, ours)
    for name, leaf in {"hidden": inputs[0], "weight": inputs[1], "bias": inputs[3]}.items():
        leaf.requires_grad_(name in trained)
    results = run(*inputs, ours)
    for name in ("hidden", "weight", "bias"):
        assert torch.equal(results[name], expected[name]) if name in trained else results[name] is None


def test_repeated_targets(ours, chunks_of):
    chunks_of(37)
    inputs = make_inputs((64, 32, 101))
    inputs[2][:] = 40
    assert_as_exact_as_eager(inputs, ours)


def test_ties(ours):
    """Every word as likely as any other."""
    logps = ours(torch.zeros(5, 13), torch.randn(101, 13), torch.arange(5))
    torch.testing.assert_close(logps, torch.full((5,), -math.log(101)))


def test_non_contiguous_inputs(ours, chunks_of):
    chunks_of(37)
    hidden, weight, targets, bias, upstream = make_inputs((14, 26, 101))
    inputs = hidden[::2, ::2].detach(), weight[:, 1::2].detach(), targets[::2], bias.detach(), upstream[::2]
    for tensor in (inputs[0], inputs[1], inputs[3]):
        tensor.requires_grad_()
        assert tensor is inputs[3] or not tensor.is_contiguous()
    assert_as_exact_as_eager(inputs, ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_twice(dtype, ours, chunks_of):
    chunks_of(100)
    inputs = make_inputs((252, 123, 507), dtype, ignored=0.5)
    first, second = run(*inputs, ours), run(*inputs, ours)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_autocast_changes_nothing(chunks_of):
    chunks_of(37)
    inputs = make_inputs((7, 13, 101))
    expected = run(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = run(*inputs)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_autocast_is_off_inside_the_reference_too():
    hidden, weight, targets, bias, _ = make_inputs((7, 13, 101))
    expected = linear_logps(hidden, weight, targets, bias=bias, implementation="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logps(hidden, weight, targets, bias=bias, implementation="reference"), expected)


class LargestTensor(TorchDispatchMode):
    """Records the element count of the largest tensor that any operation returns; bytes, which Triton's interpreter
    copies storages as, do not count."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *(tensor.numel() for tensor in tensors if tensor.dtype != torch.uint8)])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tensor_of_rows_by_vocabulary(dtype, ours, chunks_of):
    """Nothing is larger than the weight or one chunk of logits; the eager way trips the same check."""
    num_rows, hidden_size, num_vocab = shape = (96, 16, 2048)
    chunks_of(128)
    inputs = make_inputs(shape, dtype)
    with LargestTensor() as blocked:
        run(*inputs, ours)
    assert blocked.numel == max(num_vocab * hidden_size, num_rows * 128)
    with LargestTensor() as whole:
        run(*inputs, eager)
    assert whole.numel == num_rows * num_vocab


@pytest.mark.parametrize(
    ("trained", "backward_units"), [(("hidden", "weight"), 3), (("hidden",), 2), (("weight",), 2)], ids=str
)
@pytest.mark.parametrize("ignored", [0.0, 0.75])
def test_work_in_units(trained, backward_units, ignored, chunks_of):
    """Forward 1 U and backward at most 3 U over the counted rows alone; what is frozen is not computed."""
    chunks_of(100)
    hidden, weight, targets, _, upstream = make_inputs((64, 32, 512), ignored=ignored)
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    unit = 2 * round(64 * (1 - ignored)) * 32 * 512
    with FlopCounterMode(display=False) as forward:
        logps = linear_logps(hidden, weight, targets)
    with FlopCounterMode(display=False) as backward:
        logps.backward(upstream)
    assert forward.get_total_flops() == unit
    assert backward.get_total_flops() == backward_units * unit


def test_parameter_may_be_freed_between_forward_and_backward(ours):
    """ZeRO-3 frees the gathered weight after the forward and gathers it anew, so nothing may hold the old storage."""
    inputs = make_inputs((7, 13, 101))
    expected = run(*inputs, ours)
    hidden, weight, targets, bias, upstream = inputs
    weight, bias = torch.nn.Parameter(weight.detach().clone()), torch.nn.Parameter(bias.detach().clone())
    logps = ours(hidden, weight, targets, bias=bias)
    for parameter in (weight, bias):
        gathered, freed = parameter.detach().clone(), parameter.data
        parameter.data = torch.empty(0)
        freed.fill_(math.nan)
        parameter.data = gathered
    logps.backward(upstream)
    assert torch.equal(weight.grad, expected["weight"])
    assert torch.equal(hidden.grad, expected["hidden"])
    assert torch.equal(bias.grad, expected["bias"])


def test_weight_tied_with_embedding(chunks_of):
    chunks_of(37)
    _, weight, targets, _, upstream = make_inputs((7, 13, 101), torch.float64)
    tokens = torch.tensor([0, 3, 3, 50, 100, 7, 0])

    def gradient(function):
        tied = weight.detach().clone().requires_grad_()
        function(torch.tanh(F.embedding(tokens, tied)), tied, targets).backward(upstream.double())
        return tied.grad

    torch.testing.assert_close(gradient(linear_logps), gradient(eager))


def test_choice_of_implementation():
    assert choose_implementation() == choose_implementation("auto") == "torch"
    assert choose_implementation("reference") == "reference"
    assert choose_implementation("auto", "cuda", torch.bfloat16) == "triton"
    assert choose_implementation("auto", "cuda", torch.float32) == "torch"
    assert choose_implementation("triton", "cpu", torch.float32) == "triton"  # in the interpreter
    with pytest.raises(ValueError, match=r"implementation: got 'triton' for torch\.float64"):
        choose_implementation("triton", "cpu", torch.float64)


INVALID = {
    "hidden": [{"hidden": torch.zeros(2, 2, 3)}, {"hidden": torch.zeros(4, 3, dtype=torch.int64)}],
    "weight": [
        {"weight": torch.zeros(0)},
        {"weight": torch.zeros(5, 2)},
        {"weight": torch.zeros(5, 3, dtype=torch.bfloat16)},
        {"weight": torch.zeros(5, 3, device="meta")},
    ],
    "targets": [
        {"targets": torch.zeros(3, dtype=torch.int64)},
        {"targets": torch.zeros(4, 1, dtype=torch.int64)},
        {"targets": torch.zeros(4, dtype=torch.int32)},
        {"targets": torch.zeros(4, dtype=torch.int64, device="meta")},
    ],
    "targets: row 2 is 5,": [{"targets": torch.tensor([0, IGNORE_INDEX, 5, -7])}],
    "targets: row 1 is -1,": [{"targets": torch.tensor([0, -1, 5, 0])}],
    "bias": [
        {"bias": torch.zeros(4)},
        {"bias": torch.zeros(5, 1)},
        {"bias": torch.zeros(5, dtype=torch.bfloat16)},
        {"bias": torch.zeros(5, device="meta")},
    ],
    "groups": [{"groups": torch.zeros(3, dtype=torch.int64)}, {"groups": torch.zeros(4)}],
    "softcap": [{"softcap": 0.0}, {"softcap": -1.0}, {"softcap": math.nan}],
    "implementation": [{"implementation": "fast"}],
}


@pytest.mark.parametrize(("start", "change"), [(start, change) for start in INVALID for change in INVALID[start]])
def test_errors_name_the_field(start, change):
    valid = {"hidden": torch.zeros(4, 3), "weight": torch.zeros(5, 3), "targets": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=f"^{start}") as raised:
        linear_logps(**(valid | change))
    assert "got" in str(raised.value) or "row" in str(raised.value)


@pytest.mark.parametrize("with_entropy", [False, True], ids=["plain", "entropy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_with_tensor_descriptors(dtype, with_entropy, chunks_of, monkeypatch):
    """The launches of sm_90 and sm_100 load tiles by descriptors (TMA); rows then start at multiples of 16 bytes."""
    monkeypatch.setattr(logps_triton, "INTERPRETER_BLOCKS", logps_triton.Blocks(32, 64, 32, 1, 1, descriptors=True))
    chunks_of(192)
    inputs = make_inputs((37, 72, 507), dtype, ignored=0.3)
    assert_as_exact_as_eager(inputs, partial(linear_logps, implementation="triton"), with_entropy=with_entropy)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("with_entropy", [False, True], ids=["plain", "entropy"])
def test_triton_splits_of_several_tiles(splits, with_entropy, monkeypatch):
    """Six tiles of the vocabulary, their maxima rising and falling, in 1, 2 and 3 (5 would leave 2 empty) programs."""
    monkeypatch.setattr(logps_triton, "MAX_SPLITS", splits)
    monkeypatch.setattr(logps_triton, "INTERPRETER_BLOCKS", logps_triton.Blocks(16, 32, 32, 1, 1))
    hidden, weight, targets, bias, upstream = make_inputs((20, 13, 180))
    with torch.no_grad():
        bias += torch.tensor([0.0, 3.0, -2.0, 4.0, 0.5, 4.5]).repeat_interleave(32)[:180]
    inputs = hidden, weight, targets, bias, upstream
    assert_as_exact_as_eager(inputs, partial(linear_logps, implementation="triton"), with_entropy=with_entropy)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 70), st.integers(1, 90), st.integers(1, 600)),
    ignored=st.floats(0, 1), with_bias=st.booleans(), dtype=st.sampled_from(sorted(EXCESS_ERROR, key=str)),
    chunk=st.integers(20, 700), seed=st.integers(0, 2**31),
)  # fmt: skip
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_any_shape(implementation, shape, ignored, with_bias, dtype, chunk, seed):
    if implementation == "triton" and dtype == torch.float64:
        dtype = torch.float32
    with pytest.MonkeyPatch.context() as patch:
        for module in (logps_torch, logps_triton):
            patch.setattr(module, "chunk_size", lambda *_: chunk)
        inputs = make_inputs(shape, dtype, ignored=ignored, with_bias=with_bias, seed=seed)
        assert_as_exact_as_eager(inputs, partial(linear_logps, implementation=implementation))
