"""One number of two models, and what follows from many of them: averages, and how much accuracy is kept."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

_QUANTILE = 0.975
_HEADLINE = ("acc_norm", "acc", "exact_match (flexible-extract)", "exact_match", "prompt_level_strict_acc")
"""The metric that stands for a task in the average, best first."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """One number of two models, and how far apart they are.

    ``difference`` is pruned minus dense over the examples that both models answered. Its standard error is that of
    the mean of the per-example differences, sd/sqrt(n): most of the noise is the examples' and cancels, so it is
    smaller than the two models' standard errors suggest. ``None`` where there are fewer than two common examples.
    ``floor`` is what a constant answer scores on the same examples, where that is known.
    """

    dense: float
    dense_stderr: float | None
    pruned: float
    pruned_stderr: float | None
    difference: float
    difference_stderr: float | None
    examples: int
    floor: float | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the difference (Student's t); ``None`` where its standard error is not known."""
        if self.difference_stderr is None or self.examples < 2:
            return None
        from scipy.special import stdtrit

        half = float(stdtrit(self.examples - 1, _QUANTILE)) * self.difference_stderr
        return self.difference - half, self.difference + half


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of the dense model's accuracy a pruned one has, over tasks that weigh the same.

    Attributes:
        tasks: how many.
        mean, spread: of pruned over dense accuracy, and its standard deviation over tasks (0 for a single one).
        worst, worst_task: the lowest of them, and whose it is.
        above_floor: the same mean of what lies above a constant answer's accuracy, over the tasks where the dense
            model is above it by two standard errors; ``None`` where it is on none.
    """

    tasks: int
    mean: float
    spread: float
    worst: float
    worst_task: str
    above_floor: float | None


def headlines(tasks: Mapping[str, Mapping[str, Contrast]]) -> list[Contrast]:
    """Return the metric that stands for each task, of the tasks that have one."""
    return [found for metrics in tasks.values() if (found := _standing(metrics)) is not None]


def _standing(metrics: Mapping[str, Contrast]) -> Contrast | None:
    """Return the metric that stands for a task in the average; ``None`` where it has none."""
    return next((metrics[name] for name in _HEADLINE if name in metrics), None)


def average_of(contrasts: list[Contrast]) -> Contrast | None:
    """Return the mean of the numbers of several tasks, all of which weigh the same; ``None`` for none."""
    if not contrasts:
        return None
    count = len(contrasts)

    def spread(stderrs: list[float | None]) -> float | None:
        known = [stderr for stderr in stderrs if stderr is not None]
        return math.hypot(*known) / count if len(known) == count else None  # tasks are independent of each other

    return Contrast(
        math.fsum(c.dense for c in contrasts) / count,
        spread([c.dense_stderr for c in contrasts]),
        math.fsum(c.pruned for c in contrasts) / count,
        spread([c.pruned_stderr for c in contrasts]),
        math.fsum(c.difference for c in contrasts) / count,
        spread([c.difference_stderr for c in contrasts]),
        sum(c.examples for c in contrasts),
    )


def retention(tasks: Mapping[str, Mapping[str, Contrast]]) -> Retention | None:
    """Return how much of the dense accuracy is left; ``None`` without a task that the dense model answers at all."""
    named = {name: found for name, rows in tasks.items() if (found := _standing(rows)) is not None and found.dense > 0}
    if not named:
        return None
    shares = {name: one.pruned / one.dense for name, one in named.items()}
    worst = min(shares, key=shares.__getitem__)
    above = [
        (one.pruned - one.floor) / (one.dense - one.floor)
        for one in named.values()
        if one.floor is not None and one.dense - one.floor > 2 * (one.dense_stderr or 0.0)
    ]
    spread = statistics.stdev(shares.values()) if len(shares) > 1 else 0.0
    mean = statistics.fmean(shares.values())
    return Retention(len(shares), mean, spread, shares[worst], worst, statistics.fmean(above) if above else None)


def record_of(contrast: Contrast) -> dict[str, Any]:
    """Return a contrast as JSON, without a floor that is not known."""
    return {name: value for name, value in asdict(contrast).items() if name != "floor" or value is not None}


def records(found: Mapping[str, Mapping[str, Contrast]]) -> dict[str, Any]:
    """Return contrasts in two levels as JSON."""
    return {name: {metric: record_of(one) for metric, one in rows.items()} for name, rows in found.items()}
