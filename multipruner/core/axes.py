"""The axes along which the blocks of a model are cut, such as KV groups and channels: every one is a row here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

Dimension = Literal["blocks", "mlp", "heads"]
DIMENSIONS: tuple[Dimension, ...] = ("blocks", "mlp", "heads")
"""What a sequential path prunes in turn, and what has a share of the ratio."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A number of like units of a block, any of which can leave.

    Attributes:
        name: its key in layouts.
        label: its name for people.
        within: the axis of which every unit holds its own units of this one, and keeps as many as the others.
        step: what messages call the units that leave together.
        setting: the key of a recipe that says how many these are; where it says nothing, the axis stays whole.
        width: the constants that a unit is as wide as, of those in layouts.
        partial: the key of a recipe that allows steps which do not divide the axis; empty: none does.
        dimension: the dimension of a sequential path that prunes it.
        active: the constant that says how many of the units a token goes through, such as the experts that it is routed
            to: no block keeps fewer. Empty where it goes through all of them.
        compared: the constant that says how many of its units a router looks at in every unit of what it is within.
        unsaid: the constant that it is as long as in models that are not cut along it, whose sizes do not name it;
            empty where every size does. Such axes are the last of their kind, and sizes that name one name those before
            it.
        missing: why the rows of some families do not have it, where it is unsaid.
    """

    name: str
    label: str
    within: str = ""
    step: str = ""
    setting: str = ""
    width: tuple[str, ...] = ()
    partial: str = ""
    dimension: Dimension = "heads"
    active: str = ""
    compared: str = ""
    unsaid: str = ""
    missing: str = ""

    @property
    def in_each(self) -> str:
        """What messages add to a number of its units: in each of which others, where it is within some."""
        return f" in each of the {AXES[self.within].label}" if self.within else ""

    def least(self, constants: Counts) -> int:
        """Tell how many units a block that is there keeps at least: those that a token goes through; within others, its
        share in each of those that it goes through, and as many as are compared there.
        """
        outer = constants.get(AXES[self.within].active, 1) if self.within else 1
        return max(-(-constants.get(self.active, 1) // outer), constants.get(self.compared, 1))


@dataclass(frozen=True, slots=True)
class Kind:
    """What the blocks of one kind can be cut along."""

    name: str
    label: str
    axes: tuple[Axis, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its axes, in the order of a size."""
        return tuple(axis.name for axis in self.axes)

    @property
    def always(self) -> tuple[Axis, ...]:
        """The axes that every size names."""
        return tuple(axis for axis in self.axes if not axis.unsaid)

    def along(self, size: tuple[object, ...]) -> tuple[Axis, ...]:
        """Return the axes that a size names, or units of all of them; of nothing, those that every size does.

        Raises:
            ValueError: when no size has so many counts.
        """
        named = self.axes[: len(size)] if size else self.always
        if not len(self.always) <= len(named) == len(size or named):
            raise ValueError(f"{size} is no size of a block of kind {self.name!r}, which has {', '.join(self.names)}")
        return named

    @property
    def finest(self) -> Axis:
        """The axis whose units its blocks are drawn and counted by: the last one that every size names."""
        return self.always[-1]

    @property
    def whole(self) -> bool:
        """Whether its blocks stay whole or leave whole."""
        return not any(axis.setting for axis in self.axes)


