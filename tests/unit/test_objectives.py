"""Both objectives on micro-batches made by hand."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from mede2.trainer.objectives import Elicit, Enhance, elicit
from mede2.trainer.settings import OBJECTIVES, Settings


def micro_batch(answers: list[list[float]], weights: list[float], indices: tuple[int, ...], has_image=None):
    """Per-token log-probabilities that require gradients, and what objectives read of the micro-batch with them."""
    sequence = torch.tensor([number for number, answer in enumerate(answers) for _ in answer])
    logps = torch.tensor([logp for answer in answers for logp in answer], requires_grad=True)
    has_image = torch.tensor(has_image or [1.0] * len(indices))
    return logps, SimpleNamespace(
        sequence=sequence, weights=torch.tensor(weights), indices=indices, has_image=has_image
    )


def totals(num_examples: int, num_answer_tokens: int, num_with_image: int = 0):
    return SimpleNamespace(
        num_examples=num_examples, num_answer_tokens=num_answer_tokens, num_with_image=num_with_image
    )


def floats(stats):
    return {name: float(value) for name, value in stats.items()}


NAN = float("nan")
REFERENCE = torch.tensor([[NAN] * 3, [-4.0, -1.0, -6.0], [NAN] * 3, [-2.5, -3.5, -1.5]], dtype=torch.float64)
TWO_SIDES = REFERENCE[:, :2]


def enhance(objective: dict[str, float], reference=TWO_SIDES, **settings) -> Enhance:
    return Enhance(Settings(objective=objective, **{"beta": 1.0} | settings), reference)


def test_elicit_by_hand():
    """(1 + 3 + 2) / 4: the mean is over the global count of answer tokens, of which three are here."""
    logps, batch = micro_batch([[-1.0, -3.0], [-2.0]], [1.0, 1.0], (0, 1))
    loss, stats = elicit(logps, batch, totals(2, 4))
    assert loss.item() == floats(stats)["loss"] == 1.5


# Pair of row 3: log-ratios -2 + 2.5 = 0.5 and -4 + 3.5 = -0.5. Pair of row 1: -3 + 4 = 1 and -2 + 1 = -1.
ROWS_3_AND_1 = [[-1.0, -1.0], [-3.0], [-4.0], [-1.0, -1.0]]


def test_enhance_by_hand():
    """h = 1 and 2, losses log(1 + e^-1) = 0.313262 and log(1 + e^-2) = 0.126928, mean 0.220095. NLL of the chosen
    answers (1 + 1 + 3) / 3 tokens = 1.666667, weighted by 0.5: 0.833333."""
    logps, batch = micro_batch(ROWS_3_AND_1, [1.0] * 4, (3, 1))
    loss, stats = enhance({"sigmoid": 1.0, "nll": 0.5})(logps, batch, totals(2, 3))
    assert loss.item() == pytest.approx(1.053428, abs=1e-6)
    assert floats(stats) == pytest.approx(
        {
            "loss": 1.053428, "loss/sigmoid": 0.220095, "loss/nll": 5 / 3,
            "rewards/chosen": 0.75, "rewards/rejected": -0.75, "rewards/margins": 1.5, "rewards/margins_abs": 1.5,
            "rewards/accuracies": 1.0, "logps/chosen": -2.5, "logps/rejected": -3.0,
            "length/chosen": 1.5, "length/rejected": 1.5,
        }, abs=1e-6,
    )  # fmt: skip


def test_lengths_are_those_of_the_answers():
    """IPO at beta 1: (0.5/2 + 0.5/1 - 0.5)^2 = 0.0625 and (1/1 + 1/2 - 0.5)^2 = 1; mean 0.53125."""
    logps, batch = micro_batch(ROWS_3_AND_1, [1.0] * 4, (3, 1))
    loss, _ = enhance({"ipo": 1.0})(logps, batch, totals(2, 3))
    assert loss.item() == pytest.approx(0.53125)


def test_enhance_at_the_reference():
    """Loss log 2, no margin, and a tie is no win."""
    logps, batch = micro_batch([[-4.0], [-1.0]], [1.0, 1.0], (1,))
    loss, stats = enhance({"sigmoid": 1.0}, beta=0.1)(logps, batch, totals(1, 1))
    assert loss.item() == pytest.approx(math.log(2))
    assert floats(stats)["rewards/margins_abs"] == floats(stats)["rewards/accuracies"] == 0


def test_nll_supervises_chosen_tokens_only():
    """The gradient that the NLL adds is -weight / count on chosen tokens and nothing on rejected ones."""
    gradients = []
    for mix in ({"sigmoid": 1.0}, {"sigmoid": 1.0, "nll": 3.0}):
        logps, batch = micro_batch([[-1.0, -1.0], [-4.0, -2.0, -1.0]], [1.0, 1.0], (3,))
        loss, stats = enhance(mix)(logps, batch, totals(1, 2))
        loss.backward()
        assert (stats["length/chosen"], stats["length/rejected"]) == (2, 3)
        gradients.append(logps.grad)
    torch.testing.assert_close(gradients[1] - gradients[0], torch.tensor([-1.5, -1.5, 0.0, 0.0, 0.0]))


# Reference-free.


def test_without_a_reference_rewards_are_log_probabilities():
    """At the default beta of 0.1 chosen -0.2 and -0.3, rejected -0.4 and -0.2: one pair of two is won."""
    logps, batch = micro_batch(ROWS_3_AND_1, [1.0] * 4, (3, 1))
    objective = Enhance(Settings(objective={"orpo": 0.1, "nll": 1.0}), None)
    stats = floats(objective(logps, batch, totals(2, 3))[1])
    rewards = [stats[f"rewards/{name}"] for name in ("chosen", "rejected", "margins", "accuracies")]
    assert rewards == pytest.approx([-0.25, -0.3, 0.05, 0.5])
    assert stats["loss"] == pytest.approx(0.1 * stats["loss/orpo"] + stats["loss/nll"])


def test_rewards_of_simpo_are_per_token():
    """beta 2, gamma 0.5. Per token -1 against -4 and -3 against -1: logits 6 - 0.5 and -4 - 0.5, losses
    log(1 + e^-5.5) = 0.004078 and log(1 + e^4.5) = 4.511048, mean 2.257563."""
    logps, batch = micro_batch(ROWS_3_AND_1, [1.0] * 4, (3, 1))
    stats = floats(enhance({"simpo": 1.0}, None, beta=2.0)(logps, batch, totals(2, 3))[1])
    assert (stats["rewards/chosen"], stats["rewards/rejected"]) == (-4.0, -5.0)
    assert stats["loss"] == pytest.approx(2.257563, abs=1e-6)


@pytest.mark.parametrize(
    ("mix", "needs"), [({"simpo": 1, "orpo": 1, "nll": 1}, False), ({"nll": 1}, False), ({"nll": 1, "ipo": 1}, True)]
)
def test_what_needs_a_reference(mix, needs):
    assert Settings(objective=mix).needs_reference is needs


# The chosen answer under a corrupted image: side 2. Row 3 has an image, row 1 has none and so the same answer again.

THREE_SIDES = [*ROWS_3_AND_1, [-2.5, -2.0], [-3.0]]
MDPO = {"sigmoid": 1.0, "image_conditional": 0.5, "anchor": 1.0}


def test_the_image_preference_is_averaged_over_pairs_with_an_image():
    """Row 3: log-ratio 0.5 against -4.5 + 1.5 = -3, log(1 + e^-3.5) = 0.029750, over 2 pairs with an image in the
    global batch: 0.014875; nats (-2 + 4.5) / 2 = 1.25. Anchor: (log(1 + e^-0.5) + log(1 + e^-1)) / 2 = 0.393669."""
    logps, batch = micro_batch(THREE_SIDES, [1.0] * 6, (3, 1), has_image=[1.0, 0.0])
    loss, stats = enhance(MDPO, REFERENCE, corruption="crop")(logps, batch, totals(2, 3, num_with_image=2))
    stats = floats(stats)
    assert stats["loss/image_conditional"] == pytest.approx(0.014875, abs=1e-6)
    assert stats["loss/anchor"] == pytest.approx(0.393669, abs=1e-6)
    assert stats["image_gap"] == 1.25
    assert loss.item() == pytest.approx(0.220095 + 0.5 * 0.014875 + 0.393669, abs=2e-6)
    loss.backward()
    assert logps.grad[-1] == 0  # side 2 of the pair without an image


def test_no_image_in_the_global_batch_is_no_gap():
    logps, batch = micro_batch([*ROWS_3_AND_1, [-1.0, -1.0], [-3.0]], [1.0] * 6, (3, 1), has_image=[0.0, 0.0])
    loss, stats = enhance(MDPO, REFERENCE, corruption="crop")(logps, batch, totals(2, 3, num_with_image=0))
    loss.backward()
    assert (floats(stats)["image_gap"], floats(stats)["loss/image_conditional"]) == (0.0, 0.0)
    assert torch.isfinite(logps.grad).all()


@pytest.mark.parametrize(("mix", "reference"), [({"sigmoid": 1.0}, REFERENCE), ({"nll": 1.0}, None)])
def test_the_gap_is_reported_where_it_is_not_trained(mix, reference):
    logps, batch = micro_batch(THREE_SIDES, [1.0] * 6, (3, 1), has_image=[1.0, 0.0])
    loss, stats = Enhance(Settings(objective=mix, corruption="blank"), reference)(logps, batch, totals(2, 3, 1))
    loss.backward()
    assert floats(stats)["image_gap"] == 2.5
    assert not logps.grad[-3:].any()


def test_a_reference_of_fewer_sides_is_an_error():
    logps, batch = micro_batch(THREE_SIDES, [1.0] * 6, (3, 1))
    with pytest.raises(ValueError, match="shorter"):
        enhance(MDPO, TWO_SIDES, corruption="crop")(logps, batch, totals(2, 3, 2))


# MPO's reward shift.

MPO = {"sigmoid": 0.8, "bco_pair_shifted": 0.2, "nll": 1.0}


def test_the_reward_shift_is_the_mean_reward_of_all_updates_before():
    """The pairs' own rewards are 0.5 and -0.5, 1 and -1. Observed are (3 + 1) / 2 over 4 pairs, then (0 - 2) / 2 over
    2 pairs: the mean is 2, then (4 * 2 - 2 * 1) / 6 = 1."""
    objective = enhance(MPO)
    logps, batch = micro_batch(ROWS_3_AND_1, [1.0] * 4, (3, 1))

    def stats():
        return floats(objective(logps, batch, totals(2, 3))[1])

    first = stats()
    assert (first["rewards/shift"], first["num_pairs"]) == (0.0, 2.0)
    # (2 log(1 + e^-0.5) + 2 log(1 + e^-1)) / 2
    assert first["loss/bco_pair_shifted"] == pytest.approx(0.474077 + 0.313262, abs=1e-6)
    assert stats() == first  # a micro-batch more changes nothing
    objective.observe({"rewards/chosen": 3.0, "rewards/rejected": 1.0, "num_pairs": 4.0})
    assert stats()["rewards/shift"] == 2.0
    objective.observe({"rewards/chosen": 0.0, "rewards/rejected": -2.0, "num_pairs": 2.0})
    second = stats()
    assert second["rewards/shift"] == 1.0
    # chosen log(1 + e^0.5) + log(1 + e^0) = 0.974077 + 0.693147, rejected log(1 + e^-1.5) + log(1 + e^-2)
    expected = (0.974077 + 0.693147 + 0.201413 + 0.126928) / 2
    assert second["loss/bco_pair_shifted"] == pytest.approx(expected, abs=1e-6)
    assert second["loss/sigmoid"] == first["loss/sigmoid"]


def test_an_objective_observes_the_metrics_it_gives():
    objective = enhance(MPO)
    logps, batch = micro_batch([[-1.0], [-3.0]], [1.0, 1.0], (1,))
    objective.observe(floats(objective(logps, batch, totals(1, 1))[1]))
    assert objective.mean_reward.value == 0.5  # (3 - 2) / 2
    assert objective.mean_reward.count == 1


def test_evaluation_takes_the_trained_shift():
    objective = enhance(MPO)
    held_out = dataclasses.replace(objective, reference=TWO_SIDES)
    objective.observe({"rewards/chosen": 3.0, "rewards/rejected": 1.0, "num_pairs": 4.0})
    logps, batch = micro_batch(ROWS_3_AND_1, [1.0] * 4, (3, 1))
    assert floats(held_out(logps, batch, totals(2, 3))[1])["rewards/shift"] == 2.0


def test_state_comes_back_to_the_last_digit():
    """Through JSON, as in a checkpoint's marker, and then it goes on alike."""
    objective, again = enhance(MPO), enhance(MPO)
    for reward in (0.1, 1 / 3, -math.pi):
        objective.observe({"rewards/chosen": reward, "rewards/rejected": 0.7, "num_pairs": 3.0})
    again.load_state_dict(json.loads(json.dumps(objective.state_dict())))
    for each in (objective, again):
        each.observe({"rewards/chosen": 1e-9, "rewards/rejected": 0.7, "num_pairs": 3.0})
    assert again.state_dict() == objective.state_dict()
    assert again.mean_reward.value == objective.mean_reward.value != 0


