"""The algorithm of both stages, on one screen."""

import math
from collections.abc import Callable

import torch

from mede2.trainer.data.batches import Batches, Feed
from mede2.trainer.engine import Engine, NonFiniteUpdate
from mede2.trainer.generators import generator_states
from mede2.trainer.non_finite import leave_out
from mede2.trainer.objectives import Objective, Stats
from mede2.trainer.settings import Settings, learning_rate_at

Hook = Callable[[int, dict[str, float]], None]


def train(
    engine: Engine,
    objective: Objective,
    feed: Feed,
    settings: Settings,
    *,
    num_steps: int,
    before_update: Hook,
    after_update: Hook,
) -> None:
    """Run the updates of `feed.steps`.

    Every average is over the global batch, so the same global batch makes the same update whatever the number of
    ranks or accumulation steps. Ranks branch on reduced values only.

    Args:
        engine: the policy, sharded over the ranks.
        objective: from a micro-batch's log-probabilities to the loss.
        feed: what each update trains on, a pure function of the step; collated ahead by workers.
        settings: of the run.
        num_steps: updates of the whole run.
        before_update: called with the step and its metrics while the weights are still the old ones.
        after_update: the same after it; logs, evaluates, saves, and raises StopRequested when asked to stop.

    Raises:
        NonFiniteUpdate: on every rank, before anything is updated; names the rows. Not where `on_non_finite` lets the
            run go on without the update, whose metrics are then those that are finite.
    """
    for step in feed.steps:
        engine.set_learning_rate(learning_rate_at(settings, step, num_steps))
        totals = feed.batches.totals(step)  # pairs and answer tokens, over ranks and accumulation
        generators = generator_states()
        stats: Stats = {}
        suspects: list[str] = []
        for micro_batch in feed.micro_batches(step):
            micro_batch = micro_batch.to(engine.world.device, engine.dtype)
            token_logps = engine(micro_batch)  # (N,) fp32, answer tokens only, no logits
            loss, shares = objective(token_logps, micro_batch, totals)
            engine.backward(loss)
            stats = {name: stats.get(name, 0.0) + share for name, share in shares.items()}
            if not torch.isfinite(loss):
                suspects += micro_batch.sources

        stats["data_wait_ms"], feed.waited_s = 1e3 * feed.waited_s / engine.world.size, 0.0
        metrics = engine.world.sum(stats)  # shares of means: their sum over ranks is the mean
        try:
            if not math.isfinite(metrics["loss"]):
                engine.discard()
                raise NonFiniteUpdate(f"the loss is {metrics['loss']}")
            before_update(step, metrics)
            metrics["grad_norm"] = engine.update()  # raises on every rank if the gradients are not finite
            objective.observe(metrics)
        except NonFiniteUpdate as fault:
            metrics = leave_out(fault, step, metrics, suspects, generators, engine, feed.batches, settings)
        metrics["num_skipped"] = engine.num_skipped
        metrics["learning_rate"] = learning_rate_at(settings, step, num_steps)
        metrics["num_tokens"] = totals.num_tokens
        after_update(step, metrics)


@torch.no_grad()
def evaluate(engine: Engine, objective: Objective, batches: Batches) -> dict[str, float]:
    """The objective's metrics over a whole held-out set, averaged over all its rows or answer tokens.

    Raises:
        StopRequested: on every rank; what was evaluated so far is lost.
    """
    engine.deepspeed.eval()
    totals = batches.whole()
    stats: Stats = {}
    steps = range(batches.sampler.steps_per_epoch)
    feed = batches.feed(steps, "held-out batch")
    for step in steps:
        engine.world.stop_if_asked("in evaluation")
        for micro_batch in feed.micro_batches(step):
            micro_batch = micro_batch.to(engine.world.device, engine.dtype)
            _, shares = objective(engine(micro_batch), micro_batch, totals)
            stats = {name: stats.get(name, 0.0) + share for name, share in shares.items()}
    engine.deepspeed.train()
    return {f"eval/{name}": mean for name, mean in engine.world.sum(stats).items()}
