"""What tells two records apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """The entries in which two records differ, as ``name: theirs -> ours``."""
    names: Iterable[str] = dict.fromkeys((*theirs, *ours))
    return [f"{name}: {theirs.get(name)} -> {ours.get(name)}" for name in names if theirs.get(name) != ours.get(name)]


def digest(record: Any) -> str:
    """SHA-256 (hexadecimal) of a JSON value."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
