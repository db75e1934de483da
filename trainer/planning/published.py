"""The published config.json files of the models that the planner knows, as far as they say sizes."""

from typing import Any


def _qwen2_5(hidden, intermediate, layers, heads, kv_heads, vocabulary, tied, vision_intermediate) -> dict[str, Any]:
    """Qwen/Qwen2.5-VL-*-Instruct, config.json. The vision tower's MLP is wider from 32B on."""
    return {
        "model_type": "qwen2_5_vl", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "intermediate_size": vision_intermediate, "num_heads": 16,
            "out_hidden_size": hidden, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
            "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }  # fmt: skip


def _qwen3(hidden, intermediate, layers, heads, tied, tower, deepstack) -> dict[str, Any]:
    """Qwen/Qwen3-VL-*-Instruct, config.json; dense ones. Towers: of 2B and 4B, of 8B and 32B."""
    depth, width, inner = tower
    return {
        "model_type": "qwen3_vl", "tie_word_embeddings": tied,
        "text_config": {
            "vocab_size": 151936, "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        },
        "vision_config": {
            "depth": depth, "hidden_size": width, "intermediate_size": inner, "num_heads": 16,
            "out_hidden_size": hidden, "patch_size": 16, "num_position_embeddings": 2304,
            "deepstack_visual_indexes": deepstack,
        },
    }  # fmt: skip


# InternVL3 (arXiv 2504.10479, table 1): InternViT-300M or -6B (448 pixels, V2.5) and a Qwen2.5 language model.
# OpenGVLab/InternViT-300M-448px-V2_5 and InternViT-6B-448px-V2_5, config.json.
_INTERNVIT_300M = {"attention_bias": True}
_INTERNVIT_6B = {
    "hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800,
    "attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm",
}  # fmt: skip


def _internvl(hidden, intermediate, layers, heads, kv_heads, vision_config) -> dict[str, Any]:
    """OpenGVLab/InternVL3-*-hf; the text model is Qwen2.5's with a vocabulary of 151674 and a head of its own."""
    return {
        "model_type": "internvl", "tie_word_embeddings": False, "vision_config": vision_config,
        "text_config": {
            "model_type": "qwen2", "vocab_size": 151674, "hidden_size": hidden, "intermediate_size": intermediate,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        },
    }  # fmt: skip


_SMALL_TOWER, _LARGE_TOWER = ((24, 1024, 4096), [5, 11, 17]), ((27, 1152, 4304), [8, 16, 24])
PUBLISHED: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B-Instruct": _qwen2_5(2048, 11008, 36, 16, 2, 151936, True, 3420),
    "Qwen2.5-VL-7B-Instruct": _qwen2_5(3584, 18944, 28, 28, 4, 152064, False, 3420),
    "Qwen2.5-VL-32B-Instruct": _qwen2_5(5120, 27648, 64, 40, 8, 152064, False, 3456),
    "Qwen2.5-VL-72B-Instruct": _qwen2_5(8192, 29568, 80, 64, 8, 152064, False, 3456),
    "Qwen3-VL-2B-Instruct": _qwen3(2048, 6144, 28, 16, True, *_SMALL_TOWER),
    "Qwen3-VL-4B-Instruct": _qwen3(2560, 9728, 36, 32, True, *_SMALL_TOWER),
    "Qwen3-VL-8B-Instruct": _qwen3(4096, 12288, 36, 32, False, *_LARGE_TOWER),
    "Qwen3-VL-32B-Instruct": _qwen3(5120, 25600, 64, 64, False, *_LARGE_TOWER),
    "InternVL3-1B-hf": _internvl(896, 4864, 24, 14, 2, _INTERNVIT_300M),
    "InternVL3-2B-hf": _internvl(1536, 8960, 28, 12, 2, _INTERNVIT_300M),
    "InternVL3-8B-hf": _internvl(3584, 18944, 28, 28, 4, _INTERNVIT_300M),
    "InternVL3-14B-hf": _internvl(5120, 13824, 48, 40, 8, _INTERNVIT_300M),
    "InternVL3-38B-hf": _internvl(5120, 27648, 64, 40, 8, _INTERNVIT_6B),
    "InternVL3-78B-hf": _internvl(8192, 29568, 80, 64, 8, _INTERNVIT_6B),
}
