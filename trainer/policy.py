"""The policy: a vision-language model whose head returns log-probabilities. Imports transformers and deepspeed."""

import inspect
import types
from collections.abc import Mapping
from pathlib import Path

import deepspeed
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from mede2.kernels.logps import linear_logps
from mede2.trainer.activations import Offload
from mede2.trainer.adapters import add_adapter, is_adapter, targets
from mede2.trainer.attention import BRANCHED, branch_mask, spans_of
from mede2.trainer.lean_layers import keep_less
from mede2.trainer.sequence_parallel import SequenceGroup
from mede2.trainer.settings import Settings
from mede2.trainer.tied_embedding import join_gradients
from mede2.trainer.tiled_mlp import tile_mlps

PARTS = ("language_model", "vision_tower", "merger")
VISION_NAMES = ("visual", "vision_tower")  # Qwen; InternVL and most others
MERGER_NAMES = ("merger", "deepstack_merger_list", "multi_modal_projector")


class _ZeroStage3:
    """Tells transformers to build the model already partitioned; it keeps only a weak reference to this."""

    def __init__(self, config: dict):
        self.config = config

    def is_zero3(self) -> bool:
        return True

    def get_value(self, name: str, default=None):
        return self.config.get(name, default)


class Policy(nn.Module):
    """A vision-language model that maps a micro-batch to the log-probabilities of its answer tokens.

    The log-probabilities come out of `lm_head.forward` itself, so that ZeRO-3's hooks gather the head's weight for the
    fused operation and free it after.
    """

    def __init__(self, model: nn.Module, implementation: str, sharing: SequenceGroup | None = None):
        super().__init__()
        self.model, self.sharing = model, sharing
        head = model.get_output_embeddings()
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

        def head_forward(head: nn.Linear, hidden: Tensor, targets: Tensor | None = None, groups=None) -> Tensor:
            if targets is None:
                return nn.functional.linear(hidden, head.weight, head.bias)
            return linear_logps(
                hidden, head.weight, targets, groups=groups, bias=head.bias, softcap=softcap,
                implementation=implementation,
            )  # fmt: skip

        head.forward = types.MethodType(head_forward, head)
        join_gradients(model.get_input_embeddings(), head)
        text_config = model.config.get_text_config()
        if text_config._attn_implementation == "sdpa" and not has_sliding_layers(text_config):
            text_config._attn_implementation = BRANCHED  # of the language model only
        if sharing:
            sharing.shard(model.model.language_model)

    def forward(
        self, inputs: Mapping[str, Tensor], branches: Tensor | None = None, rows: Tensor | None = None,
        targets: Tensor | None = None, sequence: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Log-probabilities of answer tokens; of inputs alone, the features of their images (`image_features`), as
        ZeRO-3 gathers weights in a forward of the whole module only.

        Args:
            inputs, branches, rows: as in `answer_states`.
            targets: (N,) int64, the tokens that those rows predict.
            sequence: (N,) int64, the sequence of each. Both stages weigh all tokens of a sequence alike, so one
                gradient comes back to each (`groups` of `linear_logps`).

        Returns:
            (N,) fp32; on every rank the same, where several share the micro-batch.
        """
        if rows is None:
            return self.image_features(inputs)
        head = self.model.get_output_embeddings()
        if self.sharing is None:
            return head(self.answer_states(inputs, branches, rows), targets, sequence)
        mine, own_rows = self.sharing.own_rows(rows, inputs["input_ids"].shape[1])
        logps = head(self.answer_states(inputs, branches, own_rows), targets[mine], sequence[mine])
        return self.sharing.whole(logps, mine, len(rows))

    def image_features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the vision tower and the merger make of a micro-batch's images: (tokens, 1 + d, H), d the deeper layers
        of the language model that get features of their own (Qwen3-VL)."""
        found = self.model.model.get_image_features(
            **{name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}, return_dict=True
        )
        layers = [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]
        return torch.stack([torch.cat(tuple(features)) for features in layers], 1)

    def answer_states(self, inputs: Mapping[str, Tensor], branches: Tensor | None, rows: Tensor) -> Tensor:
        """Final hidden states (N, H) that predict the answer tokens.

        Args:
            inputs: of the model: input_ids (R, T), position_ids and the images' tensors, or in place of those
                image_features (tokens, 1 + d, H) as `image_features` gives them.
            branches: (2, R, T) int64 on the CPU, piece and branch of each token, or None where every row is one
                conversation. Flash attention takes no mask: it tells the conversations of a packed row apart by their
                positions, and prompts are not shared under it.
            rows: (N,) int64, positions in the flattened (R * T) hidden states, of which a rank that shares them has
                its part.
        """
        attention = self.model.config.get_text_config()._attn_implementation
        device, mask, options = inputs["input_ids"].device, None, {}
        if self.sharing:
            options["sharing"] = self.sharing
        if branches is not None and attention == BRANCHED:
            options["spans"] = spans_of(*branches, self.model.dtype, device)
        elif branches is not None and attention != "flash_attention_2":
            mask = branch_mask(*branches.to(device), dtype=self.model.dtype)
        if "image_features" in inputs:
            inputs, options["mm_encoder_outputs"] = self._with_features(**inputs)
        hidden = self.model.model(**inputs, attention_mask=mask, use_cache=False, **options).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, rows)

    def _with_features(self, image_features: Tensor, **inputs: Tensor) -> tuple[dict, dict]:
        """The other inputs, and the features as the model's own encoder would give them, as if of one image."""
        first, *deeper = ((features,) for features in image_features.unbind(1))
        if "image_grid_thw" not in _forward_parameters(self.model.model):  # images of one size, in one tensor
            first = torch.stack(first)
        return inputs, {"image": types.SimpleNamespace(pooler_output=first, deepstack_features=deeper)}