def test_objectives_without_state():
    """Stage I has none; Stage II's stays at zero without the loss that reads it, whatever it observes."""
    metrics = {"rewards/chosen": 3.0, "rewards/rejected": 1.0}
    objective = enhance({"sigmoid": 1.0})
    for each in (objective, elicit):
        each.observe(metrics)
    assert objective.mean_reward.value == 0
    assert elicit.state_dict() == {}
    Elicit().load_state_dict({})


# Any objective: filler, accumulation, and the one gradient per answer that `Policy.forward` counts on.

ELICIT_ROWS = {3: [[-1.0, -3.0]], 1: [[-2.0]]}
ENHANCE_ROWS = {3: [[-1.0, -1.0], [-4.0], [-2.5, -2.0]], 1: [[-3.0], [-1.0, -1.0], [-5.0, -1.0]]}
EVERYTHING = {name: weight for weight, name in enumerate(OBJECTIVES, start=1)}
CASES = [
    pytest.param(elicit, ELICIT_ROWS, id="elicit"),
    pytest.param(
        enhance(EVERYTHING, REFERENCE, label_smoothing=0.1, corruption="noise"), ENHANCE_ROWS, id="enhance_everything"
    ),
    pytest.param(enhance({"simpo": 1.0, "nll": 0.5}, None), {3: ENHANCE_ROWS[3][:2], 1: ENHANCE_ROWS[1][:2]},
                 id="enhance_without_reference"),
]  # fmt: skip


def evaluate(objective, rows: dict, slots: list[tuple[int, float]]):
    """Loss, stats and the gradient of each row's tokens, for the micro-batch of (row, weight) slots."""
    sides = range(len(rows[slots[0][0]]))
    answers = [rows[index][side] for side in sides for index, _ in slots]
    weights = [weight for _ in sides for _, weight in slots]
    logps, batch = micro_batch(answers, weights, tuple(index for index, _ in slots))
    loss, stats = objective(logps, batch, totals(2, 3, 2))
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


@pytest.mark.parametrize(("objective", "rows"), CASES)
def test_the_tokens_of_an_answer_share_one_gradient(objective, rows):
    *_, gradient = evaluate(objective, rows, [(3, 1.0)])
    for of_answer in gradient.split([len(answer) for answer in rows[3]]):
        assert of_answer.any()
        assert (of_answer == of_answer[0]).all()
