"""One budget at many values in one command: the model is loaded once, and losses measured for one point serve all.

The folder holds ``sweep.json`` and ``sweep.csv`` (every number), ``sweep.png`` (loss against cost),
``structures.png`` (what each point keeps, layer by layer), ``plans/VALUE.json`` (each point's plan, to be made into a
model by :mod:`multipruner.jobs.prune.given_plan`) and ``measurements.jsonl``, from which the same command, with more
values too, goes on. Losses are those of the search: the repair of all blocks at once, which ends a run, is not in them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from multipruner.config.recipe import Recipe
from multipruner.config.sweep_points import SweepPoints
from multipruner.console.events import tell
from multipruner.console.progress import counting_display, search_display, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import ConfigError
from multipruner.core.structure import Structure
from multipruner.jobs.limits import measures_of
from multipruner.jobs.narrow import refuse_hidden_size
from multipruner.jobs.prepare import prepare
from multipruner.jobs.record import Clock, timed
from multipruner.jobs.remembered import RememberedObjective, remembered, rough_of
from multipruner.jobs.setting import Setting
from multipruner.jobs.workspace import Workspace
from multipruner.report.figures.sweep import loss_figure, structures_of
from multipruner.search import Dimension, Round, allocate, expected_candidates

from .folder import check_free, write_sweep
from .path import first_within, judged_by, path_within, problem_to


@dataclass(frozen=True)
class Point:
    """One structure of a sweep.

    Attributes:
        method: ``"dense"``, ``"program"`` or ``"greedy"``.
        value: of the budget, as typed; ``None`` for the dense model.
        limit: the same as an upper bound, in the cost's unit.
        structure: what stays.
        loss: measured on the calibration text, in nats.
        costs: by the budgets' names; latency in milliseconds, by the table.
        ratio: removed / all parameters.
        rounds: of the exact program.
    """

    method: str
    value: str | None
    limit: float | None
    structure: Structure
    loss: float
    costs: Mapping[str, float]
    ratio: float
    rounds: tuple[Round, ...] = ()

    @property
    def name(self) -> str:
        """Such as ``0.8x``, ``greedy-0.8x``, ``dense``; the plan's file is called so."""
        value = (self.value or "").replace(" ", "")
        return "-".join(part for part in (self.method if self.method != "program" else "", value) if part)

    def to_json(self) -> dict[str, Any]:
        """Return a plain mapping."""
        best = min(self.rounds, key=lambda one: one.loss, default=None)
        return {
            "method": self.method,
            "value": self.value,
            "limit": self.limit,
            "loss": self.loss,
            "predicted_loss": best.predicted if best else None,
            "ratio": self.ratio,
            "costs": dict(self.costs),
            "plan": f"plans/{self.name}.json" if self.value else None,
            "structure": self.structure.to_json(),
            "rounds": [one.to_json() for one in self.rounds],
        }


def sweep(
    recipe: Recipe,
    points: SweepPoints,
    output: Path,
    *,
    console: Console | None = None,
    command: str | None = None,
    overwrite: bool = False,
    greedy: bool = False,
) -> Path:
    """Find the structure with the lowest loss for every value of a budget, and draw them.

    A sweep that was interrupted goes on where it was, and a finished one in the same folder lends its losses.

    Args:
        recipe: everything else; other budgets of it hold at every point.
        points: the budget and its values.
        output: the folder; it appears only when everything is there.
        console: where progress goes; default: nowhere.
        command: the command line, for the record.
        overwrite: give up what a sweep with other settings left in the folder.
        greedy: also walk the published greedy path to the tightest value, with the same calibration,
            objective, order and repair, and show the first structure on it that keeps each value. It takes many more
            losses than all other points together.

    Returns:
        The folder.

    Raises:
        MultiprunerError: see :mod:`multipruner.core.errors`; nothing half-written is left.
    """
    if recipe.greedy:
        raise ConfigError("a sweep is of --method program; its --sweep-greedy adds points of the greedy path")
    refuse_hidden_size(recipe, "a sweep")
    console = console or Console(quiet=True)
    check_free(output)
    recipes = {value: points.recipe(recipe, value) for value in points.values}
    with Workspace(output, recipe.model) as workspace:
        seconds = Clock(console)
        # the tightest first: if that can be kept, all can
        setting = prepare(recipes[points.values[-1]], console, seconds, searches=True)
        run = _Sweep(setting, points, recipes, console, workspace.open_measurements(setting.identity, overwrite))
        with timed(seconds, "search"):
            found = run.points(greedy)
        _write(workspace, run, found, seconds, command)
        workspace.close()
    tell(console, "result", folder=str(output), points={one.name: {"loss": one.loss, "ratio": one.ratio}
                                                        for one in found})  # fmt: skip
    teller(console)(_closing(output, points))
    return output


