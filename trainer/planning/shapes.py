"""Every parameter of a model, by name and shape, from its config.json alone: no torch, no weights, no network."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mede2.trainer.planning.published import PUBLISHED

PARTS = ("vision_tower", "merger", "language_model", "embedding")  # the last: embedding and head

# What transformers fills in where a config.json says nothing, by model_type: the text model, the vision tower.
DEFAULTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        dict(vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
             num_attention_heads=64, num_key_value_heads=8),
        dict(depth=32, hidden_size=3584, intermediate_size=3420, num_heads=16, in_channels=3, patch_size=14,
             spatial_merge_size=2, temporal_patch_size=2, window_size=112, out_hidden_size=3584,
             fullatt_block_indexes=(7, 15, 23, 31)),
    ),
    "qwen3_vl": (
        dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=32, head_dim=128, attention_bias=False),
        dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, in_channels=3, patch_size=16,
             spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=3584, num_position_embeddings=2304,
             deepstack_visual_indexes=(8, 16, 24)),
    ),
    "internvl": (
        dict(vocab_size=151936, hidden_size=4096, intermediate_size=22016, num_hidden_layers=32,
             num_attention_heads=32, num_key_value_heads=32),
        dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
             attention_bias=False, use_qk_norm=False, norm_type="layer_norm", image_size=(448, 448),
             patch_size=(14, 14), num_channels=3, use_absolute_position_embeddings=True, use_mask_token=False,
             use_mean_pooling=True),
    ),
}  # fmt: skip
TIED = {"qwen2_5_vl": False, "qwen3_vl": False, "internvl": True}  # where tie_word_embeddings is not said


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter, itself and no other: its name in transformers, its shape, and its part (PARTS)."""

    name: str
    shape: tuple[int, ...]
    part: str

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Module:
    """A module that holds parameters of its own; what ZeRO-3 gathers together.

    Attributes:
        name: in transformers.
        kind: linear, norm, embedding, head, patches or free (parameters that no module of torch's holds).
        parameters: its own.
        layer: number of the decoder layer that it is in, -1 - i in block i of the vision tower, None elsewhere.
    """

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    layer: int | None = None

    @cached_property
    def numel(self) -> int:
        return sum(parameter.numel for parameter in self.parameters)


@dataclass(frozen=True)
class Text:
    """The language model."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool  # of queries, keys and values
    qk_norm: bool
    tied: bool

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Vision:
    """The vision tower; `merge` patches on a side make one token."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    patch: int
    merge: int
    in_values: int  # of a patch: channels x frames x pixels
    out_hidden: int
    gated: bool  # SwiGLU, three matrices; else two
    whole_layers: tuple[int, ...]  # those that see the whole image
    window: int  # patches on a window's side, elsewhere
    num_mergers: int  # the merger and what DeepStack adds
    extra_tokens: int  # class tokens of an image


@dataclass(frozen=True, eq=False)
class Shape:
    """A model as its config.json describes it.

    Attributes:
        name: as the user gave it.
        family: model_type.
        text, vision: sizes.
        modules: every module with parameters, in the order in which a forward calls them.
    """

    name: str
    family: str
    text: Text
    vision: Vision
    modules: tuple[Module, ...]

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """Each once; a tied head is its embedding."""
        return tuple({p.name: p for module in self.modules for p in module.parameters}.values())

    @cached_property
    def counts(self) -> dict[str, int]:
        """Number of values by part, exact."""
        totals = dict.fromkeys(PARTS, 0)
        for parameter in self.parameters:
            totals[parameter.part] += parameter.numel
        return totals

    @property
    def num_parameters(self) -> int:
        return sum(self.counts.values())

    def image_tokens(self, num_patches: int) -> int:
        return num_patches // self.vision.merge**2


