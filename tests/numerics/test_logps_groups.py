"""Rows in groups of one upstream gradient: the 3 U forms of the torch implementation.

Legend: N token rows, H hidden size, V vocabulary; U = 2NVH operations.
"""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mede2.kernels import logps_torch
from mede2.kernels.logps import IGNORE_INDEX, linear_logps

N, H, V = 60, 13, 101


def leaves(dtype=torch.float32, with_bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=dtype).requires_grad_()
    weight = (2 * torch.randn(V, H, generator=generator, dtype=dtype) / math.sqrt(H)).requires_grad_()
    bias = torch.randn(V, generator=generator, dtype=dtype).requires_grad_() if with_bias else None
    return hidden, weight, bias


@pytest.fixture
def targets():
    values = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    values[::4] = IGNORE_INDEX
    return values


@pytest.fixture
def groups():
    """Three groups in no order, numbered as callers like."""
    return torch.tensor([7, -2, 40])[torch.randint(3, (N,), generator=torch.Generator().manual_seed(2))]


def gradients(targets, groups, scales, dtype=torch.float32, softcap=None, with_groups=True):
    """Log-probabilities and gradients where every row of a group gets that group's scale."""
    hidden, weight, bias = leaves(dtype)
    upstream = torch.zeros(N, dtype=dtype)
    for group, scale in scales.items():
        upstream[groups == group] = scale
    logps = linear_logps(
        hidden, weight, targets, bias=bias, softcap=softcap, groups=groups if with_groups else None,
        implementation="torch",
    )  # fmt: skip
    logps.backward(upstream)
    return [logps.detach(), hidden.grad, weight.grad, bias.grad]


SCALES = {7: 0.3, -2: -1.7, 40: 0.0}


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_groups_change_nothing_but_the_work(targets, groups, dtype, tolerance, softcap, monkeypatch):
    monkeypatch.setattr(logps_torch, "CHUNK_BYTES", 8 * V * dtype.itemsize)
    monkeypatch.setattr(logps_torch, "MIN_ROWS", 1)  # blocks of 8 rows
    grouped = gradients(targets, groups, SCALES, dtype, softcap)
    plain = gradients(targets, groups, SCALES, dtype, softcap, with_groups=False)
    for ours, theirs in zip(grouped, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("with_groups", "units"), [(True, (3, 0)), (False, (1, 3))])
def test_work_in_units(with_groups, units):
    """3 U in all, where recomputing costs 4; the reference pass, without gradients, costs 1 either way."""
    hidden, weight, _ = leaves(with_bias=False)
    targets, groups = torch.arange(N), torch.arange(N) // (N // 2) if with_groups else None
    with FlopCounterMode(display=False) as forward:
        logps = linear_logps(hidden, weight, targets, groups=groups)
    with FlopCounterMode(display=False) as backward:
        logps.sum().backward()
    with FlopCounterMode(display=False) as reference, torch.no_grad():
        linear_logps(hidden, weight, targets, groups=groups)
    unit = 2 * N * H * V
    assert (forward.get_total_flops(), backward.get_total_flops()) == tuple(unit * count for count in units)
    assert reference.get_total_flops() == unit


def test_unequal_gradients_in_a_group_are_refused(targets, groups):
    hidden, weight, bias = leaves()
    logps = linear_logps(hidden, weight, targets, groups=groups, bias=bias)
    upstream = torch.ones(N)
    upstream[torch.nonzero(targets != IGNORE_INDEX)[3]] = 1.0000001
    with pytest.raises(ValueError, match="groups: the upstream gradients of one group differ"):
        logps.backward(upstream)


def test_a_gradient_that_is_not_a_number_passes_through(targets, groups):
    """The loop names the rows of a loss that is not finite; the groups are not the fault."""
    results = gradients(targets, groups, SCALES | {7: math.nan})
    assert results[2].isnan().any()


def test_ungrouped_where_it_would_not_fit(targets, groups, monkeypatch):
    """Three weight gradients over the budget: the logits are computed again, and unequal gradients are welcome."""
    monkeypatch.setattr(logps_torch, "GROUPED_BYTES", 3 * V * (H + 1) * 4 - 1)
    hidden, weight, bias = leaves()
    linear_logps(hidden, weight, targets, groups=groups, bias=bias).backward(torch.randn(N))
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_is_not_computed(targets, groups, frozen):
    expected = gradients(targets, groups, SCALES)
    hidden, weight, bias = leaves()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    logps = linear_logps(hidden, weight, targets, groups=groups, bias=bias)
    upstream = torch.tensor([SCALES[group] for group in groups.tolist()])
    logps.backward(upstream)
    trained, whole = (weight.grad, expected[2]) if frozen == "hidden" else (hidden.grad, expected[1])
    torch.testing.assert_close(trained, whole, rtol=0, atol=0)


