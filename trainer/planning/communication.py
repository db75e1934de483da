"""What a rank sends in an update: the collectives of ZeRO, as DeepSpeed 0.19 issues them.

ZeRO-1 reduces once for each update, ZeRO-2 and ZeRO-3 once for each micro-batch; gradients travel in the weights'
dtype. ZeRO-1 and ZeRO-2 all-reduce whole buckets and keep their share (DeepSpeed's `use_multi_rank_bucket_allreduce`);
then the weights' new shares are gathered. ZeRO-3 gathers in every forward and backward, and scatters sums.
"""

from dataclasses import dataclass

from mede2.trainer.planning.run import Run


@dataclass(frozen=True)
class Collective:
    """A collective of an update.

    Attributes:
        operation: as DeepSpeed's logger of communication calls it.
        logged: bytes of an update as that logger counts them: of what a rank puts in.
        wire: bytes that a rank sends over its slowest link, by a ring: twice (N - 1) / N of an all-reduce, (N - 1)
            shares of a gathering, (N - 1) / N of a scattering.
    """

    operation: str
    logged: int
    wire: int


def exchanged(run: Run) -> int:
    """Bytes of a token that a rank puts into a layer's all-to-all before attention: queries, keys and values, of fewer
    key-value heads than ranks once for each rank; nothing where each rank has rows of its own."""
    text, ranks = run.shape.text, run.settings.sequence_parallel_size
    return run.item * (text.queries + 2 * max(text.keys, ranks * text.head_dim)) if ranks > 1 else 0


def shared_rows(run: Run) -> Collective | None:
    """The all-to-alls of ranks that share rows: in each layer before attention and behind it, and for their gradients,
    and where layers are recomputed once more. They pass DeepSpeed by, so its logger does not know them."""
    text, ranks = run.shape.text, run.settings.sequence_parallel_size
    if ranks == 1:
        return None
    passes = 3 if run.settings.activation_checkpointing else 2
    of_token = exchanged(run) + run.item * text.queries
    sent = run.turns * passes * text.layers * run.own_tokens * of_token
    return Collective("all_to_all_single", 0, int((ranks - 1) / ranks * sent))


def collectives(run: Run) -> list[Collective]:
    """The collectives of an update."""
    e, ranks, turns = run.item, run.ranks, run.turns
    ring = (ranks - 1) / ranks
    if run.zero.stage == 3:
        small = [p.numel for p in run.parameters if p.numel <= run.zero.persistence_threshold]
        sent = turns * run.gathered.sent + sum(small)  # small ones whole everywhere: once, after the update
        reduced = turns * e * run.num_trained
        if ranks == 1:
            return []
        return [
            Collective("reduce_scatter_tensor", reduced, int(ring * reduced)),
            Collective("all_gather_into_tensor", e * sent // ranks, int(ring * e * sent)),
        ]
    reduced = e * run.num_trained * (turns if run.zero.stage == 2 else 1)
    found = [Collective("all_reduce", reduced, int(2 * ring * reduced))]
    if ranks > 1:
        weights = e * run.num_trained
        found.append(Collective("all_gather_into_tensor", weights // ranks, int(ring * weights)))
    return found
