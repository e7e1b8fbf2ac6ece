"""The rows of image classifiers: transformers over the patches of a picture, judged by its first position."""

from __future__ import annotations

from typing import Any

from multipruner.core.layout import Layout

from .family import Family
from .parts import attention, mlp
from .tasks import IMAGE_CLASSIFIER

_VIT: dict[str, Any] = {
    "blocks": (
        attention(path="attention", before="layernorm_before", cached=(), cache="",
                  attributes=(("num_attention_heads", Layout("kv_groups")),)),
        mlp("fc1", output="fc2", before="layernorm_after", attributes=()),
    ),
    "config": {"hidden_size": "hidden", "head_dim": "head_dim", "num_attention_heads": "kv_groups",
               "intermediate_size": "channels"},
    "task": IMAGE_CLASSIFIER, "causal_lm": IMAGE_CLASSIFIER.ending, "embeddings": "embeddings",
    "final_norm": "layernorm", "head": "classifier", "layer": "Layer", "layer_arguments": "config",
    "model_settings": {"add_pooling_layer": False},
}  # fmt: skip
CLASSIFIERS: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("vit", "ViT", decoder="vit", **_VIT),
        Family("deit", "DeiT", decoder="deit", **_VIT),
    )
}
"""The image classifiers that can be pruned, by ``config.model_type``."""
