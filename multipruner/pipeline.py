"""One pruning run from recipe to folder: model, calibration, search, surgery, evaluation, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import floor
from pathlib import Path
from typing import Any

from rich.console import Console

from .calibration import CalibrationSet, load_calibration
from .card import model_card
from .errors import CalibrationError, InfeasibleError
from .eval import Comparison, Evaluation, check_settings, compare, evaluate
from .export.checkpoint import save
from .hub import hub_answers
from .importance import rank
from .journal import Trajectory
from .modeling import apply_plan
from .objective import CalibrationObjective
from .plan import PruningPlan
from .progress import search_display
from .prunable import Prunable
from .recipe import Recipe
from .record import record
from .search import (
    DIMENSIONS,
    Dimension,
    Problem,
    Step,
    expected_candidates,
    reachable_ratio,
    replay,
    sequential_path,
    steps_to,
    too_small,
)
from .setting import Found, Setting, problem_of
from .sources import fingerprint, load_dense, resolve
from .summary import next_commands, render, teller
from .workspace import Workspace


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where the pruned model is.
        plan: what of the dense model stayed.
        report: what ``report.json`` holds.
        model, tokenizer: the pruned model in memory.
    """

    folder: Path
    plan: PruningPlan
    report: dict[str, Any]
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began


def prune(
    recipe: Recipe,
    output: Path,
    *,
    console: Console | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> Run:
    """Prune a model as a recipe says and write the result to a folder.

    A run that was interrupted goes on where it was; a smaller ratio of a finished run in the same folder is cut
    from its path without searching again.

    Args:
        recipe: what to do.
        output: the folder; it appears only when everything is there.
        console: where progress and summary go; default: nowhere.
        command: the command line, for the record.
        overwrite: give up what another run left in the folder.

    Raises:
        MultiprunerError: see :mod:`multipruner.errors`; nothing half-written is left.
    """
    console = console or Console(quiet=True)
    with Workspace(output) as workspace:
        run = _run(recipe, workspace, console, command, overwrite)
        workspace.close()
    return run


def _run(recipe: Recipe, workspace: Workspace, console: Console, command: str | None, overwrite: bool) -> Run:
    say, output = teller(console), workspace.output
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        setting = _prepare(recipe, say)
    with _timed(seconds, "search"):
        path = _search(setting, workspace, console, say, overwrite)
    plan = _plan(setting, path.steps)
    with _timed(seconds, "surgery"):
        pruned = apply_plan(setting.prunable.model, plan)
    with _timed(seconds, "evaluation"):
        comparison = _evaluate(setting, pruned, say)
    report = record(setting, plan, path, comparison, seconds, command)
    card = model_card(report, plan)
    trajectory = workspace.trajectory_path
    save(output, pruned, setting.tokenizer, plan=plan, report=report, trajectory=trajectory, card=card, replace=True)
    console.print(render(report, output, comparison.table()))
    say(next_commands(output))
    return Run(output, plan, report, pruned, setting.tokenizer)


def _prepare(recipe: Recipe, say: Callable[[str], None]) -> Setting:
    """Load model and calibration, rank the widths, refuse what cannot be reached before any search."""
    check_settings(recipe.evaluation)
    source = resolve(recipe, say)
    model, tokenizer = load_dense(source, recipe)
    prunable = Prunable.of(model)
    _check_reachable(problem_of(recipe, prunable))
    calibration = load_calibration(recipe.calibration, tokenizer, model, say=say)
    ranking = rank(recipe.importance, prunable.layers, prunable.spec, prunable.dense, prunable.head_dim)
    held_out = held_out_text(recipe, tokenizer, model)
    return Setting(recipe, source, prunable, tokenizer, calibration, held_out, ranking, fingerprint(model))


def _check_reachable(problem: Problem) -> None:
    problem.grid.check(problem.costs.dense)
    reachable = reachable_ratio(problem)
    if not reachable:
        raise too_small(problem)
    if reachable < problem.ratio:
        shares = ":".join(f"{problem.shares[dimension]:g}" for dimension in DIMENSIONS)
        raise InfeasibleError(
            f"a ratio of {problem.ratio:g} is out of reach with shares {shares} and channel groups of "
            f"{problem.grid.channel_group}: the maximum is about {floor(reachable * 1e3) / 1e3:g}; ask for less, or "
            "give 'blocks' a larger share",
            nearest=reachable,
        )


def held_out_text(recipe: Recipe, tokenizer: Any, model: Any) -> CalibrationSet | None:
    """Text for perplexity in place of WikiText-2, found before the search so that no search ends without it."""
    spec = recipe.evaluation
    if "ppl" not in spec.tasks or spec.text is not None:
        return None
    try:
        return load_calibration(recipe.calibration, tokenizer, model, split="heldout")
    except CalibrationError:
        if hub_answers():
            return None
        raise


def _objectives(setting: Setting) -> dict[Dimension, CalibrationObjective]:
    """Blocks are judged on all sequences, widths on the first few: they have many more candidates."""
    spec, calibration = setting.recipe.calibration, setting.calibration

    def objective(sequences: int) -> CalibrationObjective:
        return CalibrationObjective(
            setting.prunable,
            calibration.head(sequences).ids,
            ignore_id=calibration.ignore_id,
            batch_size=spec.batch_size,
        )

    blocks, width = objective(len(calibration.ids)), objective(spec.width_sequences)
    return {"blocks": blocks, "mlp": width, "heads": width}


def _search(
    setting: Setting, workspace: Workspace, console: Console, say: Callable[[str], None], overwrite: bool
) -> Found:
    """Search, or go on searching, or find that an earlier search already covers the ratio."""
    problem = setting.problem
    trajectory, journal = workspace.open(setting.identity, problem.ratio, overwrite)
    if trajectory is not None and trajectory.finished:
        say(f"the finished search to {100 * trajectory.ratio:g}% covers this ratio: nothing to search")
        return Found(_cut(trajectory, problem), trajectory.ratio, {})
    done = trajectory.steps if trajectory is not None else ()
    if done:
        say(f"going on after step {len(done)} of an interrupted run")
    with setting.prunable.in_order(setting.ranking):
        objectives = _objectives(setting)
        counts = expected_candidates(problem)
        expected: dict[Dimension, float] = {name: n * objectives[name].tokens for name, n in counts.items()}
        with search_display(console, expected, problem.ratio) as display:
            steps = sequential_path(problem, objectives, done=done, on_step=journal.add, on_progress=display)
    journal.finish()
    return Found(steps, problem.ratio, {"blocks": objectives["blocks"].work, "widths": objectives["mlp"].work})


def _cut(trajectory: Trajectory, problem: Problem) -> list[Step]:
    """The part of a finished path that leads to a ratio."""
    steps = list(trajectory.steps)
    if trajectory.ratio != problem.ratio:
        steps = steps[: steps_to(steps, problem.ratio, problem.stop)]
    if not steps:
        least = trajectory.steps[0].ratio
        raise InfeasibleError(f"the first step removes {least:.5f}; ask for a ratio of at least that", nearest=least)
    return steps


def _plan(setting: Setting, steps: list[Step]) -> PruningPlan:
    dense = setting.prunable.dense
    return PruningPlan.from_structure(
        replay(dense, steps),
        setting.ranking,
        dense,
        model=setting.source.name,
        revision=setting.source.revision,
        fingerprint=setting.fingerprint,
        model_type=setting.prunable.spec.model_type,
    )


def _evaluate(setting: Setting, pruned: Any, say: Callable[[str], None]) -> Comparison:
    """Dense and pruned model on the same text and tasks."""
    ids, name = (setting.held_out.ids, f"held-out {setting.held_out.name}") if setting.held_out else (None, "")

    def judge(model: Any, say: Callable[[str], None]) -> Evaluation:
        spec = setting.recipe.evaluation
        return evaluate(model, setting.tokenizer, spec, fallback_ids=ids, fallback_name=name, say=say)

    return compare(judge(setting.prunable.model, say), judge(pruned, lambda text: None))
