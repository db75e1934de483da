"""The contenders of bench_logps.py and the fp64 result they are held to: linear_logps, the eager way, what others ship.

Every contender is a `Step`: one DPO step on a `Pair`, that is a forward without gradients (the reference pass), a
forward and a backward that leaves gradients in the leaves of hidden and weight; it returns the log-probabilities.
Policy and reference are the same here, so DPO's gradient is exactly -beta/2 for each chosen token and +beta/2 for each
rejected one (arXiv 2305.18290); peers that bring their own DPO loss find it themselves.

Legend: N token rows, H hidden size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mede2.kernels.logps import IGNORE_INDEX, choose_implementation, linear_logps

BETA = 0.1  # of DPO
EXACT_BYTES = 2**30  # of the fp64 logits of a block of rows
PACKAGES = ("liger-kernel", "cut-cross-entropy", "quack-kernels")  # of the peers, for the record of versions
COMPACTED = " on compacted rows"


class Unavailable(Exception):
    """A contender that cannot run here; the text is the reason."""


class Pair(NamedTuple):
    """Rows of a chosen answer, then of a rejected one."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    targets: Tensor  # (N,) int64, IGNORE_INDEX where the row does not count
    groups: Tensor  # (N,) int64: 0 chosen, 1 rejected, ascending


Step = Callable[[Pair], Tensor]  # to (N,) log-probabilities, or (2,), those of the two answers


@dataclass(frozen=True)
class Contender:
    """Attributes:
    load: gives the step on "cpu" or "cuda"; raises Unavailable or ImportError.
    compiles: whether its first call on a shape compiles, which is no part of its memory.
    by_answer: whether it returns (2,).
    """

    load: Callable[[str], Step]
    compiles: bool = False
    by_answer: bool = False


def upstream(groups: Tensor) -> Tensor:
    """The gradient of DPO's loss in the log-probability of each row, (N,) fp32."""
    return torch.where(groups == 0, -BETA / 2, BETA / 2)


@dataclass(frozen=True)
class Exact:
    """What every contender should find, in fp64; `block` rows at a time."""

    logps: Tensor  # (N,), 0 where ignored
    grad_hidden: Tensor  # (N, H)
    grad_weight: Tensor  # (V, H)
    block: int

    def errors(self, logps: Tensor, pair: Pair, by_answer: bool) -> dict[str, float | str]:
        """Errors of a step that has just run and returned `logps`, by column of the results."""
        want = self.logps
        if by_answer:
            want = torch.zeros(2, dtype=want.dtype, device=want.device).index_add_(0, pair.groups, want)
        elif len(logps) != len(want):
            want = want[pair.targets != IGNORE_INDEX]
        rows_off = (pair.weight.grad.double() - self.grad_weight).norm(dim=1)
        return {
            "logps_error": float((logps.double() - want).norm() / want.norm()),
            "logps_error_of": "answers" if by_answer else "tokens",
            "dh_error": float((pair.hidden.grad.double() - self.grad_hidden).norm() / self.grad_hidden.norm()),
            "dw_error": float(rows_off.norm() / self.grad_weight.norm()),
            "dw_worst_row_error": float(rows_off.max() / self.grad_weight.norm(dim=1).max()),
            "exact": f"fp64, {self.block} rows at a time",
        }


