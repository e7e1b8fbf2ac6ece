"""Measure one model by a suite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from multipruner.config.choices import loaded
from multipruner.eval.inference import inference
from multipruner.eval.kept import Kept
from multipruner.eval.results import TaskResult
from multipruner.eval.suite.subject import Subject
from multipruner.eval.suite.table import MEASURES, Suite
from multipruner.eval.suite.texts import text_digest

Progress = Callable[[str, int, int], None]
"""Called with (measure, done, in all)."""


def references(subject: Subject, suite: Suite, kept: Kept, progress: Progress) -> dict[str, dict[str, Tensor]]:
    """Return what others are set beside of the dense model, by measure.

    Args:
        subject: the dense model.
        suite: what is measured.
        kept: what was measured before.
        progress: told how far it is.
    """
    found = {}
    with inference(subject.model):
        for name, settings in suite.measures.items():
            row = MEASURES[name]
            if row.reference is not None:
                measure = partial(loaded(row.reference), subject.telling(partial(progress, name)), **settings)
                found[name] = kept.tensors(f"{name} (reference)", _question(subject, name, settings), measure)
    return found


def measures(
    subject: Subject,
    suite: Suite,
    kept: Kept,
    progress: Progress,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, TaskResult]:
    """Return the measures of a suite for one model.

    Args:
        subject: the model.
        suite: what is measured.
        kept: what was measured before.
        progress: told how far it is.
        beside: what :func:`references` gave; ``None`` for the dense model itself.

    Raises:
        NumericsError: for predictions that are not finite.
        CalibrationError: when a text is too short.
    """
    found = {}
    with inference(subject.model):
        for name, settings in suite.measures.items():
            row, told = MEASURES[name], subject.telling(partial(progress, name))
            given = told.beside((beside or {}).get(name, {}))

            def measure(row: Any = row, given: Subject = given, settings: Mapping[str, Any] = settings) -> Any:
                return TaskResult(loaded(row.by)(given, **settings), str(row.version)).to_json()

            progress(name, 0, 0)
            found[name] = TaskResult.from_json(kept.result(name, _question(subject, name, settings), measure))
    return found


def _question(subject: Subject, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    texts = {kind: text_digest(ids) for kind, ids in subject.texts.items()}
    return {"version": MEASURES[name].version, "settings": dict(settings), "texts": texts}