def takes_image_features(config: transformers.PreTrainedConfig) -> bool:
    """Whether a model of this config can be given the features of images in place of the images."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config).model
    return "mm_encoder_outputs" in _forward_parameters(model)


def _forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(type(model).forward).parameters


def load_policy(
    folder: Path,
    *,
    dtype: torch.dtype,
    attention: str,
    implementation: str,
    deepspeed_config: dict | None = None,
    activation_checkpointing: bool = False,
    activation_offload: bool = False,
    adapter: Settings | Path | None = None,
    quantize: str | None = None,
    sharing: SequenceGroup | None = None,
    mlp_tiles: int = 1,
) -> Policy:
    """Load a model folder.

    Args:
        folder: config and safetensors weights.
        dtype: of the weights.
        attention: transformers' name of the attention implementation.
        implementation: of the log-probabilities, as in `mede2.kernels.logps`.
        deepspeed_config: the whole DeepSpeed configuration. With ZeRO stage 3 the model is built partitioned over the
            ranks, parameter by parameter: no device holds it whole, and only rank 0 reads the weights.
        activation_checkpointing: recompute activations in backward.
        activation_offload: and keep what that needs in host memory.
        adapter: to put on the language model: the settings of a new one, or the folder of a saved one.
        sharing: the ranks that share this one's micro-batches.
        mlp_tiles: see `tile_mlps`.
        quantize: "nf4": hold the weights of the language model's linear layers in 4 bits, and compute in `dtype`.

    Raises:
        ValueError: the folder does not load as an image-text model, or its weights are not those of its config.
    """
    stage3 = _ZeroStage3(deepspeed_config) if deepspeed_config and _zero_stage(deepspeed_config) == 3 else None
    if stage3:
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)  # over the process group that is there
        set_hf_deepspeed_config(stage3)
    try:
        model = _load_model(folder, dtype, attention, nf4_config(dtype) if quantize else None)
        if adapter is not None:
            add_adapter(model, adapter, language_linears(model), dtype)
    finally:
        unset_hf_deepspeed_config()
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # for reentrant ones only; a frozen tower would run its backward
    keep_less(model.model.language_model)
    if mlp_tiles > 1:
        tile_mlps(model.model.language_model, mlp_tiles)
    policy = Policy(model, implementation, sharing)
    if activation_offload:
        policy.offload = Offload(model)
    return policy


def _load_model(folder: Path, dtype: torch.dtype, attention: str, quantization: BitsAndBytesConfig | None) -> nn.Module:
    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, attn_implementation=attention, quantization_config=quantization,
            output_loading_info=True, ignore_mismatched_sizes=True, use_safetensors=True,
        )  # fmt: skip
    except (OSError, ImportError, ValueError, SafetensorError) as error:
        raise ValueError(f"model: {folder} does not load: {error}") from error
    except RuntimeError as error:
        if "size mismatch" not in str(error):  # as it is told under ZeRO-3
            raise
        raise ValueError(f"model: {folder} has weights of other shapes than its config.json says: {error}") from error
    if missing := sorted(_untied(model, info["missing_keys"])):
        raise ValueError(f"model: {folder} lacks weights: {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")
    if mismatched := sorted(info["mismatched_keys"]):
        name, there, wanted = mismatched[0]
        raise ValueError(
            f"model: {folder} has weights of other shapes than its config.json says: {name} is {tuple(there)}, "
            f"not {tuple(wanted)}{', and others' if mismatched[1:] else ''}"
        )
    for module in model.modules() if quantization else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # in evaluation it would round the scales, and for good
            module.support_avx512bf16_for_cpu = False
    return model


def check_adapter(config: transformers.PreTrainedConfig, settings: Settings) -> None:
    """Raises a ValueError for an adapter that the settings ask for and a model of this config cannot carry."""
    with torch.device("meta"):
        targets(settings.lora_target_modules, language_linears(AutoModelForImageTextToText.from_config(config)))


def largest_parameter(config: transformers.PreTrainedConfig) -> int:
    """Number of values of the largest parameter of a model of this config."""
    with torch.device("meta"):
        return max(parameter.numel() for parameter in AutoModelForImageTextToText.from_config(config).parameters())


def language_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers that an adapter may sit on: those of the language model, without the head."""
    head = model.get_output_embeddings()
    return [
        name for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and part_of(name) == "language_model"
    ]  # fmt: skip


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat, its scales quantized too (QLoRA, arXiv 2305.14314); not the head, the tower and the merger."""
    kept = "|".join((*VISION_NAMES, *MERGER_NAMES, "lm_head"))
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[rf"(?:.*\.)?(?:{kept})"],
    )  # fmt: skip


def has_sliding_layers(text_config: transformers.PreTrainedConfig) -> bool:
    """Whether a language model has layers that see a window only, which a mask of ours would undo."""
    return "sliding_attention" in (getattr(text_config, "layer_types", None) or ())


def _zero_stage(deepspeed_config: dict) -> int:
    return deepspeed_config.get("zero_optimization", {}).get("stage", 0)


def _untied(model, missing_keys) -> set[str]:
    """Missing keys that no other weight stands in for."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return set(missing_keys) - tied


def part_of(name: str) -> str:
    """Which part of the model a parameter belongs to, by its name: language_model, vision_tower or merger."""
    pieces = name.split(".")
    if any(piece in MERGER_NAMES for piece in pieces):
        return "merger"
    return "vision_tower" if any(piece in VISION_NAMES for piece in pieces) else "language_model"


def freeze(policy: Policy, trained: Mapping[str, bool]) -> dict[str, int]:
    """Let only the named parts train; returns the number of trained parameters of each part.

    Of a language model that carries an adapter, the adapter alone trains.

    Args:
        policy: the model.
        trained: for each of PARTS whether it trains.
    """
    counts = dict.fromkeys(PARTS, 0)
    named = dict(policy.named_parameters())
    adapted = any(map(is_adapter, named))
    for name, parameter in named.items():
        part = part_of(name)
        trains = trained[part] and (part != "language_model" or is_adapter(name) or not adapted)
        parameter.requires_grad_(trains)
        counts[part] += trains * getattr(parameter, "ds_numel", parameter.numel())
    return counts


def quiet_transformers() -> None:
    """Progress bars and notes of transformers do not belong in a log of many ranks."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
