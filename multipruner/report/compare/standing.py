"""Which of several runs no other beats: loss against what is saved, among runs whose losses may be compared.

A perplexity counts per token, so that those of two tokenizers say nothing about each other. Runs are ranked together
where they share the text, the dense model and the tokenizer, or where they have bits per byte of the same text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multipruner.eval.contrast import Contrast, Retention, retention
from multipruner.report.figures.comparison import phases
from multipruner.report.figures.runs import vocabulary_of
from multipruner.report.inputs import RunFiles, Scores
from multipruner.report.words import label_of

BITS = "bits per byte"
_COUNTED = ("parameters", "weight_bytes")
_TUNED, _PRUNED = "tuned", "pruned"
Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One run and its loss.

    Attributes:
        run: its files.
        found: dense and pruned model's perplexity, or their bits per byte.
        loss: what is ranked; less is better.
        retention: of the tasks that the ranked runs share; ``None`` without one.
    """

    run: RunFiles
    found: Contrast
    loss: float
    retention: Retention | None = None

    @property
    def kind(self) -> str:
        """Whether the model was trained after the cut."""
        return kind_of(self.run)


@dataclass(frozen=True, slots=True)
class Point:
    """A run in a panel; ``beaten_by`` is the run of its kind that is no worse in both and better in one."""

    entry: Entry
    saved: float
    value: float
    beaten_by: str | None


@dataclass(frozen=True, slots=True)
class Panel:
    """One quality against one saving; more of a saving is better.

    Attributes:
        saving: in words.
        shares: whether it is a share of the dense model's, not a factor.
        tasks: whether the quality is the accuracy kept (more is better), not the loss (less is better).
        points: the runs that have both.
    """

    saving: str
    shares: bool
    tasks: bool
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Runs whose losses may be compared, at least two.

    Attributes:
        measure: what the loss is, such as ``perplexity, WikiText-2``.
        relative: whether it is divided by the dense model's.
        tasks: that all runs with task scores share.
        entries: by rising loss.
        panels: each with at least two runs.
    """

    measure: str
    relative: bool
    tasks: tuple[str, ...]
    entries: tuple[Entry, ...]
    panels: tuple[Panel, ...]


def kind_of(run: RunFiles) -> str:
    """Return ``"tuned"`` for a model that was trained after the cut, else ``"pruned"``."""
    return _TUNED if run.report.tuned else _PRUNED


def rankings(runs: Sequence[RunFiles]) -> tuple[list[Ranking], list[RunFiles]]:
    """Return the runs in groups that may be compared, largest first, and those that can be compared with no other.

    Every run is in one group: that of the measure which most runs share, a perplexity before bits per byte.
    """
    left, found = {run.label: run for run in runs}, []
    losses = {run.label: dict(_losses(run)) for run in runs}
    while left:
        groups: dict[Key, list[Entry]] = {}
        for run in left.values():
            for key, entry in losses[run.label].items():
                groups.setdefault(key, []).append(entry)
        groups = {key: _of_one_text(entries) for key, entries in groups.items()}
        key = max(groups, key=lambda key: (len(groups[key]), key[0] != BITS), default=None)
        if key is None or len(groups[key]) < 2:
            break
        found.append(_ranking(key, groups[key]))
        for entry in groups[key]:
            del left[entry.run.label]
    return found, list(left.values())


def _losses(run: RunFiles) -> Iterator[tuple[Key, Entry]]:
    """Return every loss of a run by what makes it comparable; a later evaluation counts."""
    model = run.report.model.fingerprint or run.report.model.name
    tokenizer = vocabulary_of(run.folder)
    for scores in run.report.scores:
        for text, found in scores.perplexity.items():
            if _usable(found):
                key = (f"perplexity, {text}", model, tokenizer, f"{found.dense:.6g}")
                yield key, Entry(run, found, found.pruned / found.dense)
        found = scores.measures.get("text", {}).get(BITS)
        if found is not None and _usable(found):
            yield (BITS, scores.suite, *_prose(scores, model)), Entry(run, found, found.pruned)


def _usable(found: Contrast) -> bool:
    return all(math.isfinite(value) and value > 0 for value in (found.dense, found.pruned))


def _prose(scores: Scores, model: str) -> Key:
    """Return what names the text of a suite; one that was held out is another for every dense model."""
    text = scores.settings.get("text")
    names = tuple(sorted(scores.perplexity))
    own = text is None and (not names or any(name.startswith("held-out") for name in names))
    return (str(text), names, model if own else None)


def _of_one_text(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries without those where the same dense model has another loss: theirs is another text."""
    dense: dict[str, str] = {}
    models = [entry.run.report.model.fingerprint or entry.run.report.model.name for entry in entries]
    said = [f"{entry.found.dense:.6g}" for entry in entries]
    return [
        entry
        for entry, model, value in zip(entries, models, said, strict=True)
        if dense.setdefault(model, value) == value
    ]