def read_shape(name: str) -> Shape:
    """The shape of a model.

    Args:
        name: a built-in one (`PUBLISHED`, with or without its organisation), a config.json, or a folder that holds one.

    Raises:
        ValueError: nothing of that name, a file that is no config, or a family that is not supported.
    """
    short = name.rpartition("/")[2]
    if short in PUBLISHED:
        return shape_of(PUBLISHED[short], name)
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"model: {name} is neither a config.json nor built in; built in are {', '.join(PUBLISHED)}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"model: {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"model: {path} holds no JSON object")
    return shape_of(config, name)


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """The shape that a config describes; `name` goes into errors. Raises ValueError as `read_shape`."""
    family = config.get("model_type")
    if family not in DEFAULTS:
        raise ValueError(f"model: {name} is of model_type {family!r}; supported are {', '.join(DEFAULTS)}")
    text_type = config.get("text_config", {}).get("model_type", "qwen2")
    if family == "internvl" and text_type != "qwen2":
        raise ValueError(f"model: {name} has a text model of model_type {text_type!r}; of InternVL only qwen2 is known")
    text_defaults, vision_defaults = DEFAULTS[family]
    # Qwen2.5-VL's first published files hold the text model's sizes beside vision_config, not in a text_config.
    text_given = config.get("text_config", config if family == "qwen2_5_vl" else {})
    text_values = text_defaults | {key: value for key, value in text_given.items() if value is not None}
    vision_values = vision_defaults | {k: v for k, v in config.get("vision_config", {}).items() if v is not None}
    tied = config.get("tie_word_embeddings", TIED[family])
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if not isinstance(text_values[key], int) or text_values[key] < 1:
            raise ValueError(f"model: {name}: text_config.{key}: {text_values[key]!r} is not a whole number above 0")
    text = _text(text_values, family, bool(tied))
    vision = _vision(vision_values, family, text, config.get("downsample_ratio", 0.5))
    return Shape(name, family, text, vision, tuple(_modules(family, text, vision, vision_values)))


def _text(values: Mapping[str, Any], family: str, tied: bool) -> Text:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    return Text(
        vocabulary=values["vocab_size"], hidden=hidden, intermediate=values["intermediate_size"],
        layers=values["num_hidden_layers"], heads=heads, kv_heads=values["num_key_value_heads"],
        head_dim=values.get("head_dim") or hidden // heads,
        bias=values["attention_bias"] if family == "qwen3_vl" else True, qk_norm=family == "qwen3_vl", tied=tied,
    )  # fmt: skip


def _vision(values: Mapping[str, Any], family: str, text: Text, downsample: float) -> Vision:
    if family == "internvl":
        patch, layers = values["patch_size"], values["num_hidden_layers"]
        patch = patch if isinstance(patch, int) else patch[0]
        return Vision(
            hidden=values["hidden_size"], intermediate=values["intermediate_size"], layers=layers,
            heads=values["num_attention_heads"], patch=patch, merge=round(1 / downsample),
            in_values=values["num_channels"] * patch**2, out_hidden=text.hidden, gated=False,
            whole_layers=tuple(range(layers)), window=0, num_mergers=1, extra_tokens=1,
        )  # fmt: skip
    patch, frames, layers = values["patch_size"], values["temporal_patch_size"], values["depth"]
    qwen2 = family == "qwen2_5_vl"
    return Vision(
        hidden=values["hidden_size"], intermediate=values["intermediate_size"], layers=layers,
        heads=values["num_heads"], patch=patch, merge=values["spatial_merge_size"],
        in_values=values["in_channels"] * frames * patch**2, out_hidden=values["out_hidden_size"], gated=qwen2,
        whole_layers=tuple(values["fullatt_block_indexes"]) if qwen2 else tuple(range(layers)),
        window=values["window_size"] // patch if qwen2 else 0,
        num_mergers=1 if qwen2 else 1 + len(values["deepstack_visual_indexes"]), extra_tokens=0,
    )  # fmt: skip


def _modules(family: str, text: Text, vision: Vision, values: Mapping[str, Any]) -> Iterator[Module]:
    embedding = Parameter("model.language_model.embed_tokens.weight", (text.vocabulary, text.hidden), "embedding")
    yield Module("model.language_model.embed_tokens", "embedding", (embedding,))
    yield from {"qwen2_5_vl": _qwen2_5_tower, "qwen3_vl": _qwen3_tower, "internvl": _internvl_tower}[family](
        text, vision, values
    )
    for layer in range(text.layers):
        yield from _decoder_layer(text, layer)
    yield _norm("model.language_model.norm", text.hidden, "language_model")
    head = embedding if text.tied else Parameter("lm_head.weight", (text.vocabulary, text.hidden), "embedding")
    yield Module("lm_head", "head", (head,))


