"""The shape of pruned models: one row per decoder layer, attention to the left, MLP to the right."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from multipruner.report.inputs import RunFiles

from .drawing import EMPTY, KIND, MUTED, NARROW, Drawing, canvas, drawing, printable

_GAP = 0.07  # between the two wings, as a share of a wing


def structure_figure(run: RunFiles, name: str) -> Drawing:
    """Every query head as a cell and every MLP as a bar, in the dense model's numbering."""
    plan = run.plan
    columns = ("layer", "dense_query_heads", "dense_kv_heads", "dense_channels", "query_heads", "kv_heads",
               "channels", "kept_query_head_indices")  # fmt: skip
    rows = [
        (n, full.query_heads, full.kv_heads, full.channels, size.query_heads, size.kv_heads, size.channels,
              " ".join(map(str, kept.query_heads)))
        for n, (full, size, kept) in enumerate(zip(run.dense, run.structure, plan.layers, strict=True))
    ]  # fmt: skip
    attention, mlp = run.structure.count("attention"), run.structure.count("mlp")
    return drawing(
        lambda width: _wings(run, width),
        name=name,
        title="What is left, layer by layer",
        caption="Each row is a decoder layer. To the left, its query heads: coloured ones stay, each at its place in "
        "the dense model. To the right, the share of its MLP channels that stays. A removed block is crossed out.",
        alt=f"{attention} of {run.dense.count('attention')} attention blocks and {mlp} of {run.dense.count('mlp')} MLP "
        f"blocks are left in {len(run.dense)} layers; without attention: {_missing(run, 'attention')}; "
        f"without MLP: {_missing(run, 'mlp')}.",
        columns=columns,
        rows=rows,
    )


def _missing(run: RunFiles, kind: str) -> str:
    gone = [
        str(number)
        for number, size in enumerate(run.structure)
        if not (size.has_attention if kind == "attention" else size.has_mlp)
    ]
    return f"layers {', '.join(gone)}" if gone else "no layer"


def _wings(run: RunFiles, width: float) -> Figure:
    layers = len(run.dense)
    figure, (axes,) = canvas(width, min(0.9 + 0.17 * layers, 11.0) if layers > 6 else 0.9 + 0.26 * layers)
    most_heads = max((full.query_heads for full in run.dense), default=1) or 1
    most_channels = max((full.channels for full in run.dense), default=1) or 1
    wings = _Wings(axes, gap=0 if most_heads > 48 else 0.12)
    for number, (full, size, kept) in enumerate(zip(run.dense, run.structure, run.plan.layers, strict=True)):
        wings.heads(number, full.query_heads, kept.query_heads, most_heads)
        wings.channels(number, full.channels / most_channels, size.channels / most_channels)
    wings.finish()
    axes.set_xlim(-1 - _GAP - 0.01, 1 + _GAP + 0.01)
    axes.set_ylim(layers - 0.4, -0.6)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(layers, 16), steps=[1, 2, 5, 10]))
    axes.set_ylabel("decoder layer")
    cell, ends = 1 / most_heads, (0, 0.5, 1)
    axes.set_xticks(
        [-_GAP - 1 + cell / 2, -_GAP - cell / 2, *(_GAP + share for share in ends)],
        ["head 0", f"head {most_heads - 1}", *(f"{most_channels * share:,g}" for share in ends)],
    )
    for side, label, kind in ((-1, "query heads", "attention"), (1, "MLP channels", "mlp")):
        axes.text(side * (_GAP + 0.5), -0.95, label, ha="center", va="bottom", color=KIND[kind], weight="bold")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if width <= NARROW:
        axes.tick_params(axis="x", labelsize=7.5)
    return figure


