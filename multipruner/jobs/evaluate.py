"""``multipruner eval``: dense and pruned models side by side, on the same text and tasks."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from multipruner.checkpoint.load import load
from multipruner.config.recipe import Recipe
from multipruner.console.progress import judging_display, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import ConfigError, OutputError, UnknownModelError, UnsupportedModelError
from multipruner.engine.fingerprint import fingerprint
from multipruner.engine.precision import Precision
from multipruner.eval import Comparison, Evaluation, check_settings, compare, evaluate
from multipruner.recipes import mapping_for
from multipruner.sources.calibration import CalibrationText, held_out_text
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

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
    spec = recipe.evaluation
    check_settings(spec)
    for folder in folders:  # a name that is wrong is said before anything is evaluated
        if not Path(folder).exists():
            mapping_for(folder)
    if output is not None and not output.absolute().parent.is_dir():
        raise OutputError(f"cannot write {output}: there is no folder {output.absolute().parent}")
    with waiting_display(console, "loading the model"):
        model, tokenizer = load_dense(resolve(recipe, say), recipe)
        _check_same_base(reports, fingerprint(model))
        precision = Precision.of(model, recipe.compute_dtype)
    say(precision.line())
    with precision.computing(model), waiting_display(console, "text"):
        held_out = held_out_text(recipe, CalibrationText(recipe.calibration, tokenizer, model))

    def judge(model: Any, who: str) -> Evaluation:
        ids, name = (held_out.ids, f"held-out {held_out.name}") if held_out else (None, "")
        with precision.computing(model), judging_display(console, who) as display:
            return evaluate(model, tokenizer, spec, fallback_ids=ids, fallback_name=name, say=say, progress=display)

    dense = judge(model, "dense")
    dtype, device = precision.stored, model.device
    del model
    results = []
    for folder in folders:
        gc.collect()
        name = Path(folder).absolute().name
        with waiting_display(console, f"loading {name}"):
            candidate = _candidate(folder, recipe, settings, dtype, device, say)
        comparison = compare(dense, judge(candidate, name))
        say(f"\n{folder}")
        console.print(comparison.table())
        results.append(comparison)
        if reports[folder]:
            _add_to_report(Path(folder), comparison, recipe)
        if output is not None:  # after every folder: one that fails later loses nothing
            rows = {name: c.to_json() for name, c in zip(folders, results, strict=False)}
            _write(output, json.dumps(rows, indent=1) + "\n")
    return results


def _read_report(folder: str) -> dict[str, Any] | None:
    path = Path(folder) / REPORT
    return json.loads(path.read_text()) if path.exists() else None


def _candidate(
    folder: str, recipe: Recipe, settings: Mapping[str, Any], dtype: Any, device: Any, say: Callable[[str], None]
) -> Any:
    """A pruned folder or Hub repository, else whatever ``--model`` would take."""
    try:
        candidate: Any = load(folder, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
        return candidate.to(device)
    except (UnknownModelError, UnsupportedModelError):
        if (Path(folder) / REPORT).exists():
            raise
    other = Recipe.build(mapping_for(folder), settings)
    return load_dense(resolve(other, say), other)[0]


def _check_same_base(reports: Mapping[str, Mapping[str, Any] | None], dense: str) -> None:
    """Paired differences mean something only against the very model that was pruned."""
    for folder, report in reports.items():
        if report and report["model"]["fingerprint"] != dense:
            raise ConfigError(
                f"{folder} was pruned from {report['model']['description']}, whose weights differ from those loaded "
                "now; name that model with --against"
            )


def _recipe(against: str | None, report: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> Recipe:
    """How to load the dense model, and what to evaluate."""
    if against is not None:
        return Recipe.build(mapping_for(against), settings)
    if report is None:
        raise ConfigError("no folder given is a pruned one; name the dense model with --against")
    revision = {"revision": report["model"]["revision"]} if report["model"]["revision"] else {}
    return Recipe.build(report["recipe"], revision, settings)


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
