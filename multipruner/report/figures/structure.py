"""The shape of pruned models: one row per decoder layer, one column per kind of block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from multipruner.core.axes import BLOCK_KINDS, Axis
from multipruner.core.structure import Anatomy, total
from multipruner.report.inputs import RunFiles

from .drawing import EMPTY, KIND, MUTED, NARROW, Drawing, canvas, drawing, printable

_GAP = 0.14  # between two columns, as a share of a column


def _axes_of(anatomy: Anatomy) -> list[tuple[str, Axis]]:
    """Return (kind, axis) of everything that blocks of a model can be cut along."""
    return [(kind, axis) for kind in anatomy.kinds for axis in anatomy.axes(kind)]


def _column(axis: Axis) -> str:
    """Return what tables call the number of an axis' units."""
    return axis.label.lower().replace(" ", "_")


def _in_cells(kind: str) -> bool:
    """Tell whether single units are drawn: those that are as wide as a head; others are a bar."""
    return bool(BLOCK_KINDS[kind].axes[0].width)


def _kept(run: RunFiles, block: int) -> list[int]:
    """Return the units of the finest axis that a block keeps, counted through in the dense model's numbering."""
    kind = run.anatomy[block].kind
    chosen: Any = run.plan.kept(block)
    last = BLOCK_KINDS[kind].finest
    if not last.within:
        return list(chosen[last.name])
    each = run.anatomy.counts(block)[last.name]
    return [
        unit * each + inner
        for unit, row in zip(chosen[last.within], chosen[last.name], strict=True)
        for inner in row
    ]  # fmt: skip


def structure_figure(run: RunFiles, name: str) -> Drawing:
    """Return every head as a cell and every MLP as a bar, in the dense model's numbering."""
    anatomy, kept = run.anatomy, run.structure
    axes = _axes_of(anatomy)
    drawn = [kind for kind in anatomy.kinds if _in_cells(kind)]
    columns = ("layer", *(f"dense_{_column(axis)}" for _, axis in axes), *(_column(axis) for _, axis in axes),
               *(f"kept_{kind}_indices" for kind in drawn))  # fmt: skip
    rows = []
    for layer in range(anatomy.layers):
        blocks = {anatomy[number].kind: number for number in anatomy.of_layer(layer)}
        counts = [
            [total(kind, sizes[blocks[kind]], axis.name) if kind in blocks else 0 for kind, axis in axes]
            for sizes in (anatomy.dense, kept)
        ]
        indices = (" ".join(map(str, _kept(run, blocks[kind]))) if kind in blocks else "" for kind in drawn)
        rows.append((layer, *counts[0], *counts[1], *indices))
    left = ", ".join(
        f"{anatomy.count(kept, kind)} of {anatomy.count(anatomy.dense, kind)} {BLOCK_KINDS[kind].label} blocks"
        for kind in anatomy.kinds
    )
    gone = "; ".join(f"without {BLOCK_KINDS[kind].label}: {_missing(run, kind)}" for kind in anatomy.kinds)
    return drawing(
        lambda width: _wings(run, width),
        name=name,
        title="What is left, layer by layer",
        caption="Each row is a decoder layer. Heads are cells: coloured ones stay, each at its place in the dense "
        "model. Of channels the bar is the share that stays. A removed block is crossed out.",
        alt=f"{left} are left in {anatomy.layers} layers; {gone}.",
        columns=columns,
        rows=rows,
    )


def _missing(run: RunFiles, kind: str) -> str:
    gone = [str(run.anatomy[number].layer) for number in run.anatomy.of_kind(kind) if not run.structure[number]]
    return f"layers {', '.join(gone)}" if gone else "no layer"


def _wings(run: RunFiles, width: float) -> Figure:
    anatomy = run.anatomy
    layers = anatomy.layers
    figure, (axes,) = canvas(width, min(0.9 + 0.17 * layers, 11.0) if layers > 6 else 0.9 + 0.26 * layers)
    ticks: list[tuple[float, str]] = []
    wings = _Wings(axes)
    for column, kind in enumerate(anatomy.kinds):
        unit, left = BLOCK_KINDS[kind].finest.name, column * (1 + _GAP)
        numbers = anatomy.of_kind(kind)
        most = max(total(kind, anatomy[number].dense, unit) for number in numbers)
        for number in numbers:
            row, dense = anatomy[number].layer, total(kind, anatomy[number].dense, unit)
            if _in_cells(kind):
                wings.cells(kind, left, row, (dense, most), _kept(run, number))
            else:
                wings.bar(kind, left, row, dense / most, total(kind, run.structure[number], unit) / most)
        if _in_cells(kind):
            ticks += [(left + 0.5 / most, "head 0"), (left + 1 - 0.5 / most, f"head {most - 1}")]
        else:
            ticks += [(left + share, f"{most * share:,g}") for share in (0, 0.5, 1)]
        label = BLOCK_KINDS[kind].finest.label
        axes.text(left + 0.5, -0.95, label, ha="center", va="bottom", color=KIND[kind], weight="bold")
    wings.finish()
    axes.set_xlim(-0.01, len(anatomy.kinds) * (1 + _GAP) - _GAP + 0.01)
    axes.set_ylim(layers - 0.4, -0.6)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 16), steps=[1, 2, 5, 10]))
    axes.set_ylabel("decoder layer")
    axes.set_xticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if width <= NARROW:
        axes.tick_params(axis="x", labelsize=7.5)
    return figure


