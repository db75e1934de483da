"""Memory of a rank, item by item and at each moment of an update at which it may be largest.

Legend: Psi values that train, Phi all values, N ranks, e bytes of a weight. ZeRO's states as DeepSpeed 0.19 holds them
with `grad_accum_dtype` fp32 (bf16: Adam's two moments and the masters of 4 bytes each):

- ZeRO-1 in bf16 is DeepSpeed's BF16_Optimizer: every rank holds fp32 gradients of all, 4 Psi, beside those of autograd.
- ZeRO-2 adds each gradient to the rank's share of 4 Psi / N as soon as it is reduced.
- ZeRO-3 has that share as one flat buffer, which Adam gets as it is, but for an offload's, of which it gets a copy; in
  fp32 the weights are their own masters (`trainer/lean_zero3.py`).
"""

from dataclasses import dataclass

from mede2.trainer.planning.communication import exchanged
from mede2.trainer.planning.run import Run
from mede2.trainer.planning.saved import FP32, INDEX, activations, head_rows, layer_bytes, tile_bytes

CHUNK_BYTES, MIN_CHUNK = 32 * 2**20, 512  # as in kernels/logps_torch.py
TRITON_CHUNK_BYTES, TRITON_MIN_CHUNK = 128 * 2**20, 1024  # as in kernels/logps_triton.py
BLOCK_8BIT = 256  # values that share a scale in bitsandbytes' 8-bit Adam, with two tables of 256 fp32 entries
NF4_BLOCK, NF4_NESTED = 64, 256  # values of a scale of 8 bits; scales of one in fp32 (QLoRA, arXiv 2305.14314)
CONTEXT_BYTES = int(1.5 * 2**30)  # assumed: CUDA context, NCCL's buffers, cuBLAS' workspace
NORM_AT_ONCE = 2**20  # as in trainer/lean_zero3.py
SLACK = 0.05  # assumed: of what comes and goes, kept by the allocator between uses


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that holds most.

    Attributes:
        items: on the device, by name; those that last, then those that come and go at the moment of the peak.
        moments: on the device, by moment.
        host: in the memory of a node's host, for each rank, by name.
        nvme: on disk, for each rank.
        states: weights, gradients and optimizer, by name, for the check.
        activations: at the end of a forward.
    """

    items: dict[str, int]
    moments: dict[str, int]
    host: dict[str, int]
    nvme: int
    states: dict[str, int]
    activations: int

    @property
    def peak(self) -> int:
        """Of live tensors."""
        return max(self.moments.values())

    @property
    def total(self) -> int:
        """What a device must have: the peak, slack, and what is no tensor."""
        return sum(self.items.values())

    @property
    def host_total(self) -> int:
        return sum(self.host.values())


def shares(run: Run) -> int:
    """Values of a rank's share of what trains; ZeRO-3 rounds up parameter by parameter."""
    if run.zero.stage == 3:
        return sum(-(-parameter.numel // run.ranks) for parameter in run.trained)
    return -(-run.num_trained // run.ranks)


def weights(run: Run) -> int:
    """Bytes of weights that a rank holds throughout."""
    if run.zero.stage == 3:
        persistent = [p.numel for p in run.parameters if p.numel <= run.zero.persistence_threshold]
        held = 0 if run.zero.offload_param else sum(-(-p.numel // run.ranks) for p in run.parameters)
        return run.item * (held + sum(persistent))
    quantized = run.num_quantized
    packed = quantized // 2 + quantized // NF4_BLOCK + FP32 * (quantized // (NF4_BLOCK * NF4_NESTED))
    return run.item * (run.num_parameters - quantized) + packed


def optimizer(run: Run) -> dict[str, int]:
    """Bytes of a rank's masters and moments, wherever they are."""
    share = shares(run)
    own_masters = run.zero.stage == 3 and run.item == FP32 and not run.zero.offload_optimizer
    if run.settings.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        moments = 2 * share + 2 * FP32 * -(-share // BLOCK_8BIT) + 2 * 256 * FP32
    else:
        moments = 2 * FP32 * share
    return {"masters": 0 if own_masters else FP32 * share, "moments": moments}


def gradients(run: Run) -> int:
    """Bytes of gradients on the device after a backward."""
    if run.zero.offload_optimizer and run.zero.stage > 1:
        return 0
    if run.zero.stage == 1:
        return (FP32 + (run.item if run.item < FP32 else 0)) * run.num_trained
    return FP32 * shares(run)


def in_blocks(run: Run) -> bool:
    """Whether the log-probabilities keep exponentials or gradients by answer (fp32, plain torch)."""
    return run.item == FP32


def head_working(run: Run) -> int:
    """Bytes that the head's backward takes beside what was saved: a chunk of logits, the gradients."""
    num_rows, text = head_rows(run.rows, run.training), run.shape.text
    e, trains = run.item, run.training.trains_text
    whole = e * text.vocabulary * text.hidden if trains else 0  # the weight's gradient
    logit_bytes = e + (FP32 if e < FP32 else 0)
    if in_blocks(run):
        return whole + num_rows * 2 * text.hidden * FP32
    if run.in_triton:  # the logits' gradient by chunk, and the products' sums in fp32
        chunk = max(1, TRITON_CHUNK_BYTES // (num_rows * e) // TRITON_MIN_CHUNK) * TRITON_MIN_CHUNK
        return whole + num_rows * (min(chunk, text.vocabulary) * e + 2 * FP32 * text.hidden)
    chunk = CHUNK_BYTES // (num_rows * logit_bytes + 2 * text.hidden * FP32)
    chunk = min(text.vocabulary, max(MIN_CHUNK, chunk))
    return whole + num_rows * chunk * logit_bytes + chunk * text.hidden * e * trains + 2 * num_rows * text.hidden * FP32


def layer_working(run: Run) -> int:
    """Bytes of gradients in the backward of a decoder layer: of the MLP's inner values and of the residual stream, and
    the largest weight's own, with the copy that is sent; of tiles, with what the one at hand saves; where ranks share
    rows, not less than what the all-to-all puts in and gets out."""
    text, e, tokens = run.shape.text, run.item, run.training.own(run.num_tokens)
    inner = -(-tokens // run.training.mlp_tiles) * 3 * e * text.intermediate
    inner += tile_bytes(text, run.num_tokens, run.training)
    inner = max(inner, 2 * tokens * exchanged(run)) + tokens * 2 * e * text.hidden
    if run.num_quantized:
        inner += e * text.intermediate * text.hidden  # a weight, out of its 4 bits
    if not run.training.trains_text:
        return inner
    weight = text.intermediate * text.hidden
    return inner + weight * (e + (e if run.ranks > 1 else 0))


def inputs(run: Run) -> int:
    """Bytes of a micro-batch: pixels or the features in their place, and whole numbers: ids, four rows of positions,
    those of answers."""
    vision = run.shape.vision
    pixels = run.item * run.num_patches * vision.in_values
    if not run.runs_tower:  # one more feature of each token for each of DeepStack's mergers
        pixels = run.item * run.shape.image_tokens(run.num_patches) * vision.num_mergers * vision.out_hidden
    return pixels + INDEX * (5 * run.num_tokens + 3 * sum(sum(row.answers) for row in run.rows))


def plan_memory(run: Run) -> Memory:
    """Memory of a rank, for a micro-batch of the longest examples."""
    zero, settings = run.zero, run.settings
    saved = activations(
        run.shape, run.rows, run.num_patches, run.training, checkpointing=settings.activation_checkpointing,
        offload=settings.activation_offload, in_blocks=in_blocks(run),
    )  # fmt: skip
    state, of_adam, share = weights(run), optimizer(run), shares(run)
    found = run.gathered
    grads, bucket = gradients(run), 0
    if zero.stage == 3 or (zero.stage == 2 and run.num_trained) or (zero.stage == 1 and run.item == FP32):
        bucket = run.item * zero.reduce_bucket
    host, nvme, adam = {}, 0, sum(of_adam.values())
    if zero.offload_optimizer:
        moved = adam + FP32 * share * (2 if zero.stage == 3 else 1)  # and the gradients, in ZeRO-3 as Adam's copy too
        host = {"optimizer and gradients": moved}
        if zero.offload_optimizer == "nvme":
            host, nvme = {"optimizer and gradients": FP32 * share}, adam + FP32 * share
        adam = 0
    elif settings.optimizer == "paged_adamw_8bit":
        host = {"moments, when the device is full": of_adam["moments"]}
    if zero.offload_param:
        held = run.item * sum(-(-parameter.numel // run.ranks) for parameter in run.parameters)
        host, nvme = (host, nvme + held) if zero.offload_param == "nvme" else (host | {"weights": held}, nvme)
    if settings.activation_offload:
        host = host | {"layer inputs": run.shape.text.layers * run.own_tokens * run.item * run.shape.text.hidden}

    lasting = {"weights": state, "masters and moments": adam, "inputs": inputs(run)}
    kept, of_head = sum(saved.values()), saved.get("log-probabilities", 0)
    one_layer = layer_bytes(run.shape, run.rows, run.training)
    layer = one_layer if settings.activation_checkpointing else 0
    before, after_head, head_passing = _gradients_at_head(run, grads, share)
    at_head, in_layers = found.at_head * run.item, found.in_layers * run.item
    working = layer_working(run)
    text = run.shape.text  # a tied head's gradient waits for the embedding's (trainer/tied_embedding.py)
    waiting = run.item * text.vocabulary * text.hidden if text.tied and run.training.trains_text else 0
    moments = {
        "head's backward": {"activations": kept, "gathered": at_head, "gradients": before,
                            "working": head_working(run)},
        "last layers' backward": {"activations": kept - of_head, "recomputed": layer, "gathered": in_layers,
                                  "gradients": before if waiting else after_head, "working": working + waiting},
        "first layer's backward": {"recomputed": one_layer, "gathered": in_layers, "gradients": grads,
                                   "working": working + waiting},
        "Adam": {"gradients": grads, "working": _copy_for_adam(run, share)},
    }  # fmt: skip
    if waiting:
        moments["embedding's gradient"] = {"gathered": at_head, "gradients": grads, "working": head_passing}
    else:
        moments["head's gradient"] = {"activations": kept - of_head, "gathered": at_head, "gradients": after_head,
                                      "working": head_passing}  # fmt: skip
    base = sum(lasting.values()) + bucket
    totals = {name: base + sum(parts.values()) for name, parts in moments.items()}
    worst = max(totals, key=totals.get)
    at_peak = moments[worst]
    passing = sum(size for name, size in at_peak.items() if name != "gradients")
    kept_items = {f"activations: {name}": size for name, size in saved.items() if "activations" in at_peak}
    if "backward" not in worst or "layer" in worst:
        kept_items.pop("activations: log-probabilities", None)
    items = lasting | {
        "gradients": at_peak["gradients"] + bucket,
        "gathered weights": at_peak.get("gathered", 0),
        **kept_items,
        "activations: one layer": at_peak.get("recomputed", 0),
        f"working memory ({worst})": at_peak["working"],
        "allocator slack": int(SLACK * passing),
        "CUDA, NCCL": CONTEXT_BYTES,
    }
    states = {"weights": state, "optimizer": adam, "gradients": grads + (0 if zero.stage == 2 else bucket)}
    return Memory({k: v for k, v in items.items() if v}, totals, host, nvme, states, kept)


def _gradients_at_head(run: Run, grads: int, share: int) -> tuple[int, int, int]:
    """Bytes of gradients before the head's backward and after it, and what passes while the head's own, the first and
    often the largest, is reduced. In the first micro-batch of an update fewer are there than in later ones."""
    e, num_trained = run.item, run.num_trained
    head = run.shape.text.vocabulary * run.shape.text.hidden if run.training.trains_text else 0
    if run.turns > 1:
        before = grads
    elif run.zero.stage == 1:  # those of autograd come and go; BF16_Optimizer's stay
        before = 0 if e == FP32 else FP32 * num_trained
    else:
        before = grads if run.zero.stage == 3 else 0
    if run.zero.stage == 1:
        return before, max(before, min(grads, before + e * head)), 0 if e == FP32 else FP32 * head
    if run.zero.stage == 3:
        return before, grads, e * head * (2 if head % run.ranks else 1)  # sent as it is, if ranks divide it
    if e == FP32:
        return before, before, e * head
    return before, grads, e * head + FP32 * min(head, share)


def _copy_for_adam(run: Run, share: int) -> int:
    """Bytes of gradients that DeepSpeed copies on the device for an update: ZeRO-3 those whose norm is taken in fp64,
    ZeRO-1 and ZeRO-2 in fp32 the share."""
    if run.zero.offload_optimizer:
        return 0
    if run.zero.stage == 3:
        return 2 * FP32 * min(share, NORM_AT_ONCE)
    return FP32 * share if run.item == FP32 else 0