def _ranking(key: Key, entries: Sequence[Entry]) -> Ranking:
    shared = _shared_tasks([entry.run for entry in entries])
    entries = [_with_retention(entry, shared) for entry in sorted(entries, key=lambda entry: entry.loss)]
    savings = dict(_savings(entries))
    panels = [_panel(name, values, entries, tasks=False) for name, values in savings.items()]
    if shared:
        panels.append(_panel(label_of(_COUNTED[0]), savings[label_of(_COUNTED[0])], entries, tasks=True))
    return Ranking(
        key[0], key[0] != BITS, shared, tuple(entries), tuple(panel for panel in panels if len(panel.points) > 1)
    )


def _savings(entries: Sequence[Entry]) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Return what is saved, by run: shares of the largest dense model's, and how much faster than the dense one.

    Speed-ups of different dense models are not comparable, and are left out.
    """
    for cost in _COUNTED:
        amounts = {
            entry.run.label: pair
            for entry in entries
            if (pair := {"parameters": entry.run.report.parameters, **entry.run.report.costs}.get(cost)) is not None
        }
        most = max((pair.before for pair in amounts.values()), default=0)
        if most > 0:
            yield label_of(cost), {label: 1 - pair.after / most for label, pair in amounts.items()}
    if len({entry.run.report.model.fingerprint or entry.run.report.model.name for entry in entries}) > 1:
        return
    faster: dict[str, dict[str, float]] = {}
    for entry in entries:
        for phase in phases(entry.run.report.latency):
            if phase.dense and phase.measured:
                faster.setdefault(phase.name, {})[entry.run.label] = phase.dense / phase.measured
    for name, values in faster.items():
        yield f"speed-up, {name}", values


def _panel(saving: str, saved: Mapping[str, float], entries: Sequence[Entry], *, tasks: bool) -> Panel:
    both = [
        (entry, saved[entry.run.label], value)
        for entry in entries
        if entry.run.label in saved and (value := _quality(entry, tasks=tasks)) is not None
    ]
    points = tuple(Point(entry, x, y, _beaten_by(entry, x, y, both, tasks=tasks)) for entry, x, y in both)
    return Panel(saving, not saving.startswith("speed-up"), tasks, points)


def _quality(entry: Entry, *, tasks: bool) -> float | None:
    if tasks:
        return entry.retention.mean if entry.retention else None
    return entry.loss


def _beaten_by(
    entry: Entry, saved: float, value: float, points: Sequence[tuple[Entry, float, float]], *, tasks: bool
) -> str | None:
    """Return the best run of the same kind that is no worse in both and better in one; ``None`` for none."""
    sign = -1.0 if tasks else 1.0
    better = [
        (sign * y, -x, other.run.label)
        for other, x, y in points
        if other.kind == entry.kind
        and x >= saved
        and sign * y <= sign * value
        and (x > saved or sign * y < sign * value)
    ]
    return min(better)[2] if better else None


def _tasks(run: RunFiles) -> dict[str, Mapping[str, Contrast]]:
    return {task: metrics for scores in run.report.scores for task, metrics in scores.tasks.items()}


def _shared_tasks(runs: Sequence[RunFiles]) -> tuple[str, ...]:
    """Return the tasks that all runs with task scores have, on as many examples."""
    found = [rows for run in runs if (rows := _tasks(run))]
    if len(found) < 2:
        return ()

    def size(rows: Mapping[str, Contrast]) -> list[tuple[str, int]]:
        return sorted((name, one.examples) for name, one in rows.items())

    first, *others = found
    return tuple(
        task for task in first if all(task in rows and size(rows[task]) == size(first[task]) for rows in others)
    )


def _with_retention(entry: Entry, tasks: Sequence[str]) -> Entry:
    rows = _tasks(entry.run)
    return Entry(entry.run, entry.found, entry.loss, retention({task: rows[task] for task in tasks if task in rows}))
