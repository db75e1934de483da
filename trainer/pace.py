"""The slow rank, named: under ZeRO-3 all ranks step together, so what each does alone is compared."""

import time
from dataclasses import dataclass
from socket import gethostname

import torch

from mede2.trainer.data.batches import Feed
from mede2.trainer.world import World

FACTOR = 1.5  # times the others' time: well beyond what cards of one kind differ by
IN_A_ROW = 2  # one slow look may be chance
SIZES = {"cuda": (2048, 64, torch.bfloat16), "cpu": (512, 4, torch.float32)}  # of the matrices, products, dtype


@dataclass(frozen=True)
class Look:
    """What a rank does alone.

    Attributes:
        host: its name.
        product_ms: of a fixed matrix product.
        wait_share: of the time since the last look, spent in waiting for its own data.
    """

    host: str
    product_ms: float
    wait_share: float


def slowness(looks: list[Look]) -> list[float]:
    """How many times slower each rank is than the median: in the product, or as the wait for its data would make all
    ranks in step with it. The lower median, so that of two ranks the faster one is the measure."""
    usual_ms = sorted(look.product_ms for look in looks)[(len(looks) - 1) // 2]
    usual_share = sorted(look.wait_share for look in looks)[(len(looks) - 1) // 2]
    return [
        max(look.product_ms / usual_ms, 1 / (1 - min(0.99, max(0.0, look.wait_share - usual_share)))) for look in looks
    ]


class Pace:
    """Looks at the ranks every so many updates.

    A look costs some 3 ms on a GPU and 30 ms on a CPU core, three small matrices, and one gathering of a few numbers;
    the time between two rows of metrics leaves it out. It draws no random number and touches nothing of the training.

    Args:
        world: the ranks.
        feed: of the training.
        every: updates from one look to the next; 0: never.
    """

    def __init__(self, world: World, feed: Feed, every: int):
        self.world, self.feed = world, feed
        self.every = every if world.size > 1 else 0
        self.times_slow = [0] * world.size
        self.since, self.waited_s = time.perf_counter(), 0.0

    def __call__(self, done: int) -> dict[str, float]:
        """Look after update `done`, if it is time. All ranks call it.

        Returns:
            for the update's row, where there was a look: `pace/slowest`, how many times slower than the median the
            slowest rank is, and `alarms/slow_rank`, 1 while a rank is slow and 0 where that ends.
        """
        if not self.every or done % self.every:
            return {}
        return self.judge(self.world.gather(self.look()), done)

    def look(self) -> Look:
        """At this rank."""
        now = time.perf_counter()
        share = (self.feed.waited_in_all_s - self.waited_s) / (now - self.since)
        found = Look(gethostname(), product_ms(self.world.device), share)
        self.since, self.waited_s = time.perf_counter(), self.feed.waited_in_all_s
        return found

    def judge(self, looks: list[Look], done: int) -> dict[str, float]:
        """What the looks at all ranks mean; a rank that was slow IN_A_ROW times is named, once."""
        factors, were_slow = slowness(looks), max(self.times_slow) >= IN_A_ROW
        self.times_slow = [
            times + 1 if factor >= FACTOR else 0 for times, factor in zip(self.times_slow, factors, strict=True)
        ]
        for rank, (look, factor) in enumerate(zip(looks, factors, strict=True)):
            if self.times_slow[rank] == IN_A_ROW:
                others = [other for number, other in enumerate(looks) if number != rank]
                self.world.say(
                    f"alarm at update {done}, slow_rank: rank {rank} on {look.host} is {factor:.1f} times slower than "
                    f"the median: a matrix product takes {look.product_ms:.3g} ms "
                    f"({_range([other.product_ms for other in others])} elsewhere), waiting for data "
                    f"{100 * look.wait_share:.0f} % of the time ({_range([100 * o.wait_share for o in others])} %)"
                )
        marks = {"pace/slowest": max(factors)}
        if max(self.times_slow) >= IN_A_ROW or were_slow:
            marks["alarms/slow_rank"] = float(max(self.times_slow) >= IN_A_ROW)
        return marks


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def product_ms(device: torch.device) -> float:
    """Milliseconds of some products of two fixed matrices, after one that does not count."""
    size, number, dtype = SIZES[device.type]
    matrix = torch.full((size, size), 1 / size, device=device, dtype=dtype)
    out = matrix @ matrix
    if device.type == "cpu":
        started = time.perf_counter()
        for _ in range(number):
            torch.mm(matrix, matrix, out=out)
        return 1e3 * (time.perf_counter() - started)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(number):
        torch.mm(matrix, matrix, out=out)
    last.record()
    last.synchronize()
    return first.elapsed_time(last)
