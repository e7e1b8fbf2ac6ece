"""The official code's decisions, where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multipruner.core.structure import Structure

from .layers import changed, layers_of

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
HEAD_DIM = 64
QUERIES_PER_KV = 3


def after(structure: Structure, step: dict[str, Any]) -> Structure:
    """The structure after one official step."""
    heads, groups, channels = layers_of(structure)[step["layer"]]
    if step["stage"] == "blocks":
        gone = step["kind"] == "attention"
        return changed(structure, step["layer"], (0, 0, channels) if gone else (heads, groups, 0))
    if step["kind"] == "mlp":
        return changed(structure, step["layer"], (heads, groups, step["width"]))
    groups = step["width"] // (QUERIES_PER_KV * HEAD_DIM)
    return changed(structure, step["layer"], (QUERIES_PER_KV * groups, groups, channels))
