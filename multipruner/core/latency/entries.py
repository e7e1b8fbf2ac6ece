"""Measured times of one workload, and how a file holds them. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal

from multipruner.core.errors import ConfigError
from multipruner.core.structure import Size

MOST = 2**31 - 1
"""Positions and sizes are 32-bit numbers in most of what runs models."""
Phase = Literal["prefill", "decode", "pictures"]
PHASES = {"prefill": "t", "decode": "t", "pictures": "p"}  # of tokens or pixels, in a workload's name


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: one forward pass of the whole model.

    Attributes:
        phase: ``"prefill"`` of a prompt, ``"decode"`` of one token behind a filled KV cache, ``"pictures"`` classified.
        batch: sequences, or pictures.
        tokens: prefill: length of the prompt; decode: tokens in the cache; pictures: pixels of a side.

    Raises:
        ConfigError: for another phase, or numbers that no model is run with.
    """

    phase: Phase
    batch: int
    tokens: int

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ConfigError(f"a workload is of phase {', '.join(map(repr, PHASES))}, not {self.phase!r}")
        if min(self.batch, self.tokens) < 1:
            raise ConfigError(f"a workload needs a batch and a number of tokens or pixels of at least 1: {self}")
        if max(self.batch, self.tokens) > MOST:
            raise ConfigError(f"a workload has at most {MOST:,} sequences, tokens or pixels: {self}")

    @property
    def name(self) -> str:
        """Such as ``prefill-b1-t512``, ``decode-b1-t256`` or ``pictures-b8-p224``."""
        return f"{self.phase}-b{self.batch}-{PHASES[self.phase]}{self.tokens}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured time.

    Attributes:
        milliseconds: per forward pass.
        spread: interquartile range of the samples, relative to their median.
        samples: how many there were.
    """

    milliseconds: float
    spread: float
    samples: int


@dataclass(frozen=True)
class WorkloadTable:
    """The entries of one workload.

    Attributes:
        workload: what was timed.
        blocks: by the kind of a block, its entries by size; the empty size is a removed block.
        constant: the rest of a forward pass: embedding, final norm, head, calls.
        check: largest relative error of interpolation at the measured sizes where it was checked.
    """

    workload: Workload
    blocks: Mapping[str, Mapping[Size, Entry]]
    constant: Entry
    check: float = 0.0

    def milliseconds(self, kind: str) -> dict[Size, float]:
        """Return the times of one kind of block by size; none where the table has none."""
        return {size: entry.milliseconds for size, entry in self.blocks.get(kind, {}).items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the sizes of every kind in ascending order."""

        def listed(entries: Mapping[Size, Entry]) -> list[dict[str, Any]]:
            return [{"size": list(size), **asdict(entries[size])} for size in sorted(entries)]

        return {
            **asdict(self.workload),
            "constant": asdict(self.constant),
            "interpolation_error": self.check,
            "blocks": {kind: listed(entries) for kind, entries in self.blocks.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> WorkloadTable:
        """Return the inverse of :meth:`to_json`.

        Raises:
            ConfigError: for a workload that cannot be.
            KeyError, TypeError, ValueError: when it is something else.
        """
        return cls(
            workload=Workload(record["phase"], record["batch"], record["tokens"]),
            blocks={kind: {tuple(row["size"]): _entry(row) for row in rows} for kind, rows in record["blocks"].items()},
            constant=_entry(record["constant"]),
            check=record["interpolation_error"],
        )


def _entry(row: Mapping[str, Any]) -> Entry:
    """Return a measurement as it is stored; one that is no time would make every budget hold, or none."""
    entry = Entry(row["milliseconds"], row["spread"], row["samples"])
    if not (isfinite(entry.milliseconds) and isfinite(entry.spread) and min(entry.milliseconds, entry.spread) >= 0):
        raise ValueError(f"{entry.milliseconds} milliseconds, spread {entry.spread}")
    return entry
