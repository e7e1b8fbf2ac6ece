"""Tiny random image classifiers, their image processor, and folders of small pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, PreTrainedModel, ViTImageProcessorPil

from multipruner.core.families import spec_for

SIDE, CLASSES = 8, 5
SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40, "image_size": SIDE,
    "patch_size": 2, "num_channels": 3, "num_labels": CLASSES,
}  # fmt: skip


def tiny_classifier(family: str, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A random model of a family, nothing of which is zero or one."""
    torch.manual_seed(seed)
    config: Any = CONFIG_MAPPING[family](**{**SIZES, "attn_implementation": "sdpa", **sizes})
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
