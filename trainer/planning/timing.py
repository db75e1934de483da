"""Time of an update, of a reference pass, of an evaluation: operations, bytes and links at assumed shares of rates.

What is counted comes from `work`, `saved` and `communication`; the shares below are assumptions, not measurements, and
are printed with every plan. Not counted: waiting for data, kernel launches, stragglers, writing of checkpoints.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from mede2.trainer.planning.communication import collectives, shared_rows
from mede2.trainer.planning.hardware import Cluster
from mede2.trainer.planning.memory import shares
from mede2.trainer.planning.run import Run
from mede2.trainer.planning.saved import FP32, layer_bytes, spared_token
from mede2.trainer.planning.work import Sizes, Work, forward_work

MATRIX_SHARE = 0.6  # of the datasheet's dense bf16 rate that large products reach
MEMORY_SHARE = 0.8  # of the memory's bandwidth that operations on elements reach
LINK_SHARE = 0.75  # of a link's bandwidth that a ring reaches
LATENCY_S = 30e-6  # of a collective
TIMES_MOVED = (
    4  # of what a layer makes: written and read in forward, read in backward or made again, its gradient written
)
ADAM_BYTES = 4 * FP32 * 2  # of a value: master, two moments and gradient, read and about all written


@dataclass(frozen=True)
class Timing:
    """Times of one rank.

    Attributes:
        products_s, elements_s, weights_s, adam_s: of an update, by what bounds them: the matrix rate, the memory under
            operations on elements, the memory under the weights that a micro-batch reads, Adam.
        communication_s: of an update's collectives.
        transfers_s: between device and host.
        overlapped: collectives run beside the computation (`overlap_comm`).
        tower_s: of the vision tower over one example's images, where it runs once for all steps, else 0.
        forward_s: of a forward alone, an example on a rank, gathering included.
        tokens, examples: of an update over all ranks.
        needed: operations that an update needs over all ranks, nothing recomputed.
        rate: operations a second of all GPUs by the datasheet.
    """

    products_s: float
    elements_s: float
    weights_s: float
    adam_s: float
    communication_s: float
    transfers_s: float
    overlapped: bool
    tower_s: float
    forward_s: float
    tokens: float
    examples: int
    needed: float
    rate: float

    @cached_property
    def step_s(self) -> float:
        compute = self.products_s + self.elements_s + self.weights_s
        passing = max(compute, self.communication_s) if self.overlapped else compute + self.communication_s
        return passing + self.adam_s + self.transfers_s

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s

    @property
    def mfu(self) -> float:
        return self.needed / self.rate / self.step_s


def plan_time(run: Run, cluster: Cluster, sizes: Sizes) -> Timing:
    """Time of an update of average examples.

    Args:
        run: with the lengths of an average example.
        cluster: where it runs.
        sizes: of an average example.
    """
    answers, prompts = len(run.lengths.answers), 1 if run.shared_prefix else len(run.lengths.answers)
    head_rows = answers * sizes.answer
    once = forward_work(run.shape, sizes, prompts=prompts, head_rows=head_rows, answers=answers)
    if run.corrupted:
        again = forward_work(run.shape, sizes, prompts=1, head_rows=sizes.answer, answers=1)
        once = Work(once.vision + again.vision, once.language + again.language, once.head + again.head)
        prompts, answers = prompts + 1, answers + 1
    sharing = run.settings.sequence_parallel_size  # each of these ranks runs the tower over the same images
    tower_s = sharing * once.vision / prompts / (cluster.matrix_tflops * 1e12 * MATRIX_SHARE)
    if not run.runs_tower:
        once = Work(0.0, once.language, once.head)
    needed, _ = _training_work(run, once)
    once = Work(sharing * once.vision, once.language, once.head)
    _, spent = _training_work(run, once)
    tokens = prompts * sizes.prompt + answers * sizes.answer
    if run.settings.mlp_tiles > 1:  # the MLPs' three products once more
        spent += tokens * run.shape.text.layers * 6 * run.shape.text.hidden * run.shape.text.intermediate
    examples, ranks = run.settings.global_batch_size, run.ranks
    matrix = cluster.matrix_tflops * 1e12 * MATRIX_SHARE * (1 if run.item == 2 else 0.5)
    memory = cluster.memory_gb_s * 1e9 * MEMORY_SHARE
    per_rank = examples / ranks
    whole = replace(run.training, sequence_parallel=1, mlp_tiles=1)
    text, row_tokens = run.shape.text, sum(row.tokens for row in run.rows)
    layer = layer_bytes(run.shape, run.rows, whole) + row_tokens * spared_token(text, whole)
    moved = text.layers * layer / run.examples
    passes = 3 + (run.settings.activation_checkpointing is True)
    weight_bytes = run.item * (run.num_parameters - run.num_quantized) + run.num_quantized / 2
    adam, transfers = _adam(run, cluster, memory)
    forward = (once.total / matrix + moved / 2 / memory) + sharing * _forward_gathering(run, cluster) / run.examples
    return Timing(
        products_s=per_rank * spent / matrix, elements_s=per_rank * TIMES_MOVED * moved / memory,
        weights_s=run.turns * passes * weight_bytes / memory, adam_s=adam,
        communication_s=sum(_link_time(each.wire, cluster) for each in collectives(run))
        + LATENCY_S * run.turns * run.gathered.fetches + _exchange_time(run, cluster),
        transfers_s=transfers, overlapped=run.zero.overlap,
        tower_s=0.0 if run.runs_tower else tower_s, forward_s=forward,
        tokens=examples * tokens, examples=examples,
        needed=examples * needed, rate=ranks * cluster.matrix_tflops * 1e12 * (1 if run.item == 2 else 0.5),
    )  # fmt: skip


def _training_work(run: Run, once: Work) -> tuple[float, float]:
    """Operations of an example that a step needs, and those that it takes with recomputation: a backward takes twice
    its forward where weights train, once where only what lies before them does."""
    training, recomputes = run.training, run.settings.activation_checkpointing
    text = 3 if training.trains_text else 2
    tower = 3 if training.trains_tower else 1
    needed = text * (once.language + once.head) + tower * once.vision
    again = (once.language + (once.vision if training.trains_tower else 0)) if recomputes else 0
    return needed, needed + again + (once.head if run.item == 2 else 0)  # in 16 bits the logits are computed again


def _link_time(wire: float, cluster: Cluster) -> float:
    """A ring over all GPUs: as many rings cross a node's border as it has ports, and each passes every GPU."""
    bandwidth = cluster.link_gb_s
    if cluster.nodes > 1:
        bandwidth = min(bandwidth, cluster.network_gb_s * cluster.gpus_per_node)
    return wire / (bandwidth * 1e9 * LINK_SHARE)