VALUES, PAIRS = "value_dim", "rope_pairs"
"""The axes of the dimensions of values, and of the pairs of dimensions of queries and keys that rotary embeddings turn:
families' own code knows heads as wide as the dense model's alone."""
_EXPERT = ("expert_width",)
BLOCK_KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "attention",
            "attention",
            (
                Axis("kv_groups", "KV groups", step="KV group step", setting="kv_group_step", width=("head_dim",)),
                Axis(
                    "queries",
                    "query heads",
                    "kv_groups",
                    step="query head step",
                    setting="query_head_step",
                    width=("head_dim",),
                ),
                Axis(
                    VALUES,
                    "value dimensions",
                    "kv_groups",
                    step="value dim step",
                    setting="value_dim_step",
                    unsaid="head_dim",
                    missing="its values are no matrix of their own, or its code knows one size alone",
                ),
                Axis(
                    PAIRS,
                    "RoPE pairs",
                    "kv_groups",
                    step="RoPE pair step",
                    setting="rope_pair_step",
                    unsaid="pairs",
                    missing="its queries and keys are normed or no matrices of their own, or its code knows one size "
                    "alone",
                ),
            ),
        ),
        Kind(
            "mlp",
            "MLP",
            (
                Axis(
                    "channels",
                    "MLP channels",
                    step="channel group",
                    setting="channel_group",
                    partial="partial_groups",
                    dimension="mlp",
                ),
            ),
        ),
        Kind(
            "experts",
            "MoE",
            (
                Axis(
                    "experts",
                    "experts",
                    step="expert step",
                    setting="expert_step",
                    width=_EXPERT,
                    dimension="mlp",
                    active="active",
                ),
            ),
        ),
        Kind("mixer", "mixer", (Axis("mixers", "mixers", dimension="blocks"),)),  # one unit: it is there, or gone
        Kind(  # of which a token takes some, from some groups of them
            "grouped_experts",
            "MoE",
            (
                Axis("expert_groups", "expert groups", width=_EXPERT, dimension="mlp", active="active_groups"),
                Axis(
                    "group_experts",
                    "experts",
                    "expert_groups",
                    step="expert step",
                    setting="expert_step",
                    width=_EXPERT,
                    dimension="mlp",
                    active="active",
                    compared="compared",
                ),
            ),
        ),
    )
}
AXES: dict[str, Axis] = {axis.name: axis for kind in BLOCK_KINDS.values() for axis in kind.axes}
"""Every axis by its name. Other names in a layout are constants of the model, which are never cut."""

STREAM = Kind("stream", "residual stream", (Axis("hidden", "hidden dimensions", dimension="mlp"),))
"""What a model has once, and what is no block: the residual stream, which every block reads and writes."""

Counts = Mapping[str, int]
"""Name -> how many units; of an axis within another one, how many in each of its units."""
Selection = int | Sequence[int] | Sequence[Sequence[int]]
"""What stays of an axis: so many from the beginning, or these in this order; of an axis within another one, these for
each of the units that stay of that one."""
Kept = Mapping[str, Selection]
"""Axis -> what stays; axes that are not named stay whole."""
LARGEST = 10_000_000
"""What every index in a file is below: a damaged one shall not fill the memory."""


def with_unsaid(counts: Counts, rotated: float = 1.0) -> dict[str, int]:
    """Return counts, and those of the axes that sizes need not name: as many as in a model that is not cut along them.

    Args:
        counts: constants among them.
        rotated: the share of every head that rotary embeddings turn, in pairs; the rest of it is ``unrotated``.
    """
    if (width := counts.get("head_dim")) is not None:
        pairs = int(width * rotated) // 2
        counts = {"pairs": pairs, "unrotated": width - 2 * pairs, **counts}
    return {**{axis.name: counts[axis.unsaid] for axis in AXES.values() if axis.unsaid in counts}, **counts}


def up_to_last(names: Collection[str]) -> tuple[str, ...]:
    """Return the axes that sizes name which are to name these besides what every size does: those before them, too."""
    found = [axes for kind in BLOCK_KINDS.values() if (axes := [axis.name for axis in kind.axes if axis.unsaid])]
    last = (max((place for place, name in enumerate(axes, 1) if name in names), default=0) for axes in found)
    return tuple(name for axes, end in zip(found, last, strict=True) for name in axes[:end])


def ranges_of(units: Sequence[int]) -> str:
    """Return sorted units as text: ``(0, 1, 2, 7)`` becomes ``"0-2,7"``."""
    runs = []
    for _, run in groupby(enumerate(units), key=lambda pair: pair[1] - pair[0]):
        members = [unit for _, unit in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(runs)


def units_in(text: str) -> tuple[int, ...]:
    """Return the inverse of :func:`ranges_of`.

    Raises:
        ValueError: when it is no such text, or an index is too large.
    """
    units: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        if int(last or first) >= LARGEST:
            raise ValueError(f"index {last or first} is too large")
        units.extend(range(int(first), int(last or first) + 1))
    return tuple(units)