def test_backward_runs_once(targets, groups):
    """It scales the kept gradients in place; a second time would scale them again."""
    hidden, weight, bias = leaves()
    loss = linear_logps(hidden, weight, targets, groups=groups, bias=bias).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


@pytest.fixture
def few(groups):
    """Targets of fewer counted rows than the groups' weight gradients have, so that exponentials are kept."""
    values = torch.randint(V, (N,), generator=torch.Generator().manual_seed(1))
    values[30:] = IGNORE_INDEX
    return values


def test_kept_exponentials_are_let_go_in_backward(few, groups):
    hidden, weight, bias = leaves()
    loss = linear_logps(hidden, weight, few, groups=groups, bias=bias).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward runs once"):
        loss.backward()


@pytest.mark.parametrize("num_columns", [1, 7, V])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_kept_exponentials_change_nothing_but_the_work(few, groups, dtype, tolerance, num_columns, monkeypatch):
    monkeypatch.setattr(logps_torch, "MIN_CHUNK", num_columns)
    monkeypatch.setattr(logps_torch, "KEPT_CHUNK_BYTES", 1)
    kept = gradients(few, groups, SCALES, dtype)
    plain = gradients(few, groups, SCALES, dtype, with_groups=False)
    for ours, theirs in zip(kept, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_kept_exponentials_hold_at_extreme_logits(few, groups):
    """Logits rise by hundreds from chunk to chunk and fall again: no overflow, and the softmax of before vanishes."""
    hidden, weight, _ = leaves(torch.float64, with_bias=False)
    weight = (weight.detach() * 300).requires_grad_()
    logps = linear_logps(hidden, weight, few, groups=groups)
    logps.sum().backward()
    counted = few != IGNORE_INDEX
    plain_hidden, plain_weight = hidden.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    logits = plain_hidden[counted] @ plain_weight.T
    plain = logits.log_softmax(-1).gather(1, few[counted][:, None])[:, 0]
    plain.sum().backward()
    torch.testing.assert_close(logps[counted], plain, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(hidden.grad, plain_hidden.grad, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(weight.grad, plain_weight.grad, rtol=1e-12, atol=1e-9)


def test_kept_exponentials_cost_3_units_and_less_memory_than_the_groups(few, groups):
    """What the graph holds between forward and backward is N x V and what goes in."""
    hidden, weight, _ = leaves(with_bias=False)
    num_counted = int((few != IGNORE_INDEX).sum())
    held = []
    with (
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: held.append(tensor.numel()) or tensor, lambda t: t),
    ):
        logps = linear_logps(hidden, weight, few, groups=groups)
    nodes = [logps.grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before is not None]
    (node,) = (node for node in nodes if hasattr(node, "kept"))
    kept = [exponentials.numel() for exponentials in node.kept]
    with FlopCounterMode(display=False) as backward:
        logps.sum().backward()
    unit = 2 * num_counted * H * V
    assert (forward.get_total_flops(), backward.get_total_flops()) == (unit, 2 * unit)
    assert sum(kept) == num_counted * V
    assert node.kept is None
    assert sum(held) + sum(kept) < num_counted * V + 3 * H * V  # three groups' gradients would be more alone
    assert num_counted * V < 3 * H * V


def test_unequal_gradients_are_welcome_where_exponentials_are_kept(few, groups):
    hidden, weight, bias = leaves()
    upstream = torch.randn(N, generator=torch.Generator().manual_seed(3))
    linear_logps(hidden, weight, few, groups=groups, bias=bias).backward(upstream)
    again = leaves()
    linear_logps(again[0], again[1], few, bias=again[2]).backward(upstream)
    for ours, theirs in zip((hidden, weight, bias), again, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2e-6, atol=2e-6)


def test_short_answers_under_a_soft_cap_keep_to_the_budget(monkeypatch):
    """The exponentials, which would fit, are not kept under a soft cap; the weight gradients, which are, would not."""
    from mede2.kernels import logps_torch

    forms = []
    for name in ("_KeptLogps", "_GroupedLogps", "_ChunkedLogps"):
        form = getattr(logps_torch, name)
        monkeypatch.setattr(form, "apply", lambda *parts, form=form, name=name: forms.append(name) or (None, None))
    monkeypatch.setattr(logps_torch, "GROUPED_BYTES", 4 * 8 * 100)  # eight rows of V values
    hidden, weight = torch.randn(8, 6, requires_grad=True), torch.randn(100, 6)
    targets, groups = torch.zeros(8, dtype=torch.long), torch.arange(8) // 2
    for softcap in (None, 5.0):
        logps_torch.torch_logps(hidden, weight, targets, groups=groups, softcap=softcap)
    assert forms == ["_KeptLogps", "_ChunkedLogps"]
