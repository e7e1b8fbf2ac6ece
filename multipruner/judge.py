"""``multipruner eval``: dense and pruned models side by side, on the same text and tasks."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .calibration import load_calibration
from .errors import ConfigError, OutputError
from .eval import Comparison, Evaluation, compare, evaluate
from .export.checkpoint import load
from .recipe import Recipe
from .recipes import mapping_for
from .sources import load_dense, resolve
from .summary import teller

REPORT = "report.json"


def judge_folders(
    folders: Sequence[str],
    against: str | None,
    settings: Mapping[str, Any],
    *,
    console: Console,
    output: Path | None = None,
) -> list[Comparison]:
    """Evaluate models and print each beside the dense one; the results go into each folder's report.

    Args:
        folders: pruned folders, or anything ``--model`` takes.
        against: the dense model; default: what the first pruned folder was made from.
        settings: overrides of the recipe, such as ``{"evaluation": {"tasks": [...]}}``.
        console: where tables go.
        output: a JSON file for all results.

    Raises:
        ConfigError: when there is no dense model to compare with.
        OutputError: when the output file cannot be written.
    """
    say = teller(console)
    reports = {folder: _read_report(folder) for folder in folders}
    recipe = _recipe(against, next((report for report in reports.values() if report), None), settings)
    model, tokenizer = load_dense(resolve(recipe, say), recipe)
    spec = recipe.evaluation
    needs_text = "ppl" in spec.tasks and spec.text is None
    held_out = load_calibration(recipe.calibration, tokenizer, model, split="heldout", say=say) if needs_text else None

    def judge(model: Any) -> Evaluation:
        ids, name = (held_out.ids, f"held-out {held_out.name}") if held_out else (None, "")
        return evaluate(model, tokenizer, spec, fallback_ids=ids, fallback_name=name, say=say)

    dense = judge(model)
    dtype, device = next(model.parameters()).dtype, next(model.parameters()).device
    del model
    results = []
    for folder in folders:
        gc.collect()
        if reports[folder]:
            candidate: Any = load(folder, dtype=dtype)
            candidate.to(device)
        else:
            other = Recipe.build(mapping_for(folder), settings)
            candidate, _ = load_dense(resolve(other, say), other)
        comparison = compare(dense, judge(candidate))
        del candidate
        console.print(comparison.table(title=folder))
        results.append(comparison)
        if reports[folder]:
            _add_to_report(Path(folder), comparison, recipe)
    if output is not None:
        rows = {folder: c.to_json() for folder, c in zip(folders, results, strict=True)}
        _write(output, json.dumps(rows, indent=1) + "\n")
    return results


def _read_report(folder: str) -> dict[str, Any] | None:
    path = Path(folder) / REPORT
    return json.loads(path.read_text()) if path.exists() else None


def _recipe(against: str | None, report: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> Recipe:
    """How to load the dense model, and what to evaluate."""
    if against is not None:
        return Recipe.build(mapping_for(against), settings)
    if report is None:
        raise ConfigError("no folder given is a pruned one; name the dense model with --against")
    return Recipe.build(report["recipe"], settings)


def _add_to_report(folder: Path, comparison: Comparison, recipe: Recipe) -> None:
    """Append an evaluation to the folder's report, atomically."""
    report = json.loads((folder / REPORT).read_text())
    entry = {"settings": recipe.evaluation.model_dump(mode="json"), **comparison.to_json()}
    report.setdefault("evaluations", []).append(entry)
    _write(folder / REPORT, json.dumps(report, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_text(text)
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
