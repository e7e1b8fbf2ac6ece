"""What tells two records apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Return the entries in which two records differ, as ``name: theirs -> ours``."""
    names: Iterable[str] = dict.fromkeys((*theirs, *ours))
    return [f"{name}: {theirs.get(name)} -> {ours.get(name)}" for name in names if theirs.get(name) != ours.get(name)]


def digest(record: Any, default: Callable[[Any], Any] | None = None) -> str:
    """Return SHA-256 (hexadecimal) of a JSON value, the same for every order of its keys.

    Args:
        record: the value.
        default: makes JSON of what is none; without it such a value is a ``TypeError``.
    """
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=default).encode()).hexdigest()
