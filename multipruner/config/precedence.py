"""Plain mappings of recipe fields that are merged into one, later ones winning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

TRUST = "MULTIPRUNER_TRUST_REMOTE_CODE"
"""The environment variable by which a user lets every model's own code be run."""
TRUST_KEY = "trust_remote_code"


def merge_into(target: dict[str, Any], source: Mapping[str, Any]) -> None:
    """Put a mapping's fields into another, section by section."""
    for key, value in source.items():
        if isinstance(value, Mapping) and isinstance(target.get(key), dict):
            merge_into(target[key], value)
        else:
            target[key] = dict(value) if isinstance(value, Mapping) else value


def asked_ratio(sources: Sequence[Mapping[str, Any]], default: Any) -> Any:
    """Return the ratio that several mappings ask for together; budgets without one replace it.

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


def trusts(asked: bool) -> bool:
    """Tell whether a model's own code may be run: the caller says so, or the user's environment (``1``)."""
    return asked or os.environ.get(TRUST) == "1"


def from_file(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a file may decide: everything but whether code that comes with a model is run.

    Who writes a recipe or a report is not who runs it. A model that brings code is refused in a line that names the
    flag, whatever the file asks for.
    """
    return {key: value for key, value in mapping.items() if key != TRUST_KEY}
