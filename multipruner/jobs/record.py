"""The record of a run, as ``report.json`` holds it, and how long its stages took."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from multipruner.config.precedence import from_file
from multipruner.config.recipe import Recipe
from multipruner.console.events import events_of
from multipruner.core import __version__
from multipruner.core.costs import COSTS, Costs, Measures
from multipruner.core.errors import OutputError
from multipruner.core.latency_table import USUAL
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Structure, picture
from multipruner.eval import Comparison
from multipruner.latency.environment import environment_of
from multipruner.latency.timing import time_side_by_side
from multipruner.sources.resolve import ResolvedModel

from .setting import Found, Setting

PACKAGES = ("torch", "transformers", "lm-eval", "datasets")


def _versions() -> dict[str, str]:
    """Return the versions of this program, of Python and of what it computes with."""
    own = {"multipruner": __version__, "python": platform.python_version()}
    return {**own, **{name: version(name) for name in PACKAGES}}


def described(
    source: ResolvedModel, recipe: Recipe, costs: Costs, plan: PruningPlan, fingerprint: str | None, command: str | None
) -> dict[str, Any]:
    """Return what ``report.json`` holds of any model that a plan led to: what it is of, what it costs, how it was made.

    Args:
        source: the dense model.
        recipe: what was asked.
        costs: of the dense model's structures.
        plan: what stayed.
        fingerprint: of the dense weights, where they are known to be those.
        command: the command line, if any.
    """
    structure, dense = plan.structure, plan.dense

    def pair(count: Callable[[Structure], float]) -> dict[str, float]:
        return {"before": count(dense), "after": count(structure)}

    return {
        "format": "multipruner-report",
        "version": 1,
        "model": {"name": source.name, "revision": source.revision, "description": source.description,
                  "fingerprint": fingerprint},
        "recipe": recipe.model_dump(mode="json"),
        "command": command,
        "ratio": costs.ratio(structure),
        "backbone_ratio": costs.backbone_ratio(structure),
        "parameters": pair(costs.parameters),
        "costs": {
            cost.key: pair(partial(cost.of, Measures(costs)))
            for cost in COSTS.values()
            if cost.name != "parameters" and not cost.needs_table
        },
        "structure": structure.to_json(),
        "picture": picture(structure, plan.anatomy),
        "versions": _versions(),
    }  # fmt: skip


def record(
    setting: Setting,
    plan: PruningPlan,
    path: Found,
    comparison: Comparison,
    seconds: dict[str, float],
    command: str | None,
) -> dict[str, Any]:
    """Return what ``report.json`` holds."""
    costs = setting.prunable.costs.original
    return {
        **described(setting.source, setting.recipe, costs, plan, setting.fingerprint, command),
        "precision": setting.precision.to_json(),
        "calibration": {"name": setting.calibration.name, "hash": setting.calibration.hash,
                        "tokens": setting.calibration.tokens, "sequences": len(setting.calibration.ids),
                        **setting.texts},
        "search": {
            "method": path.by or ("greedy" if setting.recipe.greedy else "program"),
            "objective": setting.recipe.objective,
            "loss": path.loss,
            "loss_before_repair_of_all": path.loss_before_outputs,
            "last_norm_refitted": path.gain is not None,
            "searched_to": path.searched_to,
            "steps": len(path.steps),
            "seconds_of_all_steps": sum(step.seconds for step in path.steps),
            "rounds": [round_.to_json() for round_ in path.rounds],
            **({"hidden_sizes": dict(path.hidden_sizes)} if path.hidden_sizes else {}),
            **({"hidden_sizes_predicted": dict(path.predicted_sizes)} if path.predicted_sizes else {}),
            "moments_tokens": setting.statistics.tokens if setting.statistics is not None else 0,
            "work_of_this_process": {name: asdict(work) for name, work in path.work.items()},
        },
        **comparison.to_json(),
        "tasks_markdown": comparison.markdown(),
        "seconds": seconds,
        "platform": f"{sys.platform} {platform.machine()}",
    }  # fmt: skip


def result_of(report: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what a program that waits for a run wants to know of its report."""
    perplexity = {name: {who: row[who] for who in ("dense", "pruned")} for name, row in report["perplexity"].items()}
    kept = ("ratio", "backbone_ratio", "parameters", "seconds")
    return {"folder": str(folder), **{key: report[key] for key in kept}, "perplexity": perplexity}