class _Wings:
    """Collects the rectangles of a picture, so that a model of any size is a handful of drawing calls."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._patches: dict[str, list[Rectangle]] = {}
        self._crosses: list[tuple[float, float]] = []

    def cells(self, kind: str, left: float, row: int, counts: tuple[int, int], kept: Sequence[int]) -> None:
        """Draw units side by side; of blocks with fewer than the most they stand to the right."""
        (dense, most), stays = counts, set(kept)
        cell, gap = 1 / most, 0 if most > 48 else 0.12
        for unit in range(dense):
            at = left + 1 - (dense - unit) * cell
            colour = KIND[kind] if unit in stays else EMPTY
            self._add(colour, at + cell * gap / 2, row, cell * (1 - gap))
        if dense and not stays:
            self._crosses.append((left + 1 - dense * cell / 2, row))

    def bar(self, kind: str, left: float, row: int, dense: float, kept: float) -> None:
        """Draw the share that stays, in the dense block's."""
        self._add(EMPTY, left, row, dense)
        self._add(KIND[kind], left, row, kept)
        if dense and not kept:
            self._crosses.append((left + dense / 2, row))

    def _add(self, colour: str, left: float, row: int, width: float) -> None:
        self._patches.setdefault(colour, []).append(Rectangle((left, row - 0.4), width, 0.8))

    def finish(self) -> None:
        """Draw what was collected, the empty places first."""
        for colour, patches in sorted(self._patches.items(), key=lambda each: each[0] != EMPTY):
            self._axes.add_collection(PatchCollection(patches, facecolor=colour, linewidth=0))
        if self._crosses:
            x, y = zip(*self._crosses, strict=True)
            self._axes.plot(x, y, "x", color=MUTED, markersize=4.5, markeredgewidth=1.1)


def structures_figure(runs: Sequence[RunFiles], name: str) -> Drawing:
    """Return one strip per run: the first kind of block upwards, the others downwards."""
    axes = _axes_of(runs[0].anatomy)
    rows = []
    for run in runs:
        for layer in range(run.anatomy.layers):
            blocks = {run.anatomy[number].kind: number for number in run.anatomy.of_layer(layer)}
            counts = [
                total(kind, sizes[blocks[kind]], axis.name) if kind in blocks else 0
                for kind, axis in axes
                for sizes in (run.structure, run.anatomy.dense)
            ]
            rows.append((run.label, layer, *counts))
    columns = [name for _, axis in axes for name in (_column(axis), f"dense_{_column(axis)}")]
    up, *down = (BLOCK_KINDS[kind].finest.label for kind in runs[0].anatomy.kinds)
    return drawing(
        lambda width: _strips(runs, width),
        name=name,
        title="The structures",
        caption=f"Bars upwards: the share of a layer's {up} that stays. Bars downwards: the share of its "
        f"{', '.join(down)}. Gaps are removed blocks.",
        alt=f"Kept share of {', '.join((up, *down))} per decoder layer of "
        + ", ".join(f"{run.label} ({run.report.ratio:.1%} removed)" for run in runs)
        + ".",
        columns=("run", "layer", *columns),
        rows=rows,
    )


def _strips(runs: Sequence[RunFiles], width: float) -> Figure:
    most = max(run.anatomy.layers for run in runs)
    figure, panels = canvas(width, 0.5 + 1.15 * len(runs), len(runs), sharex=True)
    for axes, run in zip(panels, runs, strict=True):
        kinds = run.anatomy.kinds
        shares = [_shares(run, kind) for kind in kinds]
        wide = 0.84 / max(1, len(kinds) - 1)
        for number, (kind, kept) in enumerate(zip(kinds, shares, strict=True)):
            sign, offset = (1, 0.0) if number == 0 else (-1, (number - 1) * wide - 0.42 + wide / 2)
            at, thick = [layer + offset for layer in kept], 0.84 if number == 0 else wide
            axes.bar(at, [sign] * len(at), color=EMPTY, width=thick)
            axes.bar(at, [sign * share for share in kept.values()], color=KIND[kind], width=thick)
        axes.set_ylim(-1.05, 1.05)
        down = ", ".join(BLOCK_KINDS[kind].label for kind in kinds[1:])
        axes.set_yticks([-1, 0, 1], [down, "", BLOCK_KINDS[kinds[0]].label])
        axes.get_yticklabels()[2].set_color(KIND[kinds[0]])
        if len(kinds) == 2:
            axes.get_yticklabels()[0].set_color(KIND[kinds[1]])
        axes.spines[:].set_visible(False)
        axes.set_xlim(-0.6, most - 0.4)
        axes.tick_params(axis="both", length=0)
        label = printable(run.label, 20 if width <= NARROW else 60)
        axes.set_title(f"{label}: {run.report.ratio:.1%} removed")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, steps=[1, 2, 5, 10]))
    panels[-1].set_xlabel("decoder layer")
    return figure


def _shares(run: RunFiles, kind: str) -> dict[int, float]:
    """Return layer -> the share of the finest axis of its block of a kind that stays."""
    found = {}
    for number in run.anatomy.of_kind(kind):
        place = run.anatomy[number]
        dense = total(kind, place.dense, BLOCK_KINDS[kind].finest.name)
        found[place.layer] = total(kind, run.structure[number], BLOCK_KINDS[kind].finest.name) / dense
    return found
