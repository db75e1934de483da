"""Between two updates: the first margins, the evaluation, the row of metrics, the checkpoint, a stop."""

import torch

from mede2.trainer import watchdog
from mede2.trainer.checkpoint import Checkpoints
from mede2.trainer.data.batches import Feed
from mede2.trainer.engine import Engine, on_nvme
from mede2.trainer.loop import evaluate
from mede2.trainer.metrics import Metrics
from mede2.trainer.moved import MovedCheck
from mede2.trainer.objectives import Objective
from mede2.trainer.ownership import Ownership
from mede2.trainer.pace import Pace
from mede2.trainer.prepare import Prepared
from mede2.trainer.settings import ENHANCE
from mede2.trainer.stopping import StopRequested
from mede2.trainer.weights_and_biases import started_run

# Mean |margin| before the first update, in nats (without beta), over the square root of a pair's answer tokens. It is
# rounding alone, which differs with layout and micro-batch: hundredths of a nat for a token in bf16, nearly independent
# from token to token, so that a sum over them grows as the root. Another model's tokens lie apart by tenths and more.
START_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}


class Between:
    """The hooks of the loop; all ranks call them.

    Args:
        run, engine, objective, held_out_objective, feed: as they train.
        owner: of the output.
        owed: metrics of the last update, if its evaluation was stopped; see `Checkpoint`.
    """

    def __init__(
        self, run: Prepared, engine: Engine, objective: Objective, held_out_objective: Objective | None, feed: Feed,
        owner: Ownership, owed: dict[str, float] | None,
    ):  # fmt: skip
        self.run, self.engine, self.objective, self.held_out_objective = run, engine, objective, held_out_objective
        self.settings, self.world, self.owner = run.settings, run.world, owner
        self.checkpoints = Checkpoints(
            engine, run.output / "checkpoints", run.identity, self.settings.keep_checkpoints, self.settings.keep_every,
            owner=owner, in_background=self.settings.async_checkpoints,
        )  # fmt: skip
        self.watch: Metrics | None = None  # on rank 0
        self.world.on_main(lambda: owner.write(lambda: self._begin_metrics(feed.steps.start - bool(owed))))
        self.pace = Pace(self.world, feed, self.settings.pace_every)
        self.check_moved = None if on_nvme(run.config) else MovedCheck(engine)
        if self.check_moved is None:
            self.world.say("offload to NVMe: whether all that trains moves is not checked")

    def _begin_metrics(self, first_step: int) -> None:
        tracker = started_run() if self.settings.wandb else None
        self.watch = Metrics(self.run.output, first_step, self.run.num_steps, f"stage {self.run.stage}", tracker)

    def before_update(self, step: int, metrics: dict[str, float]) -> None:
        settings = self.settings
        if step == 0 and self.run.stage == ENHANCE and settings.needs_reference and not settings.reference:
            check_start(metrics, settings.beta, self.engine.dtype)
        metrics.pop("rewards/margins_abs", None)

    def after_update(self, step: int, metrics: dict[str, float]) -> None:
        """Raises StopRequested on every rank, when a checkpoint is begun that holds what was done."""
        done, train = step + 1, self.run.train
        seconds = self.watch.lap() if self.watch else 0.0
        if self.check_moved and self.check_moved.waiting and "grad_norm" in metrics:  # not left out
            self.check_moved(has_image=train.totals(step).num_with_image > 0)
        metrics |= self.pace(done)
        metrics["epoch"] = done / train.sampler.steps_per_epoch
        try:
            self.complete(done, metrics, seconds)
        except StopRequested:
            self._save(done, owed=metrics | {"step_ms": seconds * 1e3})
            raise
        if self._is_due(done, self.settings.save_every) or self.world.asked_to_stop():
            self._save(done)
            self.world.stop_if_asked(f"after update {done} of {self.run.num_steps}")  # or while it was written
        self.checkpoints.settle()
        if self.watch:
            self.watch.start_lap()

    def complete(self, done: int, metrics: dict[str, float], seconds: float) -> None:
        """The evaluation that an update owes, and its row."""
        if self.run.held_out and self._is_due(done, self.settings.eval_every):
            metrics = metrics | evaluate(self.engine, self.held_out_objective, self.run.held_out)
            metrics.pop("eval/rewards/margins_abs", None)
        self.world.on_main(lambda: self.owner.write(lambda: self.watch.row(done, metrics, seconds)))

    def _is_due(self, done: int, every: int) -> bool:
        return done == self.run.num_steps or (every > 0 and done % every == 0)

    def _save(self, done: int, owed: dict[str, float] | None = None) -> None:
        self.world.on_main(lambda: self.owner.write(self.watch.sync))
        watchdog.phase(f"writing the checkpoint of update {done}")
        self.checkpoints.save(done, self.objective.state_dict(), owed)

    def close(self) -> None:
        if self.watch:
            self.watch.close()


def check_start(metrics: dict[str, float], beta: float, dtype: torch.dtype) -> None:
    """Raise ValueError if the margins of a first update are more than rounding, so that the reference is not the policy
    that starts."""
    gap = metrics["rewards/margins_abs"] / beta
    num_tokens = metrics["length/chosen"] + metrics["length/rejected"]
    allowed = START_TOLERANCE[dtype] * num_tokens**0.5
    if not gap <= allowed:
        raise ValueError(
            f"reference_cache: before the first update policy and reference must agree on every pair, but they are "
            f"{gap:.2g} nats apart, where {str(dtype).removeprefix('torch.')} explains {allowed:.2g} over "
            f"{num_tokens:.0f} answer tokens: the cached log-probabilities are not those of the starting policy; "
            "delete the cache to compute them again"
        )