def _exchange_time(run: Run, cluster: Cluster) -> float:
    """Of the all-to-alls of ranks that share rows; each sends over its own link, or its own part of the network."""
    found = shared_rows(run)
    if found is None:
        return 0.0
    inside = run.settings.sequence_parallel_size <= cluster.gpus_per_node
    bandwidth = cluster.link_gb_s if inside else min(cluster.link_gb_s, cluster.network_gb_s)
    calls = run.turns * run.shape.text.layers * 2 * (3 if run.settings.activation_checkpointing else 2)
    return found.wire / (bandwidth * 1e9 * LINK_SHARE) + LATENCY_S * calls


def _forward_gathering(run: Run, cluster: Cluster) -> float:
    sent = run.gathered_in_forward.sent
    return _link_time(run.item * sent * (run.ranks - 1) / run.ranks, cluster)


def _adam(run: Run, cluster: Cluster, memory: float) -> tuple[float, float]:
    """Seconds of Adam and of what passes between device and host in an update."""
    share = shares(run)
    to_host = cluster.host_gb_s * 1e9 * LINK_SHARE
    transfers = 0.0
    if run.zero.offload_param:
        held = run.item * run.num_parameters / run.ranks
        transfers += run.turns * (3 if run.settings.activation_checkpointing else 2) * held / to_host
    if run.settings.activation_offload:
        inputs = run.turns * run.shape.text.layers * run.own_tokens * run.item * run.shape.text.hidden
        transfers += 2 * inputs / to_host
    if run.zero.offload_optimizer:
        transfers += (run.turns * FP32 + run.item) * share / to_host
        return share * ADAM_BYTES * cluster.gpus_per_node / (cluster.host_memory_gb_s * 1e9 * MEMORY_SHARE), transfers
    return share * ADAM_BYTES / memory, transfers
