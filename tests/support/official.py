"""The official code's decisions, where they are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from multipruner.core.structure import LayerSize, Structure

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
HEAD_DIM = 64
QUERIES_PER_KV = 3


def after(structure: Structure, step: dict[str, Any]) -> Structure:
    """The structure after one official step."""
    size = structure[step["layer"]]
    if step["stage"] == "blocks":
        return structure.replace(step["layer"], size.without(step["kind"]))
    if step["kind"] == "mlp":
        return structure.replace(step["layer"], LayerSize(size.query_heads, size.kv_heads, step["width"]))
    groups = step["width"] // (QUERIES_PER_KV * HEAD_DIM)
    return structure.replace(step["layer"], LayerSize(QUERIES_PER_KV * groups, groups, size.channels))