def _decoder_layer(text: Text, layer: int) -> Iterator[Module]:
    place, part = f"model.language_model.layers.{layer}", "language_model"
    hidden, inner = text.hidden, text.intermediate
    yield _norm(f"{place}.input_layernorm", hidden, part, layer=layer)
    for name, size in (("q", text.queries), ("k", text.keys), ("v", text.keys)):
        yield _linear(f"{place}.self_attn.{name}_proj", hidden, size, part, text.bias, layer)
        if text.qk_norm and name != "v":
            yield _norm(f"{place}.self_attn.{name}_norm", text.head_dim, part, layer=layer)
    yield _linear(f"{place}.self_attn.o_proj", text.queries, hidden, part, False, layer)
    yield _norm(f"{place}.post_attention_layernorm", hidden, part, layer=layer)
    for name, (inputs, outputs) in {"gate": (hidden, inner), "up": (hidden, inner), "down": (inner, hidden)}.items():
        yield _linear(f"{place}.mlp.{name}_proj", inputs, outputs, part, False, layer)


def _qwen2_5_tower(text: Text, vision: Vision, values: Mapping[str, Any]) -> Iterator[Module]:
    place, part, hidden, inner = "model.visual", "vision_tower", vision.hidden, vision.intermediate
    yield _patches(f"{place}.patch_embed.proj", values, hidden, bias=False)
    for block in range(vision.layers):
        at, layer = f"{place}.blocks.{block}", -1 - block
        yield _norm(f"{at}.norm1", hidden, part, layer=layer)
        yield _linear(f"{at}.attn.qkv", hidden, 3 * hidden, part, True, layer)
        yield _linear(f"{at}.attn.proj", hidden, hidden, part, True, layer)
        yield _norm(f"{at}.norm2", hidden, part, layer=layer)
        yield _linear(f"{at}.mlp.gate_proj", hidden, inner, part, True, layer)
        yield _linear(f"{at}.mlp.up_proj", hidden, inner, part, True, layer)
        yield _linear(f"{at}.mlp.down_proj", inner, hidden, part, True, layer)
    merged = hidden * vision.merge**2
    yield _norm(f"{place}.merger.ln_q", hidden, "merger")
    yield _linear(f"{place}.merger.mlp.0", merged, merged, "merger", True)
    yield _linear(f"{place}.merger.mlp.2", merged, vision.out_hidden, "merger", True)


def _qwen3_tower(text: Text, vision: Vision, values: Mapping[str, Any]) -> Iterator[Module]:
    place, part, hidden, inner = "model.visual", "vision_tower", vision.hidden, vision.intermediate
    yield _patches(f"{place}.patch_embed.proj", values, hidden, bias=True)
    positions = Parameter(f"{place}.pos_embed.weight", (values["num_position_embeddings"], hidden), part)
    yield Module(f"{place}.pos_embed", "embedding", (positions,))
    after = {block: number for number, block in enumerate(values["deepstack_visual_indexes"])}
    for block in range(vision.layers):
        at, layer = f"{place}.blocks.{block}", -1 - block
        yield _norm(f"{at}.norm1", hidden, part, bias=True, layer=layer)
        yield _linear(f"{at}.attn.qkv", hidden, 3 * hidden, part, True, layer)
        yield _linear(f"{at}.attn.proj", hidden, hidden, part, True, layer)
        yield _norm(f"{at}.norm2", hidden, part, bias=True, layer=layer)
        yield _linear(f"{at}.mlp.linear_fc1", hidden, inner, part, True, layer)
        yield _linear(f"{at}.mlp.linear_fc2", inner, hidden, part, True, layer)
        if block in after:
            yield from _qwen3_merger(f"{place}.deepstack_merger_list.{after[block]}", vision, whole_norm=True)
    yield from _qwen3_merger(f"{place}.merger", vision, whole_norm=False)


