"""One pruning run from recipe to folder: model, calibration, search, surgery, evaluation, checkpoint."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from multipruner.checkpoint.classes import apply_plan, family_of
from multipruner.checkpoint.save import save
from multipruner.config.recipe import Recipe
from multipruner.console.progress import counting_display
from multipruner.core.errors import CalibrationError
from multipruner.core.plan import PruningPlan
from multipruner.engine.moments import gather
from multipruner.engine.processes import Team
from multipruner.engine.prunable import Outputs, Prunable
from multipruner.engine.tensors_on_disk import OnDisk
from multipruner.eval import Comparison, Evaluation, check_settings, compare, evaluate
from multipruner.importance.orders import NEED_STATISTICS, rank
from multipruner.latency.timing import environment_of, time_side_by_side
from multipruner.repair.columns import Repair, compensate, unrepaired
from multipruner.repair.stream import write_outputs
from multipruner.report import notebook
from multipruner.report.card import model_card
from multipruner.report.summary import next_commands, render, teller
from multipruner.sources.calibration import CalibrationSet, load_calibration
from multipruner.sources.resolve import fingerprint, load_dense, resolve
from multipruner.storage.hub import hub_answers

from .limits import latency_table_of
from .record import record
from .remembered import check_reachable, find, lend_a_hand, repair_all, scored_with_repair
from .setting import Found, Setting, grid_of
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

    def __repr__(self) -> str:
        return notebook.line(self)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return notebook.html(self)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the body takes to those of a stage."""
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
        MultiprunerError: see :mod:`multipruner.core.errors`; nothing half-written is left.
    """
    console = console or Console(quiet=True)
    team = Team.from_environment()
    recipe = recipe.model_copy(update={"device": team.device(recipe.device)})
    if team.rank:  # computes what rank 0 asks for, and writes nothing
        lend_a_hand(prepared(recipe, team, Console(quiet=True), {}))
        raise SystemExit(0)
    with Workspace(output) as workspace:
        run = _run(recipe, team, workspace, console, command, overwrite)
        workspace.close()
    return run


def prepared(recipe: Recipe, team: Team, console: Console, seconds: dict[str, float]) -> Setting:
    """:func:`prepare` in every process of a job: rank 0 first, for what lands in the cache; the same everywhere."""
    setting = team.one_first(partial(prepare, recipe, console, seconds), lambda found: json.dumps(found.identity))
    return replace(setting, team=team)


def _run(
    recipe: Recipe, team: Team, workspace: Workspace, console: Console, command: str | None, overwrite: bool
) -> Run:
    say = teller(console)
    seconds: dict[str, float] = {}
    setting = prepared(recipe, team, console, seconds)
    with timed(seconds, "search"):
        found = find(setting, workspace, console, say, overwrite)
    team.stop()
    return finish(setting, found, workspace, console, command, seconds)


def finish(
    setting: Setting,
    found: Found,
    workspace: Workspace,
    console: Console,
    command: str | None,
    seconds: dict[str, float],
) -> Run:
    """From what a search found to the folder: repair, surgery, evaluation, checkpoint, report, card.

    Args:
        setting: what :func:`prepare` gave.
        found: the structure to make.
        workspace: of the output folder, entered.
        console: for progress and the summary.
        command: the command line, for the record.
        seconds: how long the stages before took; those of the ones here are added.
    """
    recipe, say, output = setting.recipe, teller(console), workspace.output
    if setting.repairs_all:
        with timed(seconds, "repair"), counting_display(console) as display:
            found = repair_all(setting, found, say, _named(display, "repair"))
    elif setting.repair is not None and setting.search_repair is None:
        found = scored_with_repair(setting, found)
    plan = _plan(setting, found)
    with timed(seconds, "surgery"):
        pruned = cut_model(setting, plan, found.outputs, found.gain)
    with timed(seconds, "evaluation"):
        comparison = _evaluate(setting, pruned, say)
    report = record(setting, plan, found, comparison, seconds, command)
    if recipe.latency_table is not None:
        report["latency"] = _latency(setting, plan, pruned, say)
    card = model_card(report, plan, stock=family_of(pruned.config.to_dict()) is None)
    journal = workspace.journal_path
    save(output, pruned, setting.tokenizer, plan=plan, report=report, trajectory=journal, card=card, replace=True)
    console.print(render(report, output, comparison.table()))
    say(next_commands(output))
    return Run(output, plan, report, pruned, setting.tokenizer)


def cut_model(setting: Setting, plan: PruningPlan, outputs: Outputs, gain: torch.Tensor | None = None) -> Any:
    """The pruned model in memory, with these output projections and this gain of the last norm, or repaired block by
    block where there are no projections."""
    pruned = apply_plan(setting.prunable.model, plan)
    if outputs:  # they cover every block that stays
        write_outputs(pruned, setting.prunable, plan, setting.ranking, outputs, gain)
    elif setting.repair is not None and setting.statistics is not None:
        compensate(pruned, setting.prunable, plan, setting.statistics, setting.recipe.ridge, setting.repair.how)
    return pruned


def prepare(recipe: Recipe, console: Console, seconds: dict[str, float]) -> Setting:
    """Load model and calibration, rank the widths, refuse what cannot be reached before any search."""
    say = teller(console)
    check_settings(recipe.evaluation)
    with timed(seconds, "load"):
        source = resolve(recipe, say)
        model, tokenizer = load_dense(source, recipe)
        prunable = Prunable.of(model)
        check_reachable(recipe, prunable)
        if warning := unrepaired(recipe.compensation, prunable):
            say(warning)
    with counting_display(console) as display:
        with timed(seconds, "text"):
            text = _named(display, "text")
            calibration = load_calibration(recipe.calibration, tokenizer, model, say=say, progress=text)
            held_out = held_out_text(recipe, tokenizer, model)
            more = _statistics_text(recipe, tokenizer, model, say, text)
        with timed(seconds, "statistics"):
            place = OnDisk if recipe.moments == "disk" else dict
            shown = _named(display, "statistics")
            statistics = gather(prunable, more, shown, place) if more is not None else None
            order = _named(display, "order")
            finer = grid_of(recipe, prunable).query_head_step is not None
            ranking = rank(recipe.importance, prunable, statistics, order, within_groups=finer)
    repair = None
    if statistics is not None and recipe.compensation != "none":
        repair = Repair(prunable, statistics, ranking, recipe.ridge, recipe.compensation)
    return Setting(
        recipe,
        source,
        prunable,
        tokenizer,
        calibration,
        held_out,
        statistics,
        more,
        ranking,
        repair,
        fingerprint(model),
    )


def _named(display: Callable[[str, int, int], None], what: str) -> Callable[[int, int], None]:
    return lambda done, total: display(what, done, total)


def _statistics_text(
    recipe: Recipe, tokenizer: Any, model: Any, say: Callable[[str], None], progress: Callable[[int, int], None]
) -> torch.Tensor | None:
    """More of the calibration text for second moments, where something needs them; token ids."""
    if recipe.compensation == "none" and recipe.importance not in NEED_STATISTICS:
        return None
    ids = load_calibration(recipe.calibration, tokenizer, model, split="statistics", progress=progress).ids
    if len(ids) < (asked := recipe.calibration.statistics_sequences):
        say(
            f"statistics of {len(ids)} sequences, not of {asked}: the text has no more of its own for them; order and "
            f"repair gain from more (a longer text, or --calibration {recipe.calibration.source}+self)"
        )
    return ids


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


def _plan(setting: Setting, found: Found) -> PruningPlan:
    return PruningPlan.from_structure(
        found.structure,
        setting.ranking,
        setting.prunable.dense,
        model=setting.source.name,
        revision=setting.source.revision,
        fingerprint=setting.fingerprint,
        model_type=setting.prunable.spec.model_type,
    )


def _latency(setting: Setting, plan: PruningPlan, pruned: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Predicted milliseconds, and those of both models timed in alternation."""
    table, workload = latency_table_of(setting.recipe, setting.prunable)
    dense = setting.prunable.model
    if warning := table.warning(environment_of(dense)):
        say(warning)
    measured = time_side_by_side({"dense": dense, "pruned": pruned}, table.row(workload).workload)
    row = {
        "predicted_ms": table.milliseconds(plan.structure, workload),
        "predicted_dense_ms": table.milliseconds(plan.dense, workload),
        "measured_ms": measured["pruned"].median_ms,
        "dense_ms": measured["dense"].median_ms,
    }
    predicted, real = row["predicted_ms"] / row["predicted_dense_ms"], row["measured_ms"] / row["dense_ms"]
    say(
        f"{workload}: {row['dense_ms']:.1f} -> {row['measured_ms']:.1f} ms, {real:.3f}x; the table predicted "
        f"{row['predicted_ms']:.1f} ms, {predicted:.3f}x"
    )
    return {"phases": {workload: row}}


def _evaluate(setting: Setting, pruned: Any, say: Callable[[str], None]) -> Comparison:
    """Dense and pruned model on the same text and tasks."""
    ids, name = (setting.held_out.ids, f"held-out {setting.held_out.name}") if setting.held_out else (None, "")

    def judge(model: Any, say: Callable[[str], None]) -> Evaluation:
        spec = setting.recipe.evaluation
        return evaluate(model, setting.tokenizer, spec, fallback_ids=ids, fallback_name=name, say=say)

    return compare(judge(setting.prunable.model, say), judge(pruned, lambda text: None))
