"""Dense against pruned on the same examples: differences with their standard errors. Plain arithmetic, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from multipruner.core.errors import ConfigError
from multipruner.eval.results import Evaluation, MetricResult, Perplexity, TaskResult, standard_error

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = ("", "examples", "dense", "pruned", "difference")
_SHORT = {"examples": "n"}
_HEADLINE = ("acc_norm", "acc")  # the metric that stands for a task in the average, best first


@dataclass(frozen=True, slots=True)
class Contrast:
    """One number of two models, and how far apart they are.

    ``difference`` is pruned minus dense over the examples that both models answered. Its standard error is that of
    the mean of the per-example differences, sd/sqrt(n): most of the noise is the examples' and cancels, so it is
    smaller than the two models' standard errors suggest. ``None`` where there are fewer than two common examples.
    """

    dense: float
    dense_stderr: float | None
    pruned: float
    pruned_stderr: float | None
    difference: float
    difference_stderr: float | None
    examples: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A dense and a pruned model side by side.

    Attributes:
        perplexity: by name of the text; ``examples`` are sequences.
        tasks: by task, then metric.
        average: over tasks of ``acc_norm`` where a task has it, else ``acc``; ``None`` when no task has either.
            Tasks weigh the same whatever their size; ``examples`` is the sum.
    """

    perplexity: Mapping[str, Contrast]
    tasks: Mapping[str, Mapping[str, Contrast]]
    average: Contrast | None

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, without the single examples, for ``report.json``."""
        return {
            "perplexity": {name: asdict(contrast) for name, contrast in self.perplexity.items()},
            "tasks": {
                task: {metric: asdict(contrast) for metric, contrast in metrics.items()}
                for task, metrics in self.tasks.items()
            },
            "average": asdict(self.average) if self.average else None,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Comparison:
        """Return the inverse of :meth:`to_json`; other keys, as a report has them, are left alone.

        Raises:
            ConfigError: when the record is no comparison.
        """
        try:
            perplexity = {name: Contrast(**row) for name, row in record["perplexity"].items()}
            tasks = {
                task: {name: Contrast(**row) for name, row in rows.items()} for task, rows in record["tasks"].items()
            }
            average = Contrast(**record["average"]) if record["average"] else None
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a comparison: {error!r}; give what Comparison.to_json() wrote") from error
        return cls(perplexity, tasks, average)

    def table(self, title: str | None = None) -> Table:
        """Show both models side by side, narrow enough for a terminal of 80 columns; ± is one standard error."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column(_HEADINGS[0], overflow="fold")  # where it is too narrow, names break and numbers do not
        for heading in _HEADINGS[1:]:
            table.add_column(_SHORT.get(heading, heading), justify="right", no_wrap=True)
        for row in (*self._perplexity_rows(2), *self._task_rows(3)):
            table.add_row(*(escape(cell.replace("± ", "±")) for cell in row))
        return table

    def markdown(self, *, perplexity: bool = False) -> str:
        """Return the tasks as a markdown table (and the perplexities above them, if asked); empty when there is
        none.
        """
        rows = [*(self._perplexity_rows(3) if perplexity else []), *self._task_rows(4)]
        if not rows:
            return ""
        lines = [_HEADINGS, ("---", *("---:",) * (len(_HEADINGS) - 1)), *rows]
        return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)

    def _perplexity_rows(self, digits: int) -> list[tuple[str, ...]]:
        return [_row(f"perplexity, {name}", contrast, digits) for name, contrast in self.perplexity.items()]

    def _task_rows(self, digits: int) -> list[tuple[str, ...]]:
        rows = [
            _row(f"{task} {metric}", contrast, digits)
            for task, metrics in self.tasks.items()
            for metric, contrast in metrics.items()
        ]
        averaged = len(_headlines(self.tasks))
        if self.average and averaged > 1:
            rows.append(_row(f"average of {averaged} tasks", self.average, digits))
        return rows


def _cell(text: str) -> str:
    """Return a name in a Markdown table: on one line, without columns or markup of its own."""
    return re.sub(r"([\\`|])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def compare(dense: Evaluation, pruned: Evaluation) -> Comparison:
    """Set two evaluations side by side; what only one of them has is left out."""
    perplexity = {
        name: _perplexities(result, pruned.perplexities[name])
        for name, result in dense.perplexities.items()
        if name in pruned.perplexities
    }
    tasks = {name: _metrics(result, pruned.tasks[name]) for name, result in dense.tasks.items() if name in pruned.tasks}
    return Comparison(perplexity, tasks, _average(_headlines(tasks)))


def _metrics(dense: TaskResult, pruned: TaskResult) -> dict[str, Contrast]:
    return {
        name: _paired(metric, pruned.metrics[name]) for name, metric in dense.metrics.items() if name in pruned.metrics
    }


def _paired(dense: MetricResult, pruned: MetricResult) -> Contrast:
    common = [key for key in dense.examples if key in pruned.examples]
    differences = tuple(pruned.examples[key] - dense.examples[key] for key in common)
    difference = math.fsum(differences) / len(common) if common else pruned.value - dense.value
    sides = (dense.value, dense.stderr, pruned.value, pruned.stderr)
    return Contrast(*sides, difference, standard_error(differences), len(common))


def _perplexities(dense: Perplexity, pruned: Perplexity) -> Contrast:
    """Return contrast of ``exp(nll)``, with standard errors to first order: d exp(nll) = exp(nll) d nll."""
    sides = (
        dense.value,
        _scaled(dense.stderr, dense.value),
        pruned.value,
        _scaled(pruned.stderr, pruned.value),
    )
    difference = pruned.value - dense.value
    if (dense.sequences, dense.length) != (pruned.sequences, pruned.length) or not math.isfinite(difference):
        return Contrast(*sides, difference, None, 0)
    pairs = zip(dense.sequence_nll, pruned.sequence_nll, strict=True)
    shifts = tuple(pruned.value * after - dense.value * before for before, after in pairs)
    return Contrast(*sides, difference, standard_error(shifts), dense.sequences)


def _scaled(stderr: float | None, factor: float) -> float | None:
    return None if stderr is None else stderr * factor


def _headlines(tasks: Mapping[str, Mapping[str, Contrast]]) -> list[Contrast]:
    """Return the metric that stands for each task, of the tasks that have one."""
    choices = [next((metrics[name] for name in _HEADLINE if name in metrics), None) for metrics in tasks.values()]
    return [choice for choice in choices if choice is not None]


def _average(contrasts: list[Contrast]) -> Contrast | None:
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


def _row(label: str, contrast: Contrast, digits: int) -> tuple[str, ...]:
    def number(value: float, stderr: float | None, sign: str = "") -> str:
        return f"{value:{sign}.{digits}f}" + ("" if stderr is None else f" ± {stderr:.{digits}f}")

    return (
        label,
        f"{contrast.examples:,}" if contrast.examples else "–",
        number(contrast.dense, contrast.dense_stderr),
        number(contrast.pruned, contrast.pruned_stderr),
        number(contrast.difference, contrast.difference_stderr, "+"),
    )
