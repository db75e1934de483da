"""Both objectives on micro-batches made by hand."""

import math

import pytest
import torch

from mede2.trainer.data.collate import MicroBatch
from mede2.trainer.data.dataset import Totals
from mede2.trainer.objectives import Enhance, elicit


def micro_batch(answers: list[list[float]], weights: list[float], indices: tuple[int, ...]):
    """Per-token log-probabilities that require gradients, and the micro-batch that owns them."""
    sequence = torch.tensor([number for number, answer in enumerate(answers) for _ in answer])
    logps = torch.tensor([logp for answer in answers for logp in answer], requires_grad=True)
    nothing = torch.zeros(len(logps), dtype=torch.int64)
    sources = tuple(f"rows.jsonl:{index + 1}" for index in indices)
    return logps, MicroBatch({}, nothing, nothing, sequence, torch.tensor(weights), indices, sources)


def floats(stats):
    return {name: float(value) for name, value in stats.items()}


def totals(num_examples: int, num_answer_tokens: int) -> Totals:
    return Totals(num_examples, num_answer_tokens, num_tokens=1000)


NAN = float("nan")
REFERENCE = torch.tensor([[NAN, NAN], [-4.0, -1.0], [NAN, NAN], [-2.5, -3.5]], dtype=torch.float64)


def test_elicit_by_hand():
    """(1 + 3 + 2) / 4: the mean is over the global count of answer tokens, of which three are here."""
    logps, batch = micro_batch([[-1.0, -3.0], [-2.0]], [1.0, 1.0], (0, 1))
    loss, stats = elicit(logps, batch, totals(2, 4))
    assert loss.item() == floats(stats)["loss"] == 1.5


def test_enhance_by_hand():
    """Pair of row 3: log-ratios -2+2.5 = 0.5 and -4+3.5 = -0.5, h = 1, loss log(1 + e^-1) = 0.313262.
    Pair of row 1: log-ratios -3+4 = 1 and -2+1 = -1, h = 2, loss log(1 + e^-2) = 0.126928.
    Mean 0.220095. NLL of the chosen answers (1 + 1 + 3) / 3 tokens = 1.666667, weighted by 0.5: 0.833333."""
    logps, batch = micro_batch([[-1.0, -1.0], [-3.0], [-4.0], [-1.0, -1.0]], [1.0] * 4, (3, 1))
    loss, stats = Enhance(REFERENCE, beta=1.0, label_smoothing=0.0, nll_weight=0.5)(logps, batch, totals(2, 3))
    assert loss.item() == pytest.approx(1.053428, abs=1e-6)
    assert floats(stats) == pytest.approx(
        {
            "loss": 1.053428, "loss/preference": 0.220095, "loss/nll": 5 / 3,
            "rewards/chosen": 0.75, "rewards/rejected": -0.75, "rewards/margins": 1.5, "rewards/margins_abs": 1.5,
            "rewards/accuracies": 1.0, "logps/chosen": -2.5, "logps/rejected": -3.0,
            "length/chosen": 1.5, "length/rejected": 1.5,
        }, abs=1e-6,
    )  # fmt: skip


def test_enhance_at_the_reference():
    """Loss log 2, no margin, and a tie is no win."""
    logps, batch = micro_batch([[-4.0], [-1.0]], [1.0, 1.0], (1,))
    loss, stats = Enhance(REFERENCE, beta=0.1, label_smoothing=0.0, nll_weight=0.0)(logps, batch, totals(1, 1))
    assert loss.item() == pytest.approx(math.log(2))
    assert floats(stats)["rewards/margins_abs"] == floats(stats)["rewards/accuracies"] == 0


def test_enhance_supervises_chosen_tokens_only():
    """The gradient that the NLL adds is -weight / count on chosen tokens and nothing on rejected ones."""
    gradients = []
    for nll_weight in (0.0, 3.0):
        logps, batch = micro_batch([[-1.0, -1.0], [-4.0, -2.0, -1.0]], [1.0, 1.0], (3,))
        loss, stats = Enhance(REFERENCE, 1.0, 0.0, nll_weight)(logps, batch, totals(1, 2))
        loss.backward()
        assert (stats["length/chosen"], stats["length/rejected"]) == (2, 3)
        gradients.append(logps.grad)
    torch.testing.assert_close(gradients[1] - gradients[0], torch.tensor([-1.5, -1.5, 0.0, 0.0, 0.0]))


ELICIT_ROWS = {3: [[-1.0, -3.0]], 1: [[-2.0]]}
ENHANCE_ROWS = {3: [[-1.0, -1.0], [-4.0]], 1: [[-3.0], [-1.0, -1.0]]}
CASES = [
    pytest.param(elicit, ELICIT_ROWS, id="elicit"),
    pytest.param(Enhance(REFERENCE, 1.0, 0.1, 0.5), ENHANCE_ROWS, id="enhance"),
]


def evaluate(objective, rows: dict, slots: list[tuple[int, float]]):
    """Loss, stats and the gradient of each row's tokens, for the micro-batch of (row, weight) slots."""
    sides = range(len(rows[slots[0][0]]))
    answers = [rows[index][side] for side in sides for index, _ in slots]
    weights = [weight for _ in sides for _, weight in slots]
    logps, batch = micro_batch(answers, weights, tuple(index for index, _ in slots))
    loss, stats = objective(logps, batch, totals(2, 3))
    loss.backward()
    return loss.item(), floats(stats), logps.grad


@pytest.mark.parametrize(("objective", "rows"), CASES)
def test_filler_contributes_nothing(objective, rows):
    alone_loss, alone_stats, alone_gradient = evaluate(objective, rows, [(3, 1.0)])
    loss, stats, gradient = evaluate(objective, rows, [(3, 1.0), (1, 0.0)])
    assert (loss, stats) == (pytest.approx(alone_loss), pytest.approx(alone_stats))
    assert gradient.abs().sum().item() == pytest.approx(alone_gradient.abs().sum().item())
    empty_loss, empty_stats, empty_gradient = evaluate(objective, rows, [(1, 0.0)])
    assert empty_loss == 0
    assert not any(empty_stats.values())
    assert not empty_gradient.any()


@pytest.mark.parametrize(("objective", "rows"), CASES)
def test_shares_of_micro_batches_add_up(objective, rows):
    whole_loss, whole_stats, _ = evaluate(objective, rows, [(3, 1.0), (1, 1.0)])
    parts = [evaluate(objective, rows, [(index, 1.0)]) for index in (3, 1)]
    assert sum(loss for loss, *_ in parts) == pytest.approx(whole_loss)
    for name, value in whole_stats.items():
        assert sum(stats[name] for _, stats, _ in parts) == pytest.approx(value), name