class _Wings:
    """Collects the rectangles of a picture, so that a model of any size is a handful of drawing calls."""

    def __init__(self, axes: Axes, gap: float) -> None:
        self._axes, self._gap = axes, gap
        self._patches: dict[str, list[Rectangle]] = {EMPTY: [], KIND["attention"]: [], KIND["mlp"]: []}
        self._crosses: list[tuple[float, float]] = []

    def heads(self, row: int, dense: int, kept: Sequence[int], most: int) -> None:
        cell, stays = 1 / most, set(kept)
        for head in range(dense):
            # head 0 is the outermost, so that the wing reads from left to right
            left = -_GAP - (dense - head) * cell
            colour = KIND["attention"] if head in stays else EMPTY
            self._add(colour, left + cell * self._gap / 2, row, cell * (1 - self._gap))
        if dense and not stays:
            self._crosses.append((-_GAP - dense * cell / 2, row))

    def channels(self, row: int, dense: float, kept: float) -> None:
        self._add(EMPTY, _GAP, row, dense)
        self._add(KIND["mlp"], _GAP, row, kept)
        if dense and not kept:
            self._crosses.append((_GAP + dense / 2, row))

    def _add(self, colour: str, left: float, row: int, width: float) -> None:
        self._patches[colour].append(Rectangle((left, row - 0.4), width, 0.8))

    def finish(self) -> None:
        for colour, patches in self._patches.items():
            self._axes.add_collection(PatchCollection(patches, facecolor=colour, linewidth=0))
        if self._crosses:
            x, y = zip(*self._crosses, strict=True)
            self._axes.plot(x, y, "x", color=MUTED, markersize=4.5, markeredgewidth=1.1)


def structures_figure(runs: Sequence[RunFiles], name: str) -> Drawing:
    """One strip per run: attention upwards, MLP downwards."""
    rows = [
        (run.label, number, size.query_heads, full.query_heads, size.channels, full.channels)
        for run in runs
        for number, (size, full) in enumerate(zip(run.structure, run.dense, strict=True))
    ]
    return drawing(
        lambda width: _strips(runs, width),
        name=name,
        title="The structures",
        caption="Bars upwards: the share of a layer's query heads that stays. Bars downwards: the share of its MLP "
        "channels. Gaps are removed blocks.",
        alt="Kept share of query heads and MLP channels per decoder layer of "
        + ", ".join(f"{run.label} ({run.report.ratio:.1%} removed)" for run in runs)
        + ".",
        columns=("run", "layer", "query_heads", "dense_query_heads", "channels", "dense_channels"),
        rows=rows,
    )


def _strips(runs: Sequence[RunFiles], width: float) -> Figure:
    most = max(len(run.dense) for run in runs)
    figure, panels = canvas(width, 0.5 + 1.15 * len(runs), len(runs), sharex=True)
    for axes, run in zip(panels, runs, strict=True):
        layers = range(len(run.dense))
        pairs = list(zip(run.structure, run.dense, strict=True))
        heads = [size.query_heads / full.query_heads if full.query_heads else 0 for size, full in pairs]
        channels = [size.channels / full.channels if full.channels else 0 for size, full in pairs]
        axes.bar(layers, [1] * len(heads), color=EMPTY, width=0.84)
        axes.bar(layers, [-1] * len(heads), color=EMPTY, width=0.84)
        axes.bar(layers, heads, color=KIND["attention"], width=0.84)
        axes.bar(layers, [-share for share in channels], color=KIND["mlp"], width=0.84)
        axes.set_ylim(-1.05, 1.05)
        axes.set_yticks([-1, 0, 1], ["MLP", "", "heads"])
        axes.get_yticklabels()[0].set_color(KIND["mlp"])
        axes.get_yticklabels()[2].set_color(KIND["attention"])
        axes.spines[:].set_visible(False)
        axes.set_xlim(-0.6, most - 0.4)
        axes.tick_params(axis="both", length=0)
        label = printable(run.label, 26 if width <= NARROW else 60)
        axes.set_title(f"{label}: {run.report.ratio:.1%} removed")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, steps=[1, 2, 5, 10]))
    panels[-1].set_xlabel("decoder layer")
    return figure
