"""The losses against TRL's own code, on the same log-probabilities: values and gradients to 1e-5."""

import os
from types import SimpleNamespace

import pytest
import torch

from mede2.trainer.losses import LOSSES, Answers, Pairs, sum_by_sequence

BETA, SMOOTHING, GAMMA = 0.3, 0.15, 0.6
LENGTHS = (3, 7, 5, 8, 2, 6)  # three chosen answers, then three rejected ones
TRL_NAMES = {"nll": "sft"}  # where TRL's name is another
WITH_TRL = {  # options of ours; `sigmoid` has no smoothing in TRL's DPO trainer
    "sigmoid": {"beta": BETA},
    "robust": {"beta": BETA, "label_smoothing": SMOOTHING},
    "sigmoid_norm": {"beta": BETA},
    "hinge": {"beta": BETA},
    "ipo": {"beta": BETA},
    "bco_pair": {"beta": BETA},
    "nll": {},
}


@pytest.fixture(scope="module")
def trl():
    """The three trainer classes, without an instance's model, data and arguments: the losses read a few attributes."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    pytest.importorskip("trl", reason="trl is not installed (it is in the extra `test`)")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer

    return SimpleNamespace(CPOTrainer=CPOTrainer, DPOTrainer=DPOTrainer, ORPOTrainer=ORPOTrainer)


def instance(trainer_class: type, **attributes):
    """A trainer that was never set up, with what its loss reads."""
    trainer = object.__new__(trainer_class)
    vars(trainer).update(attributes)
    return trainer


@pytest.fixture
def logps() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token log-probabilities (6, 8) with gradients, zero beyond each answer, their mask, and the reference's (6,)."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).double()
    tokens = -3 * torch.rand(mask.shape, generator=generator, dtype=torch.float64)
    reference = (tokens * mask).sum(1) + torch.randn(len(LENGTHS), generator=generator, dtype=torch.float64)
    return tokens.requires_grad_() * mask, mask, reference


def our_pairs(tokens: torch.Tensor, mask: torch.Tensor, reference: torch.Tensor | None = None) -> Pairs:
    owner, place = mask.nonzero(as_tuple=True)
    sums = sum_by_sequence(tokens[owner, place], owner, len(mask)).split(3)
    references = (None, None) if reference is None else reference.split(3)
    return Pairs(*map(Answers, sums, mask.sum(1).split(3), references))


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor) -> None:
    gradients = [torch.autograd.grad(loss, tokens, retain_graph=True)[0] * mask for loss in (ours, theirs)]
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WITH_TRL)
def test_the_loss_is_that_of_trls_dpo_trainer(trl, logps, name):
    """Its whole loss method runs, over a model that answers with the given log-probabilities."""
    tokens, mask, reference = logps
    zeros = torch.zeros_like(mask)
    trainer = instance(
        trl.DPOTrainer, accelerator=SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x),
        model=SimpleNamespace(training=False), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
        f_divergence_type="reverse_kl", loss_types=[TRL_NAMES.get(name, name)], loss_weights=[1.0], beta=BETA,
        label_smoothing=SMOOTHING, use_weighting=False,
        _metrics={"eval": {key: [] for key in ("entropy", "num_tokens", "logits/chosen", "logits/rejected",
                  "mean_token_accuracy", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
                  "logps/chosen", "logps/rejected")}}, _total_train_tokens=0,
    )  # fmt: skip
    outputs = SimpleNamespace(log_probs=tokens, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    prompt = torch.zeros(len(mask), 1)
    inputs = {
        "input_ids": torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.int64),
        "attention_mask": torch.ones(len(mask), mask.shape[1] + 1),
        "completion_mask": torch.cat([prompt, mask], 1).long(),
        "ref_chosen_logps": reference[:3], "ref_rejected_logps": reference[3:],
    }  # fmt: skip
    theirs = trainer._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
    losses = LOSSES[name](our_pairs(tokens, mask, reference), **WITH_TRL[name])
    assert_same(losses.sum() / mask[:3].sum() if name == "nll" else losses.mean(), theirs, tokens, mask)


def test_simpo_is_that_of_trls_cpo_trainer(trl, logps):
    tokens, mask, _ = logps
    trainer = instance(
        trl.CPOTrainer, alpha=0.0, loss_type="simpo", beta=BETA, simpo_gamma=GAMMA, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, *_ = trainer.cpo_loss(*(tokens.sum(1) / mask.sum(1)).split(3))
    ours = LOSSES["simpo"](our_pairs(tokens, mask), beta=BETA, simpo_gamma=GAMMA)
    assert_same(ours.mean(), theirs.mean(), tokens, mask)


def test_orpo_is_that_of_trls_orpo_trainer(trl, logps):
    """TRL adds `-beta * log sigmoid(log odds ratio)` to the NLL; here the weight in the mix stands for its beta."""
    tokens, mask, _ = logps
    trainer = instance(trl.ORPOTrainer, beta=BETA, accelerator=SimpleNamespace(device="cpu"))
    theirs, *_ = trainer.odds_ratio_loss(*(tokens.sum(1) / mask.sum(1)).split(3))
    assert_same(BETA * LOSSES["orpo"](our_pairs(tokens, mask)).mean(), -theirs.mean(), tokens, mask)