def _qwen3_merger(place: str, vision: Vision, whole_norm: bool) -> Iterator[Module]:
    merged = vision.hidden * vision.merge**2
    yield _norm(f"{place}.norm", merged if whole_norm else vision.hidden, "merger", bias=True)
    yield _linear(f"{place}.linear_fc1", merged, merged, "merger", True)
    yield _linear(f"{place}.linear_fc2", merged, vision.out_hidden, "merger", True)


def _internvl_tower(text: Text, vision: Vision, values: Mapping[str, Any]) -> Iterator[Module]:
    place, part, hidden, inner = "model.vision_tower", "vision_tower", vision.hidden, vision.intermediate
    size = values["image_size"]
    height, width = (size, size) if isinstance(size, int) else size
    num_patches = (height // vision.patch) * (width // vision.patch)
    free = {"cls_token": (1, 1, hidden)}
    if values["use_mask_token"]:
        free["mask_token"] = (1, 1, hidden)
    if values["use_absolute_position_embeddings"]:
        free["position_embeddings"] = (1, num_patches + 1, hidden)
    at = f"{place}.embeddings"
    yield Module(at, "free", tuple(Parameter(f"{at}.{name}", shape, part) for name, shape in free.items()))
    patches = Parameter(
        f"{at}.patch_embeddings.projection.weight", (hidden, values["num_channels"], vision.patch, vision.patch), part
    )
    bias = Parameter(f"{at}.patch_embeddings.projection.bias", (hidden,), part)
    yield Module(f"{at}.patch_embeddings.projection", "patches", (patches, bias))
    norm_bias = values["norm_type"] == "layer_norm"
    for block in range(vision.layers):
        at, layer = f"{place}.encoder.layer.{block}", -1 - block
        scales = tuple(Parameter(f"{at}.lambda_{number}", (hidden,), part) for number in (1, 2))
        yield Module(at, "free", scales, layer)
        yield _norm(f"{at}.layernorm_before", hidden, part, bias=norm_bias, layer=layer)
        for name in "qkv":
            yield _linear(f"{at}.attention.{name}_proj", hidden, hidden, part, values["attention_bias"], layer)
        for name in "qk" if values["use_qk_norm"] else "":
            yield _norm(f"{at}.attention.{name}_norm", hidden, part, layer=layer)
        yield _linear(f"{at}.attention.projection_layer", hidden, hidden, part, True, layer)
        yield _norm(f"{at}.layernorm_after", hidden, part, bias=norm_bias, layer=layer)
        yield _linear(f"{at}.mlp.fc1", hidden, inner, part, True, layer)
        yield _linear(f"{at}.mlp.fc2", inner, hidden, part, True, layer)
    if not values["use_mean_pooling"]:
        yield _norm(f"{place}.layernorm", hidden, part, bias=True)
    merged = hidden * vision.merge**2
    yield _norm("model.multi_modal_projector.layer_norm", merged, "merger", bias=True)
    yield _linear("model.multi_modal_projector.linear_1", merged, text.hidden, "merger", True)
    yield _linear("model.multi_modal_projector.linear_2", text.hidden, text.hidden, "merger", True)


def _linear(name: str, inputs: int, outputs: int, part: str, bias: bool, layer: int | None = None) -> Module:
    weight = Parameter(f"{name}.weight", (outputs, inputs), part)
    more = (Parameter(f"{name}.bias", (outputs,), part),) if bias else ()
    return Module(name, "linear", (weight, *more), layer)


def _norm(name: str, size: int, part: str, *, bias: bool = False, layer: int | None = None) -> Module:
    names = ("weight", "bias") if bias else ("weight",)
    return Module(name, "norm", tuple(Parameter(f"{name}.{each}", (size,), part) for each in names), layer)


def _patches(name: str, values: Mapping[str, Any], hidden: int, bias: bool) -> Module:
    patch = values["patch_size"]
    shape = (hidden, values["in_channels"], values["temporal_patch_size"], patch, patch)
    more = (Parameter(f"{name}.bias", (hidden,), "vision_tower"),) if bias else ()
    return Module(name, "patches", (Parameter(f"{name}.weight", shape, "vision_tower"), *more))
