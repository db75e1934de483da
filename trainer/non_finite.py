"""An update whose loss or gradient is not finite: it is undone before it happens; the run stops, or goes on without."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from mede2.trainer.data.batches import Batches
from mede2.trainer.engine import Engine, NonFiniteUpdate
from mede2.trainer.generators import set_generator_states
from mede2.trainer.settings import Settings


def leave_out(
    fault: NonFiniteUpdate, step: int, metrics: Mapping[str, float], suspects: Sequence[str],
    generators: Mapping[str, Tensor], engine: Engine, batches: Batches, settings: Settings,
) -> dict[str, float]:  # fmt: skip
    """Go on, by the setting `on_non_finite`, as if the batch of an update had never been there. All ranks call it.

    The engine has let go of the gradients; what dropout drew is given back here.

    Args:
        fault: what is not finite.
        step: of the update, from 0.
        metrics: of the update.
        suspects: this rank's rows in micro-batches whose loss is not finite; where no rank has any, the rows of the
            global batch are named.
        generators: `generator_states` before the update.
        engine, batches, settings: of the run.

    Returns:
        the metrics that are finite.

    Raises:
        NonFiniteUpdate: the policy is to stop, or more than `max_skipped` updates are left out; names the rows.
    """
    rows = sorted({row for part in engine.world.gather(suspects) for row in part}) or batches.rows(step)
    said = f"step {step + 1}: {fault}; rows: {', '.join(rows)}"
    if settings.on_non_finite == "stop":
        raise NonFiniteUpdate(said) from fault
    if engine.num_skipped > settings.max_skipped:
        raise NonFiniteUpdate(
            f"{said}; {engine.num_skipped} updates would be left out, more than max_skipped: {settings.max_skipped}"
        ) from fault
    set_generator_states(generators)
    engine.world.say(
        f"warning: {said}; this update is left out, {engine.num_skipped} so far of at most {settings.max_skipped}"
    )
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
