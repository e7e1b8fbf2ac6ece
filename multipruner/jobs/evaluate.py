"""``multipruner eval``: dense and pruned models side by side, on the same text and tasks."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from multipruner.checkpoint.classes import task_of
from multipruner.checkpoint.load import load_run
from multipruner.checkpoint.run_folder import check_name, is_written, read_json
from multipruner.config.recipe import EvaluationSpec, Recipe
from multipruner.console.events import tell
from multipruner.console.progress import counting_display, judging_display, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import ConfigError, OutputError, UnknownModelError, UnsupportedModelError
from multipruner.engine.fingerprint import fingerprint
from multipruner.engine.moments import positions_of
from multipruner.engine.precision import Precision
from multipruner.engine.prunable import Prunable
from multipruner.eval import Comparison, Evaluation, check_settings, compare, evaluate
from multipruner.eval.accuracy import classes_of, judged
from multipruner.eval.kept import Kept
from multipruner.recipes import mapping_for
from multipruner.sources.calibration import CalibrationSet, CalibrationText, held_out_text
from multipruner.sources.dense import load_dense
from multipruner.sources.intake.processor import shape_of
from multipruner.sources.pictures import PictureFiles, judging_pictures
from multipruner.sources.resolve import resolve
from multipruner.storage.files import write_atomically
from multipruner.storage.partial import header_of
from multipruner.storage.run_report import check_numbers

from .prepare import check_text
from .record import recorded_recipe
from .suite import SuiteRun, kept_scores, suite_settings, with_prose

REPORT = "report.json"
RESULT = {"format": "multipruner-evaluation", "version": 1}
"""The first entries of a file of results; the others are by folder."""


def judge_folders(
    folders: Sequence[str],
    against: str | None,
    settings: Mapping[str, Any],
    *,
    console: Console,
    output: Path | None = None,
    suite: str | None = None,
    fresh: bool = False,
) -> list[Comparison]:
    """Evaluate models and print each beside the dense one; the results go into each folder's report.

    Args:
        folders: pruned folders, or anything ``--model`` takes.
        against: the dense model; default: what the first pruned folder was made from.
        settings: overrides of the recipe, such as ``{"evaluation": {"tasks": [...]}}``.
        console: where tables go.
        output: a JSON file for all results.
        suite: a row of :data:`multipruner.eval.suite.table.SUITES` that is measured as well; its lm-eval tasks where
            the settings name none.
        fresh: whether the dense model is measured anew, whatever was kept of earlier evaluations.

    Raises:
        ConfigError: when there is no dense model to compare with, or no such suite.
        OutputError: when the output file cannot be written.
    """
    say = teller(console)
    reports = {folder: _read_report(folder) for folder in folders}
    asked, settings = settings, suite_settings(suite, settings)
    recipe = _recipe(against, reports, settings)
    check_text(recipe)
    check_output(output)
    for folder in folders:  # a name that is wrong is said before anything is evaluated
        if not Path(folder).exists():
            mapping_for(folder)
    with waiting_display(console, "loading the model"):
        source = resolve(recipe, say)
        model, tokenizer = load_dense(source, recipe, pictures=True)
        _check_same_base(reports, fingerprint(model))
        precision = Precision.of(model, recipe.compute_dtype)
    say(precision.line())
    if reads_text := task_of(model.config).reads_text:
        check_settings(recipe.evaluation)
        kept = kept_scores(model, tokenizer, precision, fresh=fresh)
        judge = _Judge.of(recipe, model, tokenizer, precision, console, suite, "tasks" in asked.get("evaluation", {}))
    else:
        kept, judge = Kept(), _OnPictures.of(recipe, model, tokenizer, precision, console, suite, source.name)
    dense = judge(model, "dense", kept)
    if kept.found:
        say(f"dense, as it was measured before: {', '.join(kept.found)} (--fresh measures anew)")
    judge.optional = {name: chat for name, chat in judge.optional.items() if name in dense.tasks}
    device = model.device
    del model
    results = []
    for folder in folders:
        gc.collect()
        name = Path(folder).absolute().name
        with waiting_display(console, f"loading {name}"):
            candidate = _candidate(folder, recipe, settings, precision.stored, device, say, pictures=not reads_text)
        who = "tuned" if (reports[folder] or {}).get("tuned") else "pruned"
        comparison = compare(dense, judge(candidate, name, Kept()), suite or "", who)
        say(f"\n{folder}")
        console.print(comparison.table())
        results.append(comparison)
        tell(console, "result", folder=folder, **comparison.to_json())
        if reports[folder]:
            _add_to_report(Path(folder), comparison, recipe)
        if output is not None:  # after every folder: one that fails later loses nothing
            write_atomically(output, json.dumps(as_record(folders, results), indent=1) + "\n")
    return results


@dataclass
class _Judge:
    """Evaluates one model after another in the same way.

    Attributes:
        spec: the perplexity, and tasks that were asked for by name.
        optional: tasks of the suite, and whether each takes the chat template.
    """

    spec: EvaluationSpec
    optional: dict[str, bool]
    tokenizer: Any
    held_out: CalibrationSet | None
    precision: Precision
    console: Console
    suite: SuiteRun | None

    @classmethod
    def of(
        cls, recipe: Recipe, model: Any, tokenizer: Any, precision: Precision, console: Console, suite: str | None,
        typed: bool,
    ) -> _Judge:  # fmt: skip
        """Gather texts, from the dense model where need be.

        Args:
            typed: whether tasks were asked for, which then take the place of the suite's.
        """
        spec, optional, run = recipe.evaluation, {}, None
        with precision.computing(model), waiting_display(console, "text"):
            text = CalibrationText(recipe.text, tokenizer, model)
            held_out = held_out_text(with_prose(recipe) if suite else recipe, text)
        if suite is not None:
            with precision.computing(model), counting_display(console, "text") as display:
                run = SuiteRun.of(suite, model, tokenizer, spec, held_out, partial(display, "text"))
            if not typed:
                spec, optional = run.tasks(spec)
        return cls(spec, optional, tokenizer, held_out, precision, console, run)

    def __call__(self, model: Any, who: str, kept: Kept) -> Evaluation:
        ids, name = (self.held_out.ids, f"held-out {self.held_out.name}") if self.held_out else (None, "")
        with self.precision.computing(model), judging_display(self.console, who) as display:
            found = evaluate(
                model, self.tokenizer, self.spec, fallback_ids=ids, fallback_name=name, say=teller(self.console),
                progress=display, kept=kept, optional=self.optional,
            )  # fmt: skip
            return self.suite.measured(model, self.tokenizer, found, kept, display) if self.suite else found


@dataclass
class _OnPictures:
    """Evaluates one image classifier after another in the same way, the dense one first."""

    pictures: PictureFiles
    precision: Precision
    console: Console
    dense: list[int] = field(default_factory=list)
    optional: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(
        cls, recipe: Recipe, model: Any, processor: Any, precision: Precision, console: Console, suite: str | None,
        name: str,
    ) -> _OnPictures:  # fmt: skip
        """Find the pictures.

        Raises:
            ConfigError: for a suite, which is of texts.
        """
        if suite is not None:
            raise ConfigError(f"{name} is an image classifier: give no --suite, which is of texts")
        positions = positions_of(Prunable.of(model), torch.zeros(1, *shape_of(name, model.config, processor)))
        return cls(judging_pictures(recipe, model.config, processor, name, positions), precision, console)

    def __call__(self, model: Any, who: str, kept: Kept) -> Evaluation:
        with self.precision.computing(model), judging_display(self.console, who) as display:
            found = classes_of(model, self.pictures.pixels, len(self.pictures), display)
        self.dense = self.dense or found
        return judged(f"pictures of {self.pictures.name}", found, self.pictures.labels, self.dense)


def as_record(folders: Sequence[str], results: Sequence[Comparison]) -> dict[str, Any]:
    """Return what a file of results holds; there may be fewer results than folders so far."""
    return {**RESULT, **{name: result.to_json() for name, result in zip(folders, results, strict=False)}}


def check_output(output: Path | None) -> None:
    """Refuse an output file that cannot be written, or would take the place of something else than earlier results.

    Raises:
        OutputError: naming it.
    """
    if output is None:
        return
    if not output.absolute().parent.is_dir():
        raise OutputError(f"cannot write {output}: there is no folder {output.absolute().parent}")
    if os.path.lexists(output) and (header_of(output) or {}).get("format") != RESULT["format"]:
        raise OutputError(f"{output} is there and holds no results of eval; move it, or choose another --output")


def _read_report(folder: str) -> dict[str, Any] | None:
    """Return the report of a run; ``None`` where there is no folder, or one that no run wrote.

    Raises:
        OutputError: when it is damaged, or cannot be read.
    """
    check_name(Path(folder))
    path = Path(folder) / REPORT
    if not path.exists():
        return None
    report = read_json(path)
    if not isinstance(report.get("evaluations", []), list):
        raise OutputError(f"{path} is damaged: its evaluations are no list; make the run again")
    if report.get("format") != "multipruner-report" and is_written(Path(folder)):
        raise OutputError(f"{path} is not the report of a multipruner run; make the run again")
    if report.get("format") != "multipruner-report":
        return None
    check_numbers(report, path)
    return report


def _candidate(
    folder: str, recipe: Recipe, settings: Mapping[str, Any], dtype: Any, device: Any, say: Callable[[str], None],
    *, pictures: bool,
) -> Any:  # fmt: skip
    """Return a pruned folder or Hub repository, else whatever ``--model`` would take."""
    try:
        candidate: Any = load_run(folder, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
        return candidate.to(device)
    except (UnknownModelError, UnsupportedModelError):
        if (Path(folder) / REPORT).exists():
            raise
    other = Recipe.build(mapping_for(folder), settings)
    return load_dense(resolve(other, say), other, pictures=pictures)[0]


def _check_same_base(reports: Mapping[str, Mapping[str, Any] | None], dense: str) -> None:
    """Refuse another base: paired differences mean something only against the very model that was pruned."""
    for folder, report in reports.items():
        about = (report or {}).get("model")
        if report and (not isinstance(about, Mapping) or about.get("fingerprint") != dense):
            base = about.get("description") if isinstance(about, Mapping) else "a model that it does not name"
            raise ConfigError(
                f"{folder} was pruned from {base}, whose weights differ from those loaded now; "
                "name that model with --against"
            )


def _recipe(
    against: str | None, reports: Mapping[str, Mapping[str, Any] | None], settings: Mapping[str, Any]
) -> Recipe:
    """Tell how to load the dense model, and what to evaluate."""
    if against is not None:
        return Recipe.build(mapping_for(against), settings)
    for folder, report in reports.items():
        if report:
            return recorded_recipe(report, Path(folder), settings)
    raise ConfigError("no folder given is a pruned one; name the dense model with --against")


def _add_to_report(folder: Path, comparison: Comparison, recipe: Recipe) -> None:
    """Append an evaluation to the folder's report, atomically."""
    report = read_json(folder / REPORT)
    settings = recipe.evaluation.model_dump(mode="json")
    settings |= {"suite": comparison.suite} if comparison.suite else {}
    entry = {"settings": settings, **comparison.to_json()}
    report.setdefault("evaluations", []).append(entry)
    write_atomically(folder / REPORT, json.dumps(report, indent=1) + "\n")
