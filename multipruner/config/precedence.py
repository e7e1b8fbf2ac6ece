"""Plain mappings of recipe fields that are merged into one, later ones winning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def merge_into(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    """Put a mapping's fields into another, section by section."""
    for key, value in source.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge_into(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def asked_ratio(sources: Sequence[Mapping[str, Any]], default: Any) -> Any:
    """The ratio that several mappings ask for together; budgets without one replace it.

    Args:
        sources: later ones win.
        default: where none of them says anything.
    """
    ratio = default
    for source in sources:
        if "ratio" in source:
            ratio = source["ratio"]
        elif source.get("budgets"):
            ratio = None
    return ratio
