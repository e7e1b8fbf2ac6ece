"""How a structure was found: the greedy path step by step, or the rounds of an integer program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from multipruner.core.axes import BLOCK_KINDS
from multipruner.core.structure import Anatomy, Size, total
from multipruner.report.inputs import RunFiles
from multipruner.search import Step

from .drawing import BLUE, EMPTY, GRID, MUTED, NARROW, STAGE, STAGE_NAMES, VERMILLION, Drawing, canvas, drawing, percent

_MARKERS = {"blocks": "o", "mlp": "s", "heads": "^"}


def parts_of(anatomy: Anatomy) -> list[str]:
    """Return what steps can remove of a model: blocks of every kind, and the units that each kind is counted by."""
    kinds = [BLOCK_KINDS[kind] for kind in anatomy.kinds]
    return [*(f"{kind.label} block" for kind in kinds), *(kind.finest.label for kind in kinds)]


@dataclass(frozen=True, slots=True)
class Removal:
    """One step of a path, with what it did.

    Attributes:
        number: from 1.
        step: as the run wrote it.
        part: one of :func:`parts_of`.
        before: the block's size until then.
        increase: loss minus that of the step before, in nats; ``None`` where the two were measured on different text
            or there is none before.
    """

    number: int
    step: Step
    part: str
    before: Size
    increase: float | None

    @property
    def words(self) -> str:
        """What was removed, in words."""
        kind = self.step.kind
        if not self.step.size:
            return self.part
        changed = []
        for axis in reversed(BLOCK_KINDS[kind].along(self.before)):
            old, new = (total(kind, size, axis.name) for size in (self.before, self.step.size))
            if old != new:
                changed.append(f"{old - new:,} of {old:,} {axis.label}")
        first, *rest = changed or [self.part]
        return f"{first} ({', '.join(rest)})" if rest else first


def removals(run: RunFiles) -> list[Removal]:
    """Return the steps of a run with what each removed and what it cost."""
    anatomy, sizes = run.anatomy, list(run.anatomy.dense)
    parts, result = parts_of(anatomy), list[Removal]()
    for number, step in enumerate(run.steps, start=1):
        place = anatomy.at(step.layer, step.kind)
        before, sizes[place] = sizes[place], step.size
        part = parts[anatomy.kinds.index(step.kind) + (len(anatomy.kinds) if step.size else 0)]
        last = result[-1].step if result else None
        increase = step.loss - last.loss if last and _same_text(run, last, step) else None
        result.append(Removal(number, step, part, before, increase))
    return result


def _same_text(run: RunFiles, first: Step, second: Step) -> bool:
    """Tell whether two losses are comparable: blocks are judged on all calibration sequences, widths on the first
    few.
    """
    if (first.stage == "blocks") == (second.stage == "blocks"):
        return True
    spec = run.report.recipe.get("calibration")
    few, all_of_them = (spec.get("width_sequences"), spec.get("sequences")) if isinstance(spec, dict) else (None, None)
    return isinstance(few, int) and isinstance(all_of_them, int) and few >= all_of_them


def trajectory_figure(run: RunFiles, name: str) -> Drawing:
    """Return loss and ratio after every step, the stages coloured."""
    path = removals(run)
    rows = [
        (r.number, r.step.stage, r.step.kind, r.step.layer, r.part, _size(r.before), _size(r.step.size), r.step.loss,
         r.increase, r.step.ratio, r.step.backbone_ratio, r.step.candidates, r.step.seconds)
        for r in path
    ]  # fmt: skip
    broken = any(not _same_text(run, a.step, b.step) for a, b in pairwise(path))
    caption = "Above, the calibration loss after each removal; below, the share of all parameters removed so far."
    if broken:
        caption += " The line is interrupted where the loss is measured on fewer sequences from then on: compare "
        caption += "losses within a piece, not across."
    first, last = path[0].step, path[-1].step
    return drawing(
        lambda width: _trajectory(run, path, width),
        name=name,
        title="Loss and ratio along the path",
        caption=caption,
        alt=f"In {len(path)} steps the calibration loss goes from {first.loss:.3f} to {last.loss:.3f} nats per token "
        f"and the removed share of the parameters to {last.ratio:.1%}.",
        columns=("step", "stage", "kind", "layer", "part", "before", "after", "loss_nats", "increase_nats", "ratio",
                 "backbone_ratio", "candidates", "seconds"),
        rows=rows,
    )  # fmt: skip


def _size(size: Size) -> str:
    """Return counts along the axes of a block, such as ``2 x 3``; ``0`` where it is gone."""
    return " x ".join(map(str, size)) or "0"


def _trajectory(run: RunFiles, path: Sequence[Removal], width: float) -> Figure:
    figure, (upper, lower) = canvas(width, 4.4, 2, sharex=True, height_ratios=[3, 2])
    stages = [(stage, list(group)) for stage, group in groupby(path, key=lambda removal: removal.step.stage)]
    for index, (stage, group) in enumerate(stages):
        joined = list(group)
        if index and _same_text(run, stages[index - 1][1][-1].step, group[0].step):
            joined.insert(0, stages[index - 1][1][-1])
        style = {"color": STAGE[stage], "markersize": 3.2, "linewidth": 1.4}
        for axes, value in ((upper, "loss"), (lower, "ratio")):
            line = joined if axes is upper or not index else [stages[index - 1][1][-1], *group]
            axes.plot([r.number for r in line], [getattr(r.step, value) for r in line], **style)
            numbers, values = [r.number for r in group], [getattr(r.step, value) for r in group]
            label = f"{STAGE_NAMES[stage]} ({len(group)} steps)" if axes is upper else None
            axes.plot(numbers, values, _MARKERS[stage], label=label, **style)
        if index:
            for axes in (upper, lower):
                axes.axvline(group[0].number - 0.5, color=GRID, linewidth=0.9, zorder=0)
    upper.set_ylabel("loss (nats per token)")
    figure.legend(loc="outside upper left", ncols=3 if width > NARROW else 1)
    lower.set_ylabel("removed")
    lower.yaxis.set_major_formatter(FuncFormatter(percent))
    lower.set_ylim(bottom=0)
    lower.set_xlabel("step")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(axis="y")
    return figure


def order_figure(run: RunFiles, name: str) -> Drawing:
    """Draw when each part of a layer went, and what that cost."""
    path, layers, parts = removals(run), run.anatomy.layers, parts_of(run.anatomy)
    order, cost, count = (np.full((len(parts), layers), np.nan) for _ in range(3))
    for removal in path:
        place = parts.index(removal.part), removal.step.layer
        if np.isnan(order[place]):
            order[place], count[place] = removal.number, 0
        count[place] += 1
        if removal.increase is not None:
            cost[place] = np.nan_to_num(cost[place]) + removal.increase
    rows = [
        (part, layer, int(order[row, layer]), int(count[row, layer]), _known(cost[row, layer]))
        for row, part in enumerate(parts)
        for layer in range(layers)
        if not np.isnan(order[row, layer])
    ]
    used = [row for row in range(len(parts)) if not np.isnan(order[row]).all()]
    early = sorted(rows, key=lambda row: row[2])[:3]
    return drawing(
        lambda width: _maps(order[used], cost[used], [parts[row] for row in used], width),
        name=name,
        title="What went when, and what it cost",
        caption="Above, the step at which a layer first lost something of a kind: what goes early matters least to "
        "the calibration text. Below, by how much the loss rose over all steps on that part; steps whose loss "
        "cannot be compared with the one before are left out. Grey: untouched.",
        alt="The first to go: " + ", ".join(f"{part} of layer {layer}" for part, layer, *_ in early) + ".",
        columns=("part", "layer", "first_step", "steps", "increase_nats"),
        rows=rows,
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _maps(order: np.ndarray, cost: np.ndarray, rows: Sequence[str], width: float) -> Figure:
    panel = 0.55 + 0.3 * len(rows)
    known = bool(np.isfinite(cost).any())
    figure, panels = canvas(width, 0.5 + panel * (1 + known), 1 + known, sharex=True)
    titles = [("first removed at step", order, "plasma"), ("rise of the loss (nats)", cost, "viridis_r")]
    for axes, (title, values, colours) in zip(panels, titles, strict=False):
        _map(figure, axes, values, rows, colours, width)
        axes.set_title(title)
    panels[-1].set_xlabel("decoder layer")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12, steps=[1, 2, 5, 10]))
    return figure


def _map(figure: Figure, axes: Axes, values: np.ndarray, rows: Sequence[str], colours: str, width: float) -> None:
    count, layers = values.shape
    axes.set_facecolor(EMPTY)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    mesh = axes.pcolormesh(
        np.arange(layers + 1) - 0.5,
        np.arange(count + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=ListedColormap(colormaps[colours](np.linspace(0.12, 0.9, 256))),  # the ends drown in a dark or pale page
        norm=Normalize(low, high if high > low else low + 1),
    )
    axes.set_yticks(range(count), rows, fontsize=7.5 if width <= NARROW else 9)
    axes.invert_yaxis()
    axes.tick_params(axis="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for layer in range(1, layers):
        axes.axvline(layer - 0.5, color="#fffffe", linewidth=0.6)
    for row in range(1, count):
        axes.axhline(row - 0.5, color="#fffffe", linewidth=2)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=8, ticks=MaxNLocator(nbins=3))
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(length=0, labelsize=7.5)


def rounds_figure(run: RunFiles, name: str) -> Drawing:
    """Return what an integer program promised in each round, and what was measured."""
    rounds = run.report.search.rounds
    best = min(rounds, key=lambda each: each.loss)
    return drawing(
        lambda width: _rounds(run, width),
        name=name,
        title="Promised and measured loss of every round",
        caption="The program adds up the losses of single changes; the measured loss is that of all of them "
        "together. Each round measures again around the last solution.",
        alt=f"{len(rounds)} rounds; the best measured loss is {best.loss:.3f} nats in round {best.round}, where "
        f"{best.predicted:.3f} was predicted.",
        columns=("round", "predicted_nats", "loss_nats", "error_nats", "seconds"),
        rows=[(each.round, each.predicted, each.loss, each.predicted - each.loss, each.seconds) for each in rounds],
    )


def _rounds(run: RunFiles, width: float) -> Figure:
    figure, (axes,) = canvas(width, 2.7)
    rounds = run.report.search.rounds
    numbers = [each.round for each in rounds]
    axes.vlines(numbers, [r.predicted for r in rounds], [r.loss for r in rounds], color=MUTED, linewidth=0.8)
    axes.plot(numbers, [r.predicted for r in rounds], "s--", color=VERMILLION, markersize=4.5, label="predicted")
    axes.plot(numbers, [r.loss for r in rounds], "o-", color=BLUE, markersize=4.5, label="measured")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y")
    axes.legend()
    return figure
