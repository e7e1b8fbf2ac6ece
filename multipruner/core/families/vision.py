"""The rows of image classifiers: transformers over the patches of a picture, judged as their task says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multipruner.core.layout import Layout

from .family import Family
from .parts import attention, mlp
from .patterns import Wording
from .tasks import BOTH_CLASSIFIER, IMAGE_CLASSIFIER, MEAN_CLASSIFIER, Task

_HEADS: dict[str, Any] = {"cached": (), "cache": ""}
_EQUAL_HEADS: dict[str, Any] = {**_HEADS, "path": "attention", "rotated": "", "attributes": (
    ("num_attention_heads", Layout("kv_groups")),)}  # fmt: skip
_SIZES = {"hidden_size": "hidden", "head_dim": "head_dim", "num_attention_heads": "kv_groups",
          "intermediate_size": "channels"}  # fmt: skip
_WIDER = ("mlp_ratio", "hidden_size", "intermediate_size")


def _named(task: Task, **rest: Any) -> dict[str, Any]:
    """Return what the rows of a task have in common."""
    return {"task": task, "causal_lm": task.ending, "embeddings": "embeddings", "head": "classifier",
            "layer_arguments": "config", **rest}  # fmt: skip


def _times(values: Mapping[str, Any]) -> dict[str, Any]:
    """Say the width of an MLP that is so many times the hidden size, where nothing says it yet."""
    ratio, width, said = (values.get(key) for key in _WIDER)
    if said is not None or width is None or ratio is None:
        return {}
    return {"intermediate_size": int(width * ratio)}


def _two_thirds(values: Mapping[str, Any]) -> dict[str, Any]:
    """Say the width of a gated MLP: two thirds of the other, up to the next multiple of eight."""
    return {key: -(-int(width * 2 / 3) // 8) * 8 for key, width in _times(values).items()}


def _scaled(number: int) -> dict[str, Any]:
    """Return norm and layer scale of a block of DINOv2."""
    return {"before": f"norm{number}", "gain": f"layer_scale{number}.lambda1"}


_VIT = _named(
    IMAGE_CLASSIFIER, config=_SIZES, final_norm="layernorm", layer="Layer", model_settings={"add_pooling_layer": False},
    blocks=(
        attention(before="layernorm_before", **_EQUAL_HEADS),
        mlp("fc1", output="fc2", before="layernorm_after", attributes=()),
    ),
)  # fmt: skip
_DINO = _named(
    BOTH_CLASSIFIER, config=_SIZES, final_norm="layernorm", layer="Layer", layers="encoder.layer", decoder="dinov2",
    any_picture=True, derived=("stage_names", "out_features", "out_indices"),
)  # fmt: skip
_DINO_HEADS = attention(**_EQUAL_HEADS, **_scaled(1))
_DINO_MLP: dict[str, Any] = {"attributes": (), "resized": True, **_scaled(2)}
CLASSIFIERS: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("vit", "ViT", decoder="vit", **_VIT),
        Family("deit", "DeiT", decoder="deit", **_VIT),
        # a layer scale behind every block; the MLP is said as a multiple of the hidden size
        Family("dinov2", "Dinov2", (_DINO_HEADS, mlp("fc1", output="fc2", **_DINO_MLP)),
               needs={"use_swiglu_ffn": (False,)}, wording=Wording(_WIDER, _times), **_DINO, others=(
            Family("dinov2", "Dinov2", (_DINO_HEADS, mlp(**_DINO_MLP)), needs={"use_swiglu_ffn": (True,)},
                   wording=Wording(_WIDER, _two_thirds), **_DINO),)),
        # the pooling head, which classifiers have and do not read, is as wide as the configuration says of the layers
        Family("siglip", "Siglip", (
            attention(output="out_proj", before="layer_norm1", resized=True, **_HEADS, attributes=(
                ("num_heads", Layout("kv_groups")),)),
            mlp("fc1", output="fc2", before="layer_norm2", attributes=(), resized=True),
        ), config={key: text for key, text in _SIZES.items() if key != "head_dim"}, **_named(
            MEAN_CLASSIFIER, final_norm="post_layernorm", layer="EncoderLayer", layers="encoder.layers",
            decoder="vision_model", model="VisionModel", part="vision_config")),
    )
}  # fmt: skip
"""The image classifiers that can be pruned, by ``config.model_type``."""
