"""Checkpoints with something odd about them, each an edit of a tiny one, and a short run on any of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.tiny import tiny_model, tiny_tokenizer

Weights = dict[str, torch.Tensor]
FILE = "model.safetensors"


def write_model(folder: Path, family: str = "llama", **options: Any) -> Path:
    """A tiny model of two layers, its tokenizer, and ``text.txt``."""
    tiny_model(family, **{"layers": 2, **options}).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text = " ".join(f"w{4 + (n * n + n // 7) % 93}" for n in range(2000))
    (folder / "text.txt").write_text(text)
    return folder


def copied(folder: Path, target: Path) -> Path:
    """A copy to edit."""
    shutil.copytree(folder, target)
    return target


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a value of ``...`` takes the key away."""
    record = json.loads(path.read_text())
    for key, value in changes.items():
        record.pop(key, None)
        if value is not ...:
            record[key] = value
    path.write_text(json.dumps(record))


def edit_tensors(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Write the only weight file anew."""
    weights = change(load_file(folder / FILE))
    save_file({name: weight.contiguous().clone() for name, weight in weights.items()}, folder / FILE, {"format": "pt"})


def short_run(folder: Path, output: Path, *more: str) -> list[str]:
    """Arguments of a run of a second or two, without repair: its result is the dense model with parts zeroed."""
    text = str(folder / "text.txt")
    return [
        "--model", str(folder), "--ratio", "0.2", "--calibration", text, "--sequences", "2", "--length", "16",
        "--moments-sequences", "4", "--rounds", "0", "--channel-group", "8", "--importance", "magnitude",
        "--repair", "none", "--eval-text", text, "--output", str(output), *more,
    ]  # fmt: skip
