"""The longest micro-batch of a run goes first, dry: what does not fit into memory shows at once, and with its rows."""

import torch

from mede2.trainer.data.batches import Batches
from mede2.trainer.engine import Engine
from mede2.trainer.gradients import clear_gradients
from mede2.trainer.objectives import Objective


def heaviest(batches: Batches, steps: range) -> tuple[int, int]:
    """The update and the number of the micro-batch in which some rank runs the most tokens, padding counted."""
    sampler = batches.sampler
    _, step, turn = max(
        (sampler.num_computed(slots), -step, -turn) for step in steps for turn, slots in enumerate(sampler.turns(step))
    )  # the first of equals
    return -step, -turn // sampler.batch.data_parallel_size


def rehearse(engine: Engine, objective: Objective, batches: Batches, steps: range) -> None:
    """Forward and backward of the heaviest micro-batch: nothing is updated, the first update finds no gradients, and
    what dropout draws is given back. A loss that is not finite is judged when its update comes.

    Raises:
        ValueError: it does not fit into memory; names its rows and what would help.
    """
    step, number = heaviest(batches, steps)
    slots = batches.sampler.micro_batches(step, batches.world.rank)[number]
    micro_batch = batches.collator(batches.dataset.examples, slots).to(engine.world.device, engine.dtype)
    try:
        with torch.random.fork_rng([engine.world.device] if engine.world.device.type == "cuda" else []):
            loss, _ = objective(engine(micro_batch), micro_batch, batches.totals(step))
            engine.backward(loss)
            clear_gradients(engine.deepspeed.optimizer)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        num_rows, length = micro_batch.inputs["input_ids"].shape
        rows = ", ".join(micro_batch.sources)
        raise ValueError(
            f"out of memory in the longest micro-batch, {num_rows} x {length} tokens, of {rows}: lower "
            "micro_batch_size, pack_length or --max-pixels, leave out such rows, or set activation_checkpointing=true, "
            f"mlp_tiles or sequence_parallel_size ({str(error).splitlines()[0]})"
        ) from error
