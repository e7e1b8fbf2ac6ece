"""Tiny random image classifiers, their image processor, and folders of small pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, PreTrainedModel, ViTImageProcessorPil

from multipruner.core.families import first_row, spec_for

SIDE, CLASSES = 8, 5
SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": SIDE, "patch_size": 2,
    "num_channels": 3,
}  # fmt: skip
_WIDE = {"intermediate_size": 40}
VARIANTS: dict[str, dict[str, Any]] = {
    "vit": _WIDE,
    "deit": _WIDE,
    "dinov2": {"mlp_ratio": 1},
    "dinov2-gated": {"mlp_ratio": 1, "use_swiglu_ffn": True},
    "siglip": _WIDE,
    "siglip-headless": {**_WIDE, "vision_use_head": False, "hidden_size": 40},  # which three heads do not divide
}
"""Tiny classifiers: the model type, then what is special, and what its configuration says beside the sizes."""


def config_of(variant: str, num_labels: int = CLASSES, **more: Any) -> Any:
    """The configuration of a tiny classifier of :data:`VARIANTS`."""
    model_type = variant.partition("-")[0]
    row: Any = first_row(model_type)
    own = {**SIZES, **VARIANTS[variant], **more}
    said = {row.part: own} if row.part else own
    config: Any = CONFIG_MAPPING[model_type]
    return config(**said, num_labels=num_labels, attn_implementation="sdpa")


def tiny_classifier(family: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random model of :data:`VARIANTS`, nothing of which is zero or one."""
    torch.manual_seed(seed)
    config = config_of(family, **sizes)
    model = getattr(transformers, spec_for(config).class_name)(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.15 * torch.randn_like(weight))
    return model


def processor() -> Any:
    """Of the tiny classifiers."""
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})


def pixels(count: int = 6, seed: int = 1) -> torch.Tensor:
    """Random pixels, [pictures, 3, 8, 8]."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def write_classifier(folder: Path, family: str = "vit", **sizes: Any) -> Path:
    """A folder that a run takes for its model."""
    tiny_classifier(family, **sizes).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def write_pictures(folder: Path, each: int = 8, names: tuple[str, ...] = tuple("01234"), mode: str = "L") -> Path:
    """Noise of another brightness for each class, in one sub-folder each; flat where there are no names."""
    numbers = np.random.default_rng(0)
    for label, name in enumerate(names or ("",)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            rows = numbers.integers(40 * label, 40 * label + 90, (SIDE, SIDE)).astype(np.uint8)
            Image.fromarray(rows).convert(mode).save(folder / name / f"{number}.png")
    return folder
