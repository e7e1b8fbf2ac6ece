"""Tiny random models of several modalities, with a text tower of the usual tiny size and what a picture is to them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, PreTrainedModel

from multipruner.core.families.towers import TOWERS

from .tiny import MORE, SIZES, tiny_tokenizer

LAYERS = 4
PICTURE, SIDE, PATCH = 96, 16, 4
"""The token that stands for a part of a picture; its width and height, and those of a patch, in pixels."""
_EYE = {"hidden_size": 32, "intermediate_size": 36, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
_CLIP = {**_EYE, "model_type": "clip_vision_model"}
_QWEN_EYE = {"depth": 2, "hidden_size": 32, "intermediate_size": 36, "num_heads": 2, "patch_size": PATCH,
             "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 48}  # fmt: skip
_TOKENS = {"image_token_id": PICTURE, "video_token_id": 95, "vision_start_token_id": 94, "vision_end_token_id": 93}


def _text(kind: str, *without: str, **more: Any) -> dict[str, Any]:
    sizes = {**SIZES, "num_hidden_layers": LAYERS, "model_type": kind, **more}
    return {key: value for key, value in sizes.items() if key not in without}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {**SIZES["rope_parameters"], **more}}


WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _text("gemma3_text", rope_parameters=MORE["gemma3"]["rope_parameters"], sliding_window=3,
                             layer_types=["sliding_attention", "full_attention"] * 2),
        "vision_config": {**_EYE, "model_type": "siglip_vision_model", "vision_use_head": False},
        "mm_tokens_per_image": 4, "image_token_index": PICTURE, "boi_token_index": 94, "eoi_token_index": 93,
    },
    "internvl": {"text_config": _text("qwen2"), "image_token_id": PICTURE, "image_seq_length": 4,
                 "vision_config": {**_EYE, "model_type": "internvl_vision"}},
    "llava": {"text_config": _text("llama"), "vision_config": _CLIP, "image_token_index": PICTURE},
    "llava-square": {"text_config": _text("llama", "head_dim"), "vision_config": _CLIP, "image_token_index": PICTURE},
    "llava-tied": {"text_config": _text("qwen2", tie_word_embeddings=True), "vision_config": _CLIP,
                   "image_token_index": PICTURE},
    "llava_next": {"text_config": _text("mistral", sliding_window=None), "vision_config": _CLIP,
                   "image_token_index": PICTURE, "image_grid_pinpoints": [[SIDE, SIDE]]},
    "llava_onevision": {"text_config": _text("qwen2"), "image_token_index": PICTURE, "video_token_index": 95,
                        "vision_config": {**_EYE, "model_type": "siglip_vision_model", "vision_use_head": False},
                        "image_grid_pinpoints": [[SIDE, SIDE]]},
    "mistral3": {"text_config": _text("mistral", sliding_window=None), "image_token_index": PICTURE,
                 "vision_config": {**_EYE, "model_type": "pixtral", "head_dim": 16}, "tie_word_embeddings": False},
    "qwen2_vl": {"text_config": _text("qwen2_vl_text", "head_dim", **_rope(mrope_section=[2, 2, 2])),
                 "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2, "num_heads": 2,
                                   "patch_size": PATCH}, **_TOKENS},
    "qwen2_5_vl": {"text_config": _text("qwen2_5_vl_text", "head_dim", **_rope(mrope_section=[2, 2, 2])),
                   "vision_config": {**_QWEN_EYE, "window_size": 16, "fullatt_block_indexes": [1]}, **_TOKENS},
    "qwen3_vl": {"text_config": _text("qwen3_vl_text", **_rope(mrope_section=[4, 2, 2], mrope_interleaved=True)),
                 "vision_config": {**_QWEN_EYE, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
                 **_TOKENS},
    "vipllava": {"text_config": _text("llama"), "vision_config": _CLIP, "image_token_index": PICTURE,
                 "vision_feature_layer": [-2, -1]},
}  # fmt: skip
"""Configurations of wrappers: one of every row, and one with a tied head."""


def row_of(kind: str) -> Any:
    """The row of a kind of tiny wrapper."""
    return TOWERS[kind.partition("-")[0]]


def tiny_wrapper(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of several modalities in evaluation mode."""
    row = row_of(kind)
    config = CONFIG_MAPPING[row.model_type](**copy.deepcopy(WRAPPERS[kind]))
    model = getattr(transformers, row.class_name)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * (0.5 if "embed" in name else 0.2) + (parameter.ndim == 1 and "norm" in name))
    return model.to(dtype).eval()


def write_wrapper(folder: Path, kind: str, *, as_held: bool = False, **options: Any) -> Path:
    """A tiny wrapper's checkpoint, with a tokenizer and a processor's files.

    Names in its files are those that transformers save, or with ``as_held`` those that the class itself has.
    """
    model = tiny_wrapper(kind, **options)
    model.save_pretrained(folder, max_shard_size="60KB")
    if as_held:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        tied = set(model.all_tied_weights_keys)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": SIDE, "note": kind}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("as you like")
    return folder


def picture(kind: str) -> Mapping[str, Any]:
    """What a kind of wrapper is given for a text with one picture in it."""
    generator = torch.Generator().manual_seed(1)
    patches = (SIDE // PATCH) ** 2
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    more: dict[str, Any] = {"pixel_values": pixels}
    tokens = patches
    if kind in ("gemma3", "internvl", "mistral3") or kind.startswith("qwen"):
        tokens = patches // 4
    if kind == "mistral3":
        more["image_sizes"] = torch.tensor([[SIDE, SIDE]])
    if kind in ("llava_next", "llava_onevision"):  # the whole picture, and its one tile with a row's end at each row
        more |= {"pixel_values": pixels.expand(1, 2, -1, -1, -1), "image_sizes": torch.tensor([[SIDE, SIDE]])}
        tokens = 2 * patches + SIDE // PATCH
    ids = torch.tensor([[1, 5, 6, *[PICTURE] * tokens, 7, 8, 9]])
    if kind.startswith("qwen"):
        more = {"pixel_values": torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=generator),
                "image_grid_thw": torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]]),
                "mm_token_type_ids": (ids == PICTURE).int()}  # fmt: skip
    if kind == "gemma3":
        more["token_type_ids"] = (ids == PICTURE).int()
    return {"input_ids": ids, **more}
