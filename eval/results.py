"""What evaluating one model yields: plain values, no torch. They know how to become JSON and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from multipruner.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity on one text, cut into sequences of one length.

    Attributes:
        sequence_nll: mean negative log-likelihood per predicted token of each sequence, in nats.
        length: tokens per sequence; all but the first are predicted.
    """

    sequence_nll: tuple[float, ...]
    length: int

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood per predicted token, in nats."""
        return math.fsum(self.sequence_nll) / self.sequences

    @property
    def value(self) -> float:
        """The perplexity: ``exp(nll)``, infinity where that does not fit a float."""
        return math.exp(self.nll) if self.nll < 709 else math.inf

    @property
    def stderr(self) -> float | None:
        """Standard error of ``nll`` over sequences, in nats; ``None`` for a single sequence."""
        return standard_error(self.sequence_nll)

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return self.sequences * (self.length - 1)

    @property
    def sequences(self) -> int:
        return len(self.sequence_nll)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict; derived numbers are there for readers and ignored by :meth:`from_json`."""
        derived = {"value": self.value, "nll": self.nll, "stderr": self.stderr, "tokens": self.tokens}
        return {**derived, "length": self.length, "sequence_nll": list(self.sequence_nll)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Perplexity:
        """Return the inverse of :meth:`to_json`."""
        return cls(tuple(record["sequence_nll"]), record["length"])


@dataclass(frozen=True, slots=True)
class MetricResult:
    """One metric of one task.

    Attributes:
        value: what lm-eval reports.
        stderr: its standard error, ``None`` where lm-eval has none.
        examples: the metric of each document, by document id (``subtask/id`` in a group); empty unless ``value`` is
            their plain mean, because only then can two models be compared example by example.
        floor: what an answer that never changes scores on these examples; ``None`` where nobody can say.
    """

    value: float
    stderr: float | None
    examples: Mapping[str, float]
    floor: float | None = None

    @classmethod
    def of(cls, examples: Mapping[str, float]) -> MetricResult:
        """Return the mean of some examples (at least one), with its standard error."""
        values = tuple(examples.values())
        return cls(math.fsum(values) / len(values), standard_error(values), dict(examples))

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        known = {} if self.floor is None else {"floor": self.floor}
        return {"value": self.value, "stderr": self.stderr, "examples": dict(self.examples), **known}


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One lm-eval task or group: its metrics by name, task version (``None`` in groups) and few-shot examples."""

    metrics: Mapping[str, MetricResult]
    version: str | None = None
    shots: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict."""
        metrics = {name: metric.to_json() for name, metric in self.metrics.items()}
        return {"version": self.version, "shots": self.shots, "metrics": metrics}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TaskResult:
        """Return the inverse of :meth:`to_json`."""
        metrics = {name: MetricResult(**metric) for name, metric in record["metrics"].items()}
        return cls(metrics, record["version"], record["shots"])


TaskResults = Mapping[str, TaskResult]
"""Results by the name of the task or group."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What one model scored: perplexities by the name of the text, results by the name of the task.

    Attributes:
        measures: those of a suite, by name; empty without one.
    """

    perplexities: Mapping[str, Perplexity]
    tasks: TaskResults
    measures: TaskResults = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return a plain dict, every example included."""
        return {
            "perplexities": {name: result.to_json() for name, result in self.perplexities.items()},
            "tasks": {name: result.to_json() for name, result in self.tasks.items()},
            "measures": {name: result.to_json() for name, result in self.measures.items()},
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Evaluation:
        """Return the inverse of :meth:`to_json`.

        Raises:
            ConfigError: when the record is no evaluation.
        """
        try:
            return cls(
                {name: Perplexity.from_json(row) for name, row in record["perplexities"].items()},
                {name: TaskResult.from_json(row) for name, row in record["tasks"].items()},
                {name: TaskResult.from_json(row) for name, row in record.get("measures", {}).items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"not an evaluation: {error!r}; give what Evaluation.to_json() wrote") from error


def standard_error(values: tuple[float, ...]) -> float | None:
    """Return standard error of the mean, ``sd / sqrt(n)`` with n-1 degrees of freedom; ``None`` for fewer than two
    values.
    """
    count = len(values)
    if count < 2:
        return None
    mean = math.fsum(values) / count
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
