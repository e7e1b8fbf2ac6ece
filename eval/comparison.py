"""Dense against pruned on the same examples: differences with their standard errors. Plain arithmetic, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from multipruner.core.errors import ConfigError
from multipruner.eval.contrast import Contrast, Retention, average_of, headlines, record_of, records, retention
from multipruner.eval.results import Evaluation, MetricResult, Perplexity, TaskResult, standard_error

if TYPE_CHECKING:
    from rich.table import Table

_HEADINGS = ("", "examples", "dense", "pruned", "difference")
_SUITE_HEADINGS = ("", "n", "dense", "pruned", "difference", "95 % interval")
_SHORT = {"examples": "n"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A dense and a pruned model side by side.

    Attributes:
        perplexity: by name of the text; ``examples`` are sequences.
        tasks: by task, then metric.
        average: over tasks of ``acc_norm`` where a task has it, else ``acc``; ``None`` when no task has either.
            Tasks weigh the same whatever their size; ``examples`` is the sum.
        measures: of a suite, by measure, then metric; empty without one.
        suite: its name; empty without one.
        who: what the second model is: ``"pruned"``, or ``"tuned"`` where it was trained after the cut. Tables say so.
    """

    perplexity: Mapping[str, Contrast]
    tasks: Mapping[str, Mapping[str, Contrast]]
    average: Contrast | None
    measures: Mapping[str, Mapping[str, Contrast]] = field(default_factory=dict)
    suite: str = ""
    who: str = "pruned"

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the columns of its table."""
        usual = _SUITE_HEADINGS if self.suite else _HEADINGS
        return tuple(self.who if heading == "pruned" else heading for heading in usual)

    @property
    def retention(self) -> Retention | None:
        """How much of the dense model's accuracy is left; ``None`` without a task that it answers at all."""
        return retention(self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, without the single examples, for ``report.json``."""
        record: dict[str, Any] = {
            "perplexity": {name: record_of(contrast) for name, contrast in self.perplexity.items()},
            "tasks": records(self.tasks),
            "average": record_of(self.average) if self.average else None,
        }
        if self.suite:
            retention = self.retention
            record |= {"suite": self.suite, "measures": records(self.measures)}
            record["retention"] = asdict(retention) if retention else None
        return record if self.who == "pruned" else {**record, "who": self.who}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Comparison:
        """Return the inverse of :meth:`to_json`; other keys, as a report has them, are left alone.

        Raises:
            ConfigError: when the record is no comparison.
        """
        try:
            perplexity = {name: Contrast(**row) for name, row in record["perplexity"].items()}
            tasks, measures = (
                {name: {metric: Contrast(**row) for metric, row in rows.items()} for name, rows in found.items()}
                for found in (record["tasks"], record.get("measures") or {})
            )
            average = Contrast(**record["average"]) if record["average"] else None
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not a comparison: {error!r}; give what Comparison.to_json() wrote") from error
        return cls(
            perplexity, tasks, average, measures, str(record.get("suite") or ""), str(record.get("who") or "pruned")
        )

    def table(self, title: str | None = None) -> Table:
        """Show both models side by side, narrow enough for a terminal of 80 columns.

        ± is one standard error; a suite's table has 95 % intervals instead.
        """
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        headings = self.headings
        table.add_column(headings[0], overflow="fold")  # where it is too narrow, names break and numbers do not
        for heading in headings[1:]:
            table.add_column(_SHORT.get(heading, heading), justify="right", no_wrap=True)
        for rows in self.parts(2, 3):
            for row in rows:
                table.add_row(*(escape(cell.replace("± ", "±")) for cell in row))
            if self.suite:
                table.add_section()
        return table

    def parts(self, perplexity_digits: int, digits: int) -> list[list[tuple[str, ...]]]:
        """Return the rows of the table, in groups: perplexities, measures (with a suite), tasks.

        Args:
            perplexity_digits: behind the point.
            digits: of everything else.
        """
        if not self.suite:
            return [self._perplexity_rows(perplexity_digits), self._task_rows(digits)]
        found = [[_wide(f"perplexity, {name}", one, perplexity_digits) for name, one in self.perplexity.items()]]
        found += [[_wide(name, one, digits) for name, one in metrics.items()] for metrics in self.measures.values()]
        tasks = [
            _wide(f"{task} {name}", one, digits) for task, rows in self.tasks.items() for name, one in rows.items()
        ]
        if self.average and len(headlines(self.tasks)) > 1:
            tasks.append(_wide("average", self.average, digits))
        return [part for part in (*found, tasks, _retained(self.retention)) if part]

    def markdown(self, *, perplexity: bool = False) -> str:
        """Return the tasks as a markdown table (and the perplexities above them, if asked); empty when there is
        none.
        """
        parts = self.parts(3, 4)
        rows = [row for part in (parts if perplexity or self.suite else parts[1:]) for row in part]
        if not rows:
            return ""
        headings = self.headings
        lines = [headings, ("---", *("---:",) * (len(headings) - 1)), *rows]
        return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)

    def _perplexity_rows(self, digits: int) -> list[tuple[str, ...]]:
        return [_row(f"perplexity, {name}", contrast, digits) for name, contrast in self.perplexity.items()]

    def _task_rows(self, digits: int) -> list[tuple[str, ...]]:
        rows = [
            _row(f"{task} {metric}", contrast, digits)
            for task, metrics in self.tasks.items()
            for metric, contrast in metrics.items()
        ]
        averaged = len(headlines(self.tasks))
        if self.average and averaged > 1:
            rows.append(_row(f"average of {averaged} tasks", self.average, digits))
        return rows


def _cell(text: str) -> str:
    """Return a name in a Markdown table: on one line, without columns or markup of its own."""
    return re.sub(r"([\\`|])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def compare(dense: Evaluation, pruned: Evaluation, suite: str = "", who: str = "pruned") -> Comparison:
    """Set two evaluations side by side; what only one of them has is left out.

    Args:
        suite: the name of the suite that they are of; the table then shows its measures, and intervals.
        who: what the second model is.
    """
    perplexity = {
        name: _perplexities(result, pruned.perplexities[name])
        for name, result in dense.perplexities.items()
        if name in pruned.perplexities
    }
    tasks, measures = (
        {name: _metrics(result, after[name]) for name, result in before.items() if name in after}
        for before, after in ((dense.tasks, pruned.tasks), (dense.measures, pruned.measures))
    )
    return Comparison(perplexity, tasks, average_of(headlines(tasks)), measures, suite, who)


def _metrics(dense: TaskResult, pruned: TaskResult) -> dict[str, Contrast]:
    return {
        name: _paired(metric, pruned.metrics[name]) for name, metric in dense.metrics.items() if name in pruned.metrics
    }


def _paired(dense: MetricResult, pruned: MetricResult) -> Contrast:
    common = [key for key in dense.examples if key in pruned.examples]
    differences = tuple(pruned.examples[key] - dense.examples[key] for key in common)
    difference = math.fsum(differences) / len(common) if common else pruned.value - dense.value
    sides = (dense.value, dense.stderr, pruned.value, pruned.stderr)
    return Contrast(*sides, difference, standard_error(differences), len(common), dense.floor)


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


def _wide(label: str, contrast: Contrast, digits: int) -> tuple[str, ...]:
    """Return a row of a suite's table."""
    floor = "" if contrast.floor is None else f" (constant answer {contrast.floor:.{digits}f})"
    interval = contrast.interval
    return (
        f"{label}{floor}",
        f"{contrast.examples:,}" if contrast.examples else "–",
        f"{contrast.dense:.{digits}f}",
        f"{contrast.pruned:.{digits}f}",
        f"{contrast.difference:+.{digits}f}",
        "–" if interval is None else " to ".join(f"{end:+.{digits}f}" for end in interval),
    )


def _retained(found: Retention | None) -> list[tuple[str, ...]]:
    """Return the rows that say how much of the accuracy is left; blank where a table has other columns."""
    if found is None:
        return []
    rows = [
        (f"accuracy kept, mean of {found.tasks}", f"{found.mean:.1%}"),
        ("accuracy kept, spread", f"{found.spread:.1%}"),
        (f"accuracy kept, worst ({found.worst_task})", f"{found.worst:.1%}"),
    ]
    if found.above_floor is not None:
        rows.append(("kept above a constant answer", f"{found.above_floor:.1%}"))
    return [(label, "", "", share, "", "") for label, share in rows]
