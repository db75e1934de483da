"""Bytes that a forward keeps for its backward, by tensor: transformers' modules, our attention, our head.

Legend: e bytes of a value in the weights' dtype, H hidden size, Q all query heads, K all key heads (each times its
width), I the MLP's inner size, V vocabulary; small letters are the vision tower's.

Nothing is fitted: every term is a tensor that autograd saves. Weights are not counted, and a tensor that two operations
save counts once. The language model's norms and MLPs keep less than transformers' (`trainer/lean_layers.py`). In the
tower, RMSNorm computes in fp32 and so saves its input in 4 bytes, whatever the dtype; in fp32 that is the very residual
stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from mede2.trainer.planning.lengths import Row
from mede2.trainer.planning.shapes import Shape, Text, Vision

FP32 = 4
INDEX = 8  # bytes of an int64
GROUPED_BYTES = 256 * 2**20  # as in kernels/logps_torch.py
KEPT_CHUNK_BYTES, MIN_CHUNK = 8 * 2**20, 512


@dataclass(frozen=True)
class Training:
    """What of the computation decides what is saved.

    Attributes:
        item: e.
        trains_text: the language model's own weights train.
        lora_rank, lora_dropout: of an adapter on it.
        trains_tower, trains_merger: as they say.
        masked_by_branches: answers beyond the first are masked (`attention.branched_attention`): sdpa.
        sequence_parallel: ranks that share each row; attention apart, each has its part of the tokens.
        mlp_tiles: more than one: MLPs keep their input alone.
    """

    item: int
    trains_text: bool
    lora_rank: int
    lora_dropout: float
    trains_tower: bool
    trains_merger: bool
    masked_by_branches: bool
    sequence_parallel: int = 1
    mlp_tiles: int = 1

    def own(self, tokens: int) -> int:
        """Of so many tokens, those of one rank."""
        return -(-tokens // self.sequence_parallel)

    @property
    def text_differentiates(self) -> bool:
        return self.trains_text or self.lora_rank > 0 or self.trains_merger or self.trains_tower


def lean_norm(size: int, item: int) -> int:
    """Bytes of a token: its input and 1 / rms. The output is the next operation's."""
    return item * size + FP32


def rms_norm(size: int, item: int) -> int:
    """Of transformers' own, whose weight trains: its input in fp32, 1 / rms, and the normalized values."""
    return FP32 * size + FP32 + item * size


def layer_norm(size: int, item: int) -> int:
    """Input, mean and 1 / deviation."""
    return item * size + 2 * FP32


def decoder_token(text: Text, training: Training, num_linears: int = 7) -> int:
    """Bytes of a token in a decoder layer, without what its attention saves.

    Args:
        text: the language model.
        training: what trains.
        num_linears: of a layer, that carry an adapter.
    """
    e, hidden = training.item, text.hidden
    tiled = training.mlp_tiles > 1
    inputs_saved = training.trains_text or training.lora_rank > 0
    total = 2 * lean_norm(hidden, e)
    if inputs_saved:
        total += 2 * e * hidden  # what q, k, v and what gate, up read; what o reads is the attention's
    elif tiled:
        total += e * hidden
    if text.qk_norm:
        total += lean_norm(text.head_dim, e) * (text.heads + text.kv_heads)
    if training.lora_rank:
        total += (num_linears - 3) * e * training.lora_rank  # what each B reads
        if training.lora_dropout:  # each A reads a copy of its own, and dropout keeps a byte for each value
            total += (e + 1) * (3 * hidden + text.queries)
    return total + (0 if tiled else mlp_token(text, training))


def spared_token(text: Text, training: Training) -> int:
    """Bytes of a token in a decoder layer that pass through memory as what is saved does, but are computed again and
    not kept: copies of norms' inputs in fp32, normalized values, activations of gates and their products."""
    e, mlps = training.item, 2 if training.trains_text else 1
    in_norms = 2 * text.hidden + (text.head_dim * (text.heads + text.kv_heads) if text.qk_norm else 0)
    return (FP32 - (0 if training.trains_text else e)) * in_norms + mlps * e * text.intermediate


def mlp_token(text: Text, training: Training) -> int:
    """Bytes of a token in a layer's MLP, its input left out: gate, up, and their product where an adapter reads it."""
    e, inner = training.item, text.intermediate
    total = 2 * e * inner
    if training.lora_rank:
        total += e * inner + 3 * e * training.lora_rank
        if training.lora_dropout:
            total += (e + 1) * (2 * text.hidden + inner)
    return total


