"""How many values ZeRO-3 holds gathered, and how often it gathers: DeepSpeed's own order of fetching and releasing,
played through.

As `deepspeed/runtime/zero/partitioned_param_coordinator.py` does once it knows the order of modules: a module's
parameters are gathered before it runs, together with the next ones of the order up to a bucket; after it they are
freed, unless they come again within the next `max_reuse_distance` values of the order, or were fetched ahead for
later. What is frozen and was gathered to recompute a layer is freed once the first of its modules has run backward, and
gathered again for the others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from mede2.trainer.planning.shapes import Module, Parameter

MAX_LIVE = MAX_REUSE_DISTANCE = 10**9  # DeepSpeed's defaults, stage3_max_live_parameters and stage3_max_reuse_distance


@dataclass(frozen=True)
class Gathered:
    """What playing one micro-batch through found.

    Attributes:
        at_head: values gathered while the head runs backward, when all activations are alive.
        in_layers: the most in the backward of any decoder layer.
        sent: values gathered over forward and backward, each time counted.
        fetches: how many times something was gathered.
    """

    at_head: int
    in_layers: int
    sent: int
    fetches: int


@dataclass(frozen=True)
class _Turn:
    module: Module
    backward: bool
    recomputes: bool = False


@lru_cache(maxsize=512)  # a search asks the same of many plans
def play(
    modules: tuple[Module, ...], differentiated: tuple[Module, ...], frozen: frozenset[Parameter], *,
    recomputed: bool, backward: bool, prefetch_bucket: int, persistence_threshold: int,
    max_live: int = MAX_LIVE, max_reuse: int = MAX_REUSE_DISTANCE,
) -> Gathered:  # fmt: skip
    """Play a micro-batch through.

    Args:
        modules: in the order of a forward.
        differentiated: those that a backward comes to.
        frozen: parameters that do not train.
        recomputed: layers run forward again in backward.
        backward: False for a forward alone, as the reference pass.
        prefetch_bucket, persistence_threshold, max_live, max_reuse: of the DeepSpeed file, values.
    """
    turns = list(_turns(modules, set(differentiated) if backward else set(), recomputed))
    reached, total = [0], 0  # values in the order before each turn
    for turn in turns:
        total += turn.module.numel
        reached.append(total)
    uses: dict[Parameter, list[int]] = {}
    for number, turn in enumerate(turns):
        for parameter in turn.module.parameters:
            uses.setdefault(parameter, []).append(number)
    available: set[Parameter] = set()
    held = sent = fetches = at_head = in_layers = ahead = 0
    fetched_for: dict[Parameter, int] = {}
    of_recomputation: set[Parameter] = set()
    for number, turn in enumerate(turns):
        sent_before = sent
        own = [p for p in turn.module.parameters if p.numel > persistence_threshold]
        for parameter in own:
            if parameter not in available:
                available.add(parameter)
                held, sent = held + parameter.numel, sent + parameter.numel
        ahead, room = max(ahead, number + 1), min(max_live - held, prefetch_bucket)
        while ahead < len(turns) and room > 0:
            for parameter in turns[ahead].module.parameters:
                if parameter.numel <= persistence_threshold:
                    continue
                fetched_for[parameter] = ahead
                if parameter not in available:
                    available.add(parameter)
                    held, sent, room = held + parameter.numel, sent + parameter.numel, room - parameter.numel
            ahead += 1
        fetches += sent > sent_before
        if turn.backward and turn.module.kind == "head":
            at_head = held
        elif turn.backward and turn.module.layer is not None:
            in_layers = max(in_layers, held)
        for parameter in own:
            later = next((use for use in uses[parameter] if use > number), None)
            near = later is not None and reached[later] - reached[number + 1] < max_reuse
            if not near and fetched_for.get(parameter, -1) <= number:
                available.discard(parameter)
                held -= parameter.numel
        if turn.recomputes:
            of_recomputation |= frozen.intersection(own)
        elif turn.backward and of_recomputation:
            held -= sum(parameter.numel for parameter in of_recomputation & available)
            available -= of_recomputation
            of_recomputation = set()
    return Gathered(at_head, in_layers, sent, fetches)


def _turns(modules: Sequence[Module], differentiated: set[Module], recomputed: bool) -> Iterator[_Turn]:
    for module in modules:
        yield _Turn(module, False)
    layer: list[Module] = []
    for module in reversed(modules):
        if layer and layer[0].layer != module.layer:
            yield from _layer_backward(layer, differentiated, recomputed)
            layer = []
        if module.layer is not None:
            layer.append(module)
        elif module in differentiated:
            yield _Turn(module, True)
    yield from _layer_backward(layer, differentiated, recomputed)


def _layer_backward(layer: list[Module], differentiated: set[Module], recomputed: bool) -> Iterator[_Turn]:
    """`layer`: its modules, last first."""
    wanted = [module for module in layer if module in differentiated]
    if wanted and recomputed:
        yield from (_Turn(module, False, recomputes=True) for module in reversed(layer))
    yield from (_Turn(module, True) for module in wanted)
