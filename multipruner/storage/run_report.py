"""The numbers of a ``report.json``: whether a run can have written them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from multipruner.core.errors import OutputError

_SHARES = ("ratio", "backbone_ratio")
_OWN = ("search.loss", "search.loss_held_out", "search.loss_before_repair_of_all")
"""Losses of the result itself, in a section that also tells of candidates."""


def check_numbers(report: Mapping[str, Any], path: Path) -> None:
    """Refuse a report in which a ratio is no ratio, or a number is none: nothing that it says can be relied on.

    Args:
        report: what the file holds.
        path: the file, for errors.

    Raises:
        OutputError: naming the key and its value.
    """
    for key in _SHARES:
        value = report.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise OutputError(_damaged(path, key, value, "a number from 0 to 1"))
    for key, value in _numbers(report, ""):
        if not math.isfinite(value) and not _may_overflow(key, value):
            raise OutputError(_damaged(path, key, value, "a finite number"))


def _may_overflow(key: str, value: float) -> bool:
    """Tell whether a run can have measured this: a candidate's loss, or a perplexity (the exponential of one), may be
    infinite, and what is computed from two such perplexities no number."""
    if "perplexity" in key.split("."):
        return value == math.inf or key.endswith(("difference", "stderr"))
    return key.startswith("search.") and key not in _OWN and value == math.inf


def _damaged(path: Path, key: str, value: Any, wanted: str) -> str:
    return f"{path} is damaged: {key} is {str(value)[:80]}, not {wanted}; make the run again, or restore the file"


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    """Yield every number of a record, under its dotted key."""
    waiting = [(key, value)]
    while waiting:  # no recursion: a file may be nested as deeply as JSON is read
        key, value = waiting.pop()
        if isinstance(value, float):
            yield key.lstrip("."), value
        elif isinstance(value, Mapping):
            waiting += [(f"{key}.{name}", each) for name, each in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{key}.{number}", each) for number, each in enumerate(value)]