def tile_bytes(text: Text, tokens: int, training: Training) -> int:
    """Bytes that the MLP's tile at hand saves when it is computed again; nothing where there are no tiles."""
    if training.mlp_tiles == 1:
        return 0
    return -(-training.own(tokens) // training.mlp_tiles) * mlp_token(text, training)


def attention_row(text: Text, row: Row, training: Training, branched: bool) -> int:
    """Bytes of a row that a layer's attention saves.

    Queries, keys and values after rotation, output and log-sum-exp. Branch by branch, an answer beyond the first sees
    copies of the prompt's keys and values beside its own; the pieces' outputs are joined in a tensor that the output
    projection saves, and so is what comes back from the ranks that share the row, each of which has all of its tokens
    for a part of the heads.
    """
    e, tokens, ranks = training.item, row.tokens, training.sequence_parallel
    queries, keys = text.queries // ranks, max(text.keys // ranks, text.head_dim)
    total = tokens * (e * (queries + 2 * keys) + e * queries + FP32 * text.heads // ranks)
    if (branched or ranks > 1) and (training.trains_text or training.lora_rank):
        total += tokens * e * queries
    for answer in row.answers[1:] if branched else ():
        total += 2 * e * keys * (row.prompt + answer)
    return total


def head(shape: Shape, num_rows: int, num_groups: int, training: Training, in_blocks: bool) -> int:
    """Bytes that the log-probabilities keep: the answers' hidden states, targets, log-sum-exp, the values themselves;
    in fp32 the exponentials or the gradients by group that spare the backward its logits (`kernels/logps_torch.py`).

    Args:
        shape: of the model.
        num_rows: answer tokens.
        num_groups: answers.
        training: what trains.
        in_blocks: the torch implementation in fp32, in groups.
    """
    hidden, vocabulary = shape.text.hidden, shape.text.vocabulary
    total = num_rows * (training.item * hidden + 2 * INDEX + 2 * FP32)
    if not in_blocks:
        return total
    grouped_rows = num_groups * (hidden + 1)
    keeps = num_rows < grouped_rows
    if (num_rows if keeps else grouped_rows) * vocabulary * FP32 > GROUPED_BYTES:
        return total
    if keeps:
        chunks = -(-vocabulary // max(MIN_CHUNK, KEPT_CHUNK_BYTES // (num_rows * FP32)))
        return total + num_rows * (vocabulary + chunks) * FP32
    weight_gradients = num_groups * vocabulary * hidden * FP32 if training.trains_text else 0
    return total + weight_gradients + num_rows * hidden * FP32


def vision_patch(vision: Vision, family: str, item: int) -> int:
    """Bytes of a patch in a block of a tower that trains."""
    e, hidden, inner = item, vision.hidden, vision.intermediate
    mlp = 4 * e * inner if vision.gated else 2 * e * inner
    if family == "qwen2_5_vl":
        norms = 2 * (rms_norm(hidden, e) + e * hidden)
    else:
        norms = 2 * (layer_norm(hidden, e) + e * hidden)
    fused = family != "internvl"  # the values are a view of the joint projection, which stays
    attention = e * hidden * ((3 + 2) if fused else 3) + e * hidden * (2 if fused else 1) + FP32 * vision.heads
    scales = 0 if fused else 2 * e * hidden  # InternVL's layer scale saves what it scales
    return norms + attention + mlp + scales


def merger_token(vision: Vision, family: str, item: int) -> int:
    """Bytes of an image token in a merger that trains: its normalized input, and both sides of its activation."""
    merged = vision.hidden * vision.merge**2
    inner = vision.out_hidden if family == "internvl" else merged
    is_rms = family == "qwen2_5_vl"
    norm = vision.merge**2 * rms_norm(vision.hidden, item) if is_rms else layer_norm(merged, item)
    return norm + item * merged + 2 * item * inner


def activations(
    shape: Shape, rows: Sequence[Row], num_patches: int, training: Training, *, checkpointing: bool, offload: bool,
    in_blocks: bool,
) -> dict[str, int]:  # fmt: skip
    """Bytes alive at the end of a micro-batch's forward, by item.

    Args:
        shape: of the model.
        rows: of the micro-batch.
        num_patches: of all its images.
        training: what trains.
        checkpointing: layers keep their input alone.
        offload: and those wait in host memory.
        in_blocks: as in `head`.
    """
    text, vision, e = shape.text, shape.vision, training.item
    if not training.text_differentiates:
        return {}
    tokens = sum(row.tokens for row in rows)
    branched = training.masked_by_branches and any(len(row.answers) > 1 for row in rows)
    layer = layer_bytes(shape, rows, training)
    num_answers = sum(len(row.answers) for row in rows)
    found = {"language model": text.layers * layer, "log-probabilities": head(
        shape, head_rows(rows, training), num_answers, training, in_blocks
    )}  # fmt: skip
    inputs = text.layers * training.own(tokens) * e * text.hidden
    if checkpointing:
        found["language model"] = 0 if offload else inputs
    ends = lean_norm(text.hidden, e) + 2 * e * text.head_dim  # the last norm; cosines and sines
    found["language model"] += training.own(tokens) * ends
    if branched:  # the masks of answers beyond the first, one for all layers, in rows of multiples of 8
        found["language model"] += sum(
            e * answer * (-(-(row.prompt + answer) // 8) * 8) for row in rows for answer in row.answers[1:]
        )
    if training.trains_tower:
        block = vision_patch(vision, shape.family, e)
        found["vision tower"] = vision.layers * num_patches * (e * vision.hidden if checkpointing else block)
    if training.trains_merger or training.trains_tower:
        image_tokens = shape.image_tokens(num_patches)
        found["vision tower"] = found.get("vision tower", 0) + image_tokens * merger_token(vision, shape.family, e)
    return found


def head_rows(rows: Sequence[Row], training: Training) -> int:
    """Answer tokens of the rank that has most: answers lie together, and one rank may have nothing else."""
    return min(sum(sum(row.answers) for row in rows), training.own(sum(row.tokens for row in rows)))


def layer_bytes(shape: Shape, rows: Sequence[Row], training: Training) -> int:
    """Bytes that one decoder layer saves of a micro-batch; with checkpointing, those of the one being recomputed."""
    text = shape.text
    branched = training.masked_by_branches and any(len(row.answers) > 1 for row in rows)
    tokens = sum(row.tokens for row in rows)
    own = training.own(tokens)
    return own * decoder_token(text, training) + sum(attention_row(text, row, training, branched) for row in rows)