def exact_results(pair: Pair) -> Exact:
    """Log-probabilities and gradients of a step, in row blocks so that they fit beside a large vocabulary."""
    hidden, weight = pair.hidden.detach().double(), pair.weight.detach().double()
    logps = hidden.new_zeros(len(hidden))
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    gradients = upstream(pair.groups).double()
    block = min(max(1, EXACT_BYTES // (8 * len(weight))), len(hidden))
    for rows in (pair.targets != IGNORE_INDEX).nonzero().squeeze(1).split(block):
        columns = pair.targets[rows][:, None]
        log_softmax = (hidden[rows] @ weight.T).log_softmax(1)
        logps[rows] = log_softmax.gather(1, columns).squeeze(1)
        grad_logits = log_softmax.exp_().neg_().scatter_add_(1, columns, torch.ones_like(columns, dtype=torch.float64))
        grad_logits.mul_(gradients[rows][:, None])
        grad_hidden[rows] = grad_logits @ weight
        grad_weight.addmm_(grad_logits.T, hidden[rows])
    return Exact(logps, grad_hidden, grad_weight, block)


def pair_step(logps_of: Callable[[Pair], Tensor]) -> Step:
    """The step of a function that gives (N,) log-probabilities."""

    def step(pair: Pair) -> Tensor:
        with torch.no_grad():
            logps_of(pair)
        logps = logps_of(pair)
        (logps * upstream(pair.groups)).sum().backward()
        return logps.detach()

    return step


def answer_step(summed_loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """The step of a function that only sums: called for the chosen answer, then for the rejected one."""

    def logps_of(pair: Pair) -> Tensor:
        sizes = pair.groups.bincount(minlength=2).tolist()
        answers = zip(pair.hidden.split(sizes), pair.targets.split(sizes), strict=True)
        return torch.stack([-summed_loss(hidden, pair.weight, targets).float() for hidden, targets in answers])

    def step(pair: Pair) -> Tensor:
        with torch.no_grad():
            logps_of(pair)
        logps = logps_of(pair)
        (logps * upstream(torch.arange(2, device=logps.device))).sum().backward()
        return logps.detach()

    return step


def compacted(step: Step) -> Step:
    """The same step on the rows that count."""

    def step_on_rows(pair: Pair) -> Tensor:
        rows = (pair.targets != IGNORE_INDEX).nonzero().squeeze(1)
        hidden, targets, groups = (tensor.index_select(0, rows) for tensor in (pair.hidden, pair.targets, pair.groups))
        return step(Pair(hidden, pair.weight, targets, groups))

    return step_on_rows


def refusing(step: Step, refusals: tuple[type[Exception], ...]) -> Step:
    """The same step, for which `refusals` mean that it cannot run here."""

    def refusing_step(pair: Pair) -> Tensor:
        try:
            return step(pair)
        except refusals as error:
            lines = str(error).strip().splitlines() or ["no message"]
            raise Unavailable(f"{type(error).__name__}: {lines[0]}") from error

    return refusing_step


def naive_logps(pair: Pair) -> Tensor:
    """(N,) fp32, as people write it: every row, fp32 logits; cross_entropy is a little faster than a gather."""
    logits = F.linear(pair.hidden, pair.weight).float()
    return -F.cross_entropy(logits, pair.targets, ignore_index=IGNORE_INDEX, reduction="none")


def load_ours(implementation: str, device: str) -> Step:
    try:
        choose_implementation(implementation, device)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    return pair_step(
        lambda pair: linear_logps(
            pair.hidden, pair.weight, pair.targets, groups=pair.groups, implementation=implementation
        )
    )


def load_compiled(device: str) -> Step:
    from torch._dynamo.exc import TorchDynamoException

    # static shapes: with dynamic ones the compiler would tune for none of them
    return refusing(pair_step(torch.compile(naive_logps, dynamic=False)), (TorchDynamoException,))


def load_torch(reduction: str, device: str) -> Step:
    """torch's own, by chunks of rows; without options it is the naive way."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise Unavailable(f"torch {torch.__version__} has none that works by chunks")
    loss_of = partial(F.linear_cross_entropy, reduction=reduction, options=torch.nn.LinearCrossEntropyOptions())
    if reduction == "sum":
        return answer_step(loss_of)
    return pair_step(lambda pair: -loss_of(pair.hidden, pair.weight, pair.targets).float())


def load_liger_dpo(device: str) -> Step:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss
    from torch._dynamo.exc import TorchDynamoException

    loss_of = LigerFusedLinearDPOLoss(beta=BETA)  # as shipped: compiled, with the reference pass inside

    def step(pair: Pair) -> Tensor:
        sizes = pair.groups.bincount(minlength=2).tolist()
        if sizes[0] == sizes[1]:
            hidden, targets = pair.hidden.unflatten(0, (2, -1)), pair.targets.unflatten(0, (2, -1))
        else:  # it takes sequences of one length
            hidden = pad_sequence(pair.hidden.split(sizes), batch_first=True)
            targets = pad_sequence(pair.targets.split(sizes), batch_first=True, padding_value=IGNORE_INDEX)
        loss, (chosen_logps, rejected_logps, *_) = loss_of(
            pair.weight, hidden, targets, ref_input=hidden.detach(), ref_weight=pair.weight.detach()
        )
        loss.backward()
        return torch.cat([chosen_logps, rejected_logps]).detach()

    return refusing(step, (TorchDynamoException,))


def load_liger_ce(reduction: str, device: str) -> Step:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    _need_cuda(device)
    loss_of = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction=reduction)
    if reduction == "sum":
        step = answer_step(lambda hidden, weight, targets: loss_of(weight, hidden, targets))
    else:
        step = pair_step(lambda pair: -loss_of(pair.weight, pair.hidden, pair.targets))
    return refusing(step, _triton_refusals())


def load_cce(device: str) -> Step:
    from cut_cross_entropy import linear_cross_entropy

    _need_cuda(device)
    step = pair_step(
        lambda pair: (
            -linear_cross_entropy(
                pair.hidden, pair.weight, pair.targets, ignore_index=IGNORE_INDEX, reduction="none"
            ).float()
        )
    )
    return refusing(step, (*_triton_refusals(), AssertionError))  # it asserts 16-bit inputs


def load_quack(device: str) -> Step:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _need_cuda(device)

    def summed_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        fill = -len(targets) % 8  # it takes rows by eights
        hidden, targets = F.pad(hidden, (0, 0, 0, fill)), F.pad(targets, (0, fill), value=IGNORE_INDEX)
        return chunked_linear_cross_entropy(hidden, weight, targets, ignore_index=IGNORE_INDEX, reduction="sum")

    return refusing(answer_step(summed_loss), (*_triton_refusals(), AssertionError))


def _need_cuda(device: str) -> None:
    if device != "cuda":
        raise Unavailable("its kernels need CUDA")


def _triton_refusals() -> tuple[type[Exception], ...]:
    """What a kernel raises that this card or this Triton cannot take; torch's own are RuntimeErrors."""
    from triton.errors import TritonError

    return TritonError, RuntimeError


OURS = {
    f"mede2 {implementation}": Contender(partial(load_ours, implementation)) for implementation in ("torch", "triton")
}
NAIVE = {"naive": Contender(lambda device: pair_step(naive_logps))}
PEERS = {
    "torch.compile": Contender(load_compiled, compiles=True),
    "torch linear_cross_entropy none": Contender(partial(load_torch, "none")),
    "torch linear_cross_entropy sum": Contender(partial(load_torch, "sum"), by_answer=True),
    "Liger linear DPO": Contender(load_liger_dpo, compiles=True, by_answer=True),
    "Liger linear CE none": Contender(partial(load_liger_ce, "none")),
    "Liger linear CE sum": Contender(partial(load_liger_ce, "sum"), by_answer=True),
    "cut-cross-entropy": Contender(load_cce),
    "QuACK linear CE sum": Contender(load_quack, by_answer=True),
}
CONTENDERS = NAIVE | OURS | PEERS


def load_step(name: str, device: str) -> Step:
    """The step of a contender, by its name, with COMPACTED after it for the rows that count."""
    step = CONTENDERS[name.removesuffix(COMPACTED)].load(device)
    return compacted(step) if name.endswith(COMPACTED) else step