class _Sweep:
    """What the points share."""

    def __init__(
        self, setting: Setting, points: SweepPoints, recipes: Mapping[str, Recipe], console: Console, path: Path
    ) -> None:
        self.setting, self.at, self.console, self._path = setting, points, console, path
        self.settings = {value: replace(setting, recipe=recipe) for value, recipe in recipes.items()}
        self.say, self.dense = teller(console), setting.prunable.dense
        self.measures = measures_of(setting.recipe, setting.prunable, setting.latency)

    def costs(self, structure: Structure) -> dict[str, float]:
        """Return every cost of a structure by the name of its budget."""
        return self.measures.of_all(structure)

    def points(self, greedy: bool) -> list[Point]:
        """Return dense, the exact program's for every value, and those of the greedy path."""
        setting = self.setting
        with setting.prunable.in_order(setting.ranking, setting.search_repair):
            with waiting_display(self.console, "dense model"):
                losses, rough = remembered(setting, self._path), rough_of(setting, self._path)
            if known := len(losses.memo):
                self.say(f"{known} losses were measured before and are not measured again")
            found = [self._point("dense", None, self.dense, losses(self.dense))]
            self._tell(found[0])
            found += [self._solved(value, losses, rough) for value in self.at.values]
            if greedy:
                found += self._walked(found[-1].ratio, losses, rough or losses)
        return found

    def _solved(self, value: str, losses: RememberedObjective, rough: RememberedObjective | None) -> Point:
        with counting_display(self.console, f"{value} search") as display:

            def shown(what: str, done: int, total: int) -> None:
                display(f"{value} {what}", done, total)

            own = self.settings[value]
            found = allocate(own.task, losses, shown, sketch=rough, estimate=own.estimate(shown))
        point = self._point("program", value, found.structure, found.loss, found.rounds)
        self._tell(point)
        return point

    def _walked(self, aim: float, losses: RememberedObjective, widths: RememberedObjective) -> list[Point]:
        """Return the greedy path to the tightest value; every value's first structure on it."""
        setting, tightest = self.setting, self.at.values[-1]
        problem, judges = problem_to(setting, aim), judged_by(losses, widths)
        expected: dict[Dimension, float] = dict(expected_candidates(problem).items())
        with search_display(self.console, expected, aim) as display:
            steps = path_within(problem, judges, self._limits(tightest), self.costs, display)
        if steps is None:
            self.say(f"the greedy path does not get to {tightest} with shares {setting.recipe.shares_text()}")
            return []
        found = []
        for value in self.at.values:
            structure = first_within(setting.prunable.anatomy, steps, self._limits(value), self.costs)
            assert structure is not None, "the end keeps the tightest value"
            found.append(self._point("greedy", value, structure, losses(structure)))
            self._tell(found[-1])
        return found

    def _limits(self, value: str) -> Any:
        return self.settings[value].task.limits

    def _point(
        self, strategy: str, value: str | None, structure: Structure, loss: float, rounds: tuple[Round, ...] = ()
    ) -> Point:
        ratio, limit = self.setting.prunable.costs.ratio(structure), None
        if value is not None:
            name = "parameters" if self.at.budget == "ratio" else self.at.budget
            limit = min(one.limit for one in self._limits(value) if one.name == name)
        return Point(strategy, value, limit, structure, loss, self.costs(structure), ratio, rounds)

    def _tell(self, point: Point) -> None:
        """Have a point be a line, but for the dense model, and an event."""
        if point.value is not None:
            self.say(self._line(point))
        tell(self.console, "decision", what=f"{point.method} point", value=point.value, limit=point.limit,
             loss=point.loss, ratio=point.ratio, costs=point.costs)  # fmt: skip

    def _line(self, point: Point) -> str:
        speed = f"{point.costs['latency']:.1f} ms by the table, " if self.measures.table else ""
        who = "" if point.method == "program" else f" {point.method}"
        return f"{point.value}{who}: {speed}{point.ratio:.2%} of the parameters removed, {point.loss:.4f} nats"


def _write(
    workspace: Workspace, run: _Sweep, points: list[Point], seconds: Mapping[str, float], command: str | None
) -> None:
    """Write all files of the folder."""
    setting, recipe = run.setting, run.setting.recipe
    record = {
        "format": "multipruner-sweep",
        "version": 1,
        "budget": run.at.budget,
        "values": list(run.at.values),
        "workload": run.measures.workload or None,
        "model": {"name": setting.source.name, "revision": setting.source.revision, "fingerprint": setting.fingerprint},
        "recipe": recipe.model_dump(mode="json"),
        "command": command,
        "environment": dict(run.measures.table.environment) if run.measures.table else None,
        "calibration": {"name": setting.calibration.name, "tokens": setting.calibration.ids.numel(),
                        "hash": setting.calibration.hash},
        "seconds_of_this_process": dict(seconds),
        "dense": run.dense.to_json(),
        "points": [point.to_json() for point in points],
    }  # fmt: skip
    plans = {point.name: setting.plan_of(point.structure) for point in points if point.value is not None}
    drawn = loss_figure([(point.name, point.to_json()) for point in points], run.at.budget, recipe.objective,
                        record["workload"])  # fmt: skip
    files: dict[str, bytes] = {f"plans/{name}.json": plan.to_json().encode() for name, plan in plans.items()}
    files |= {
        "sweep.json": (json.dumps(record, indent=1) + "\n").encode(),
        "sweep.csv": drawn.csv.encode(),
        "sweep.png": drawn.png,
        "structures.png": structures_of(plans, setting.prunable.costs.original).png,
        workspace.measurements_path.name: workspace.measurements_path.read_bytes(),
    }
    write_sweep(workspace.output, files)


def _closing(output: Path, points: SweepPoints) -> str:
    plan = output / "plans" / f"{points.values[-1].replace(' ', '')}.json"
    return f"wrote {output}: sweep.json, sweep.csv, sweep.png, structures.png, plans\nmake one    --plan {plan}"
