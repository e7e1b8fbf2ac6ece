"""A plan that is there already, such as one of a sweep, made into a model as a run of its own would make it."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from rich.console import Console

from multipruner.config.recipe import Recipe
from multipruner.config.spellings import FOUND_BY
from multipruner.console.progress import waiting_display
from multipruner.core.axes import AXES, STREAM, VALUES
from multipruner.core.errors import ConfigError, NumericsError
from multipruner.core.identity import digest
from multipruner.core.plan import BlockUnits, PruningPlan, Ranking
from multipruner.core.structure import Place, Size
from multipruner.jobs.finish import Run, finish
from multipruner.jobs.prepare import prepare
from multipruner.jobs.record import Clock
from multipruner.jobs.remembered import RememberedObjective, objective_of
from multipruner.jobs.setting import Found, Setting
from multipruner.jobs.workspace import Workspace
from multipruner.repair.scoring import Repair
from multipruner.search import Memo
from multipruner.stream.plans import read_plan

NO_BUDGET: dict[str, Any] = {"ratio": None, FOUND_BY: "program", "budgets": {}, "hidden_size": None}
"""Recipe fields of a run whose plan says what stays; with a latency table both models are timed all the same."""


def apply_given_plan(
    recipe: Recipe,
    plan_path: Path,
    output: Path,
    *,
    console: Console | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> Run:
    """Cut the recipe's model as a plan says, repair it as the recipe says, evaluate and write it.

    Args:
        recipe: model, calibration, repair and evaluation; its budgets are not looked at.
        plan_path: the plan.
        output: the folder; it appears only when everything is there.
        console: where progress and summary go; default: nowhere.
        command: the command line, for the record.
        overwrite: give up what another run left in the folder.

    Raises:
        ConfigError: when the file is no plan, or one of another model.
        MultiprunerError: see :mod:`multipruner.core.errors`; nothing half-written is left.
    """
    console = console or Console(quiet=True)
    plan = read_plan(plan_path)
    rotate = {"rotate": "on" if STREAM.axes[0].name in plan.bases else "off"}
    recipe = Recipe.build({**recipe.model_dump(), **NO_BUDGET, **_along(plan, recipe), **rotate})
    with Workspace(output, recipe.model) as workspace:
        seconds = Clock(console)
        setting = prepare(recipe, console, seconds, stream=plan.stream, walks=plan.stream is None, pictures=True)
        _check(plan, plan_path, setting)
        setting = _ordered_by(setting, plan)
        identity = setting.identity | {"plan": hashlib.sha256(plan.to_json().encode()).hexdigest()}
        structure = replace(plan.structure, hidden=None)  # the model is narrower already
        memo = Memo(workspace.open_measurements(identity, overwrite), digest(identity))
        with setting.prunable.in_order(setting.ranking, setting.repair), waiting_display(console, "loss"):
            objective = objective_of(setting, len(setting.calibration.ids))
            loss = RememberedObjective(objective, memo)(structure)
        if not isfinite(loss):
            raise NumericsError("the plan's calibration loss is not finite; try --dtype float32 or bfloat16")
        ratio = setting.prunable.costs.ratio(structure)
        found = Found(structure, loss, ratio, {"structures": objective.work}, by="given plan")
        run = finish(setting, found, workspace, console, command, seconds)
        workspace.close()
    return run


def _along(plan: PruningPlan, recipe: Recipe) -> dict[str, int | None]:
    """Return the recipe's steps of axes that not every size names: those that the plan is of have one."""
    rows = (row for place, size in zip(plan.anatomy, plan.structure, strict=True) for row in
            zip(place.axes, size, place.dense, strict=False))  # fmt: skip
    cut = {*plan.along[-1:], *plan.bases, *(axis.name for axis, kept, most in rows if kept < most)}
    axes = (axis for axis in AXES.values() if axis.unsaid)
    return {axis.setting: getattr(recipe, axis.setting) or 1 if axis.name in cut else None for axis in axes}


def _check(plan: PruningPlan, path: Path, setting: Setting) -> None:
    """Check that the plan is of the very model that was loaded, and of sizes that the latency table knows, if any."""
    narrower = plan.stream is not None and plan.hidden != setting.prunable.original.anatomy.constants["hidden"]
    if narrower or plan.anatomy != setting.prunable.anatomy or plan.model_type != setting.prunable.spec.model_type:
        raise ConfigError(
            f"{path} is a plan for {plan.model} ({plan.model_type}), a model of other sizes than this one"
        )
    if (turned := VALUES in plan.bases) != bool(setting.prunable.bases):
        raise ConfigError(
            f"{path}: its value dimensions are {'' if turned else 'not '}those of bases worked out of text; prune "
            f"{'with' if turned else 'without'} moments (a repair, or an importance that asks for them)"
        )
    if plan.fingerprint is not None and plan.fingerprint != setting.fingerprint:
        raise ConfigError(f"{path} is a plan for {plan.model}, whose weights differ from those loaded now")
    for place, size in zip(plan.anatomy, plan.structure, strict=True):
        if flag := _kept_by(setting, place, size):
            raise ConfigError(f"{path} cuts {place.name}, which {flag} keeps whole; drop either")
    if setting.latency is not None:  # a table without its sizes is an error now, not after everything
        table, workload = setting.latency
        table.milliseconds(plan.structure, plan.anatomy, workload)


def _kept_by(setting: Setting, place: Place, size: Size) -> str:
    """Return the flag by which a block is to keep what a size takes from it, or nothing."""
    recipe = setting.recipe
    cut = [axis.dimension for axis, kept, most in zip(place.axes, size, place.dense, strict=False) if kept != most]
    if (cut or not size) and setting.grid.freezes(place):
        return f"--freeze {recipe.freeze}"
    if {*cut, *(() if size else ("blocks",))} - {*recipe.dimensions}:
        return f"--dimensions {','.join(recipe.dimensions)}"
    return ""


def _ordered_by(setting: Setting, plan: PruningPlan) -> Setting:
    """Return what the plan keeps comes first in every layer's order, so that its structure leads to just this plan."""
    ranking = leading(plan, setting.ranking)
    repair = setting.repair
    if repair is not None and setting.statistics is not None:
        repair = Repair(setting.prunable, setting.statistics, ranking, setting.recipe.ridge, repair.how)
    return replace(setting, ranking=ranking, repair=repair)


def leading(plan: PruningPlan, ranking: Ranking) -> Ranking:
    """Return a ranking in which what a plan keeps stands first, otherwise in the order that it had."""

    blocks = zip(ranking.blocks, plan.blocks, plan.anatomy, strict=True)
    orders = tuple(_first(order, kept, place) if kept.axes else order for order, kept, place in blocks)
    return replace(ranking, blocks=orders)


def _first(order: BlockUnits, kept: BlockUnits, place: Place) -> BlockUnits:
    """Return an order in which what is kept stands first on every axis."""
    found: dict[str, Any] = {}
    for axis, whole, stays in zip(place.axes, order.axes, kept.axes, strict=True):
        if axis.within:
            outer: Any = kept.by_axis(place.kind)[axis.within]
            inside: dict[int, Any] = dict(zip(outer, stays, strict=True))
            found[axis.name] = tuple(_before(row, inside.get(unit, ())) for unit, row in enumerate(whole))
        else:
            found[axis.name] = _before(whole, stays)
    return BlockUnits(tuple(found.values()))


def _before(order: Any, kept: Any) -> tuple[int, ...]:
    """Return the same units, those that stay before the others."""
    stays = set(kept)
    return tuple(sorted(order, key=lambda unit: unit not in stays))
