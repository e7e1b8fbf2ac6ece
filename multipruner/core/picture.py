"""The shape of a model in characters."""

from __future__ import annotations

from .axes import BLOCK_KINDS
from .structure import Anatomy, Structure, total

_BARS = " ▁▂▃▄▅▆▇█"


def bar(part: int, whole: int) -> str:
    """One character whose height is the share that stays; a dot for nothing."""
    if not part:
        return "·"
    return _BARS[max(1, round(8 * part / whole))]


def picture(structure: Structure, anatomy: Anatomy) -> str:
    """Draw the shape of a model: one character per block, its height what the block keeps, a dot for nothing."""
    ruler = "".join(str(number // 10 % 10) if number % 10 == 0 else " " for number in range(anatomy.layers)).rstrip()
    rows = {"layer": ruler} | {BLOCK_KINDS[kind].label: _row(structure, anatomy, kind) for kind in anatomy.kinds}
    wide = max(9, *map(len, rows))
    return "\n".join((*(f"{name:{wide}}  {row}".rstrip() for name, row in rows.items()), *_kept(structure, anatomy)))


def finest(kind: str) -> str:
    """The axis whose units a block of a kind is drawn and counted by: the last one, within all that it is within."""
    return BLOCK_KINDS[kind].names[-1]


def _row(structure: Structure, anatomy: Anatomy, kind: str) -> str:
    marks = [" "] * anatomy.layers
    for number in anatomy.of_kind(kind):
        place, axis = anatomy[number], finest(kind)
        marks[place.layer] = bar(total(kind, structure[number], axis), total(kind, place.dense, axis))
    return "".join(marks)


def kept_in_words(structure: Structure, anatomy: Anatomy) -> list[str]:
    """What stays of every kind, such as ``30 of 30 attention blocks (200 of 270 query heads)``."""
    found = []
    for kind in anatomy.kinds:
        axis = BLOCK_KINDS[kind].axes[-1]
        blocks = f"{anatomy.count(structure, kind)} of {anatomy.count(anatomy.dense, kind)}"
        units = f"{anatomy.total(structure, axis.name):,} of {anatomy.total(anatomy.dense, axis.name):,}"
        found.append(f"{blocks} {BLOCK_KINDS[kind].label} blocks ({units} {axis.label})")
    return found


def _kept(structure: Structure, anatomy: Anatomy) -> list[str]:
    return [f"{'kept: ' if not row else '      '}{text}" for row, text in enumerate(kept_in_words(structure, anatomy))]
