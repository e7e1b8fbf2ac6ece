"""One pruning run from recipe to folder: model, calibration, search, surgery, evaluation, checkpoint."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from .calibration import CalibrationSet, load_calibration
from .card import model_card
from .errors import InfeasibleError
from .eval import Comparison, Evaluation, compare, evaluate
from .export.checkpoint import save
from .importance import rank
from .modeling import apply_plan
from .objective import CalibrationObjective, Work
from .progress import search_display
from .prunable import Prunable
from .recipe import Recipe
from .search import (
    Dimension,
    Grid,
    Problem,
    Step,
    expected_candidates,
    reachable_ratio,
    replay,
    sequential_path,
    steps_to,
)
from .sources import ResolvedModel, fingerprint, load_dense, resolve
from .structure import PruningPlan, Ranking
from .summary import picture, render, teller
from .workspace import Workspace

PACKAGES = ("multipruner", "torch", "transformers", "lm-eval", "datasets")


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


@dataclass(frozen=True)
class _Setting:
    """What the stages of a run share."""

    recipe: Recipe
    source: ResolvedModel
    prunable: Prunable
    tokenizer: Any
    calibration: CalibrationSet
    ranking: Ranking
    fingerprint: str

    @property
    def problem(self) -> Problem:
        """The search problem that the recipe asks for."""
        recipe = self.recipe
        grid = Grid(recipe.channel_group, recipe.kv_group_step, recipe.partial_groups)
        return Problem(self.prunable.costs, recipe.ratio, recipe.order, recipe.shares, grid, recipe.stop)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the decisions depend on, except the ratio."""
        recipe = self.recipe
        return {
            "model": self.fingerprint,
            "calibration": self.calibration.hash,
            "width_sequences": min(recipe.calibration.width_sequences, len(self.calibration.ids)),
            "batch_size": recipe.calibration.batch_size,
            "order": ",".join(recipe.order),
            "shares": recipe.shares_text(),
            "stop": recipe.stop,
            "channel_group": recipe.channel_group,
            "kv_group_step": recipe.kv_group_step,
            "importance": recipe.importance,
            "dtype": str(self.prunable.head_weight.dtype),
        }


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
        console: where progress and summary go; default: standard error for neither.
        command: the command line, for the record.
        overwrite: give up what another run left in the folder.

    Raises:
        MultiprunerError: see :mod:`multipruner.errors`; nothing half-written is left.
    """
    console = console or Console(quiet=True)
    say = teller(console)
    workspace = Workspace(output)
    workspace.check(overwrite)
    seconds: dict[str, float] = {}
    with _timed(seconds, "load"):
        setting = _prepare(recipe, say)
    with _timed(seconds, "search"):
        steps, work = _search(setting, workspace, console, say, overwrite)
    plan = _plan(setting, steps)
    with _timed(seconds, "surgery"):
        pruned = apply_plan(setting.prunable.model, plan)
    with _timed(seconds, "evaluation"):
        comparison = _evaluate(setting, pruned, say)
    report = _report(setting, plan, steps, work, comparison, seconds, command)
    card = model_card(report, plan)
    save(
        output, pruned, setting.tokenizer, plan=plan, report=report, trajectory=workspace.trajectory_path, card=card,
        replace=True,
    )  # fmt: skip
    workspace.close()
    console.print(render(report, output, comparison.table()))
    return Run(output, plan, report, pruned, setting.tokenizer)


def _prepare(recipe: Recipe, say: Callable[[str], None]) -> _Setting:
    """Load model and calibration, rank the widths, refuse what cannot be reached before any search."""
    source = resolve(recipe, say)
    model, tokenizer = load_dense(source, recipe)
    prunable = Prunable.of(model)
    grid = Grid(recipe.channel_group, recipe.kv_group_step, recipe.partial_groups)
    grid.check(prunable.dense)
    problem = Problem(prunable.costs, recipe.ratio, recipe.order, recipe.shares, grid, recipe.stop)
    reachable = reachable_ratio(problem)
    if reachable < recipe.ratio:
        raise InfeasibleError(
            f"a ratio of {recipe.ratio:g} is out of reach with shares {recipe.shares_text()} and channel groups of "
            f"{recipe.channel_group}: the maximum is about {reachable:.3f}; ask for less or give 'blocks' more",
            nearest=reachable,
        )
    calibration = load_calibration(recipe.calibration, tokenizer, model, say=say)
    ranking = rank(recipe.importance, prunable.layers, prunable.spec, prunable.dense, prunable.head_dim)
    return _Setting(recipe, source, prunable, tokenizer, calibration, ranking, fingerprint(model))


def _objectives(setting: _Setting) -> dict[Dimension, CalibrationObjective]:
    """Blocks are judged on all sequences, widths on the first few: they have many more candidates."""
    spec, calibration = setting.recipe.calibration, setting.calibration

    def objective(sequences: int) -> CalibrationObjective:
        return CalibrationObjective(
            setting.prunable,
            calibration.ids[:sequences],
            ignore_id=calibration.ignore_id,
            batch_size=spec.batch_size,
        )

    blocks, width = objective(len(calibration.ids)), objective(spec.width_sequences)
    return {"blocks": blocks, "mlp": width, "heads": width}


def _search(
    setting: _Setting, workspace: Workspace, console: Console, say: Callable[[str], None], overwrite: bool
) -> tuple[list[Step], Mapping[str, Work]]:
    """Search, or go on searching, or find that an earlier search already covers the ratio."""
    problem = setting.problem
    trajectory, journal = workspace.open(setting.identity, problem.ratio, overwrite)
    if trajectory is not None and trajectory.finished:
        say(f"the finished search to {trajectory.ratio:.0%} in {workspace.output} covers this ratio")
        steps = list(trajectory.steps)
        return (steps if trajectory.ratio == problem.ratio else steps[: steps_to(steps, problem.ratio)]), {}
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
    return steps, {"blocks": objectives["blocks"].work, "widths": objectives["mlp"].work}


def _plan(setting: _Setting, steps: list[Step]) -> PruningPlan:
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


def _evaluate(setting: _Setting, pruned: Any, say: Callable[[str], None]) -> Comparison:
    """Dense and pruned model on the same text and tasks."""
    recipe, tokenizer = setting.recipe, setting.tokenizer
    held_out = load_calibration(
        recipe.calibration, tokenizer, setting.prunable.model, split="heldout", say=lambda text: None
    )

    def judge(model: Any, say: Callable[[str], None]) -> Evaluation:
        name = f"held-out {held_out.name}"
        return evaluate(model, tokenizer, recipe.evaluation, fallback_ids=held_out.ids, fallback_name=name, say=say)

    return compare(judge(setting.prunable.model, say), judge(pruned, lambda text: None))


def _report(
    setting: _Setting,
    plan: PruningPlan,
    steps: list[Step],
    work: Mapping[str, Work],
    comparison: Comparison,
    seconds: dict[str, float],
    command: str | None,
) -> dict[str, Any]:
    """What ``report.json`` holds."""
    costs, structure, dense = setting.prunable.costs, plan.structure, plan.dense

    def pair(count: Callable[..., int]) -> dict[str, int]:
        return {"before": count(dense), "after": count(structure)}

    return {
        "format": "multipruner-report",
        "version": 1,
        "model": {"name": setting.source.name, "revision": setting.source.revision,
                  "description": setting.source.description, "fingerprint": setting.fingerprint},
        "recipe": setting.recipe.model_dump(mode="json"),
        "command": command,
        "ratio": costs.ratio(structure),
        "backbone_ratio": costs.backbone_ratio(structure),
        "parameters": pair(costs.parameters),
        "costs": {
            "weight_bytes": pair(costs.weight_bytes),
            "kv_bytes_per_token": pair(costs.kv_bytes_per_token),
            "flops_per_token": pair(costs.flops_per_token),
        },
        "structure": structure.to_json(),
        "picture": picture(structure, dense),
        "calibration": {"name": setting.calibration.name, "hash": setting.calibration.hash,
                        "tokens": setting.calibration.ids.numel(), "sequences": len(setting.calibration.ids)},
        "search": {
            "steps": len(steps),
            "loss": steps[-1].loss if steps else None,
            "work": {name: {"evaluations": w.evaluations, "token_layers": w.token_layers,
                            "head_tokens": w.head_tokens} for name, w in work.items()},
        },
        **comparison.to_json(),
        "tasks_markdown": comparison.markdown(),
        "seconds": seconds,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "platform": f"{sys.platform} {platform.machine()}",
    }  # fmt: skip