def place_of(model: str, output: Path) -> dict[str, str]:
    """Tell where a model's folder or file lies as seen from a run's folder, which holds wherever a command is given.

    Empty for a model that is neither.
    """
    path = Path(model).expanduser()
    if not path.exists():
        return {}
    try:
        return {"path_from_here": Path(os.path.relpath(path.resolve(), output.resolve())).as_posix()}
    except ValueError:  # on another drive
        return {}


def moved(about: Mapping[str, Any], source: Path, output: Path) -> dict[str, Any]:
    """Return what a report in one folder says about its model, for a report in another."""
    seen = about.get("path_from_here")
    return {**about, **(place_of(os.path.normpath(source.resolve() / seen), output) if isinstance(seen, str) else {})}


def recorded_recipe(report: Mapping[str, Any], folder: Path, *settings: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a run, its dense model found as seen from the run's folder.

    Raises:
        OutputError: when the report holds no recipe.
        ConfigError: when the recipe cannot be read.
    """
    model, recipe = report.get("model"), report.get("recipe")
    if not isinstance(model, Mapping) or not isinstance(recipe, Mapping):
        raise OutputError(f"{folder}/report.json is damaged: it names no model and no recipe; make the run again")
    changes: dict[str, Any] = {"revision": model["revision"]} if model.get("revision") else {}
    seen = model.get("path_from_here")
    if isinstance(seen, str) and (place := Path(os.path.normpath(folder.resolve() / seen))).exists():
        changes["model"] = str(place)
    return Recipe.build(from_file(recipe), changes, *settings)


def latency_record(setting: Setting, plan: PruningPlan, pruned: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """Return predicted milliseconds, and those of both models timed in alternation, where transformers run them."""
    assert setting.latency is not None, "asked for with a table only"
    table, workload = setting.latency
    row = {
        "predicted_ms": table.milliseconds(plan.structure, plan.anatomy, workload),
        "predicted_dense_ms": table.milliseconds(plan.dense, plan.anatomy, workload),
    }
    predicted = row["predicted_ms"] / row["predicted_dense_ms"]
    if table.runtime != USUAL:
        say(f"{workload}: the table of {table.runtime} predicts {row['predicted_ms']:.1f} ms, {predicted:.3f}x, there")
        return {"runtime": table.runtime, "outtype": table.environment["dtype"], "phases": {workload: row}}
    dense = setting.prunable.original.model
    with setting.held.released():  # what will be served is timed
        if warning := table.warning(environment_of(dense)):
            say(warning)
        measured = time_side_by_side({"dense": dense, "pruned": pruned}, table.row(workload).workload)
    row |= {"measured_ms": measured["pruned"].median_ms, "dense_ms": measured["dense"].median_ms}
    real = row["measured_ms"] / row["dense_ms"]
    say(
        f"{workload}: {row['dense_ms']:.1f} -> {row['measured_ms']:.1f} ms, {real:.3f}x; the table predicted "
        f"{row['predicted_ms']:.1f} ms, {predicted:.3f}x"
    )
    return {"phases": {workload: row}}


class Clock(dict[str, float]):
    """Seconds by stage; a stage that begins or ends is an event of the console's log.

    Args:
        console: of the run.
    """

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.log = events_of(console)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the seconds that the body takes to those of a stage."""
    log, began, whole = seconds.log if isinstance(seconds, Clock) else None, time.perf_counter(), False
    if log is not None:
        log.began(name)
    try:
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
        whole = True
    finally:
        if log is not None:
            log.ended(name, time.perf_counter() - began, whole=whole)
