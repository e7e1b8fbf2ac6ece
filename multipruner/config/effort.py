"""How much a run measures, in one place: a row for every effort, by method. Single keys win over a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .choices import METHODS
from .precedence import merge_into

DEFAULT = "fast"
"""The effort where none is named, and a method has none of its own."""


@dataclass(frozen=True, slots=True)
class Effort:
    """One row.

    Attributes:
        costs: about what a run takes, for the help.
        by_method: method -> the recipe fields that it sets.
    """

    costs: str
    by_method: Mapping[str, Mapping[str, Any]] = field(hash=False)


def _measured(sequences: int, width: int, moments: int, order: int | None = None) -> dict[str, int]:
    found = {"sequences": sequences, "width_sequences": width, "moments_sequences": moments}
    return found if order is None else {**found, "order_sequences": order}


def _of(program: Mapping[str, Any], paper: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Give the greedy path of our own what the program has; it has no tables and no rounds to make."""
    return {"program": program, "greedy": program, "paper": paper}


EFFORTS: dict[str, Effort] = {
    "fast": Effort(
        "28,672 tokens for order and repair, first tables from one backward pass, no round",
        _of(
            {
                "calibration": {**_measured(4, 2, 56), "length": 512},
                "tables": "energies",
                "rounds": 0,
                "accumulate_ridge": 0.6,
            },
            {"calibration": {**_measured(4, 1, 256), "length": 128}},
        ),
    ),
    "balanced": Effort(
        "40,960 tokens for the last repair, 24,576 of them for the order, first tables measured, no round",
        _of(
            {"calibration": {**_measured(8, 2, 80, 48), "length": 512}, "rounds": 0, "accumulate_ridge": 0.5},
            {"calibration": {**_measured(8, 4, 256), "length": 128}},
        ),
    ),
    "thorough": Effort(
        "122,880 tokens for order and repair, two rounds around the first solution",
        _of(
            {"calibration": {**_measured(8, 4, 240), "length": 512}, "rounds": 2},
            {"calibration": {**_measured(8, 4, 256), "length": 128}},
        ),
    ),
}
"""Every effort by its name. The published method is as it was published from ``balanced`` on."""


def effort_of(method: str) -> str:
    """Return the effort of a method where none is named."""
    return str(METHODS[method].preset.get("effort", DEFAULT)) if method in METHODS else DEFAULT


def defaults_of(method: str, effort: str) -> dict[str, Any]:
    """Return the recipe fields that a method and an effort set where nothing else is said.

    Args:
        method: a key of :data:`.METHODS`; one without a row in an effort has its own numbers at every effort.
        effort: a key of :data:`EFFORTS`.

    Returns:
        A new mapping; empty for names that are in no table, which the recipe itself refuses.
    """
    found: dict[str, Any] = {}
    merge_into(found, METHODS[method].preset if method in METHODS else {})
    if effort in EFFORTS:
        merge_into(found, EFFORTS[effort].by_method.get(method, {}))
    return found


def costs() -> str:
    """Say what every effort costs, for the help."""
    return "; ".join(f"{name}: {row.costs}" for name, row in EFFORTS.items())
