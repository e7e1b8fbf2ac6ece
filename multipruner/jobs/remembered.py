"""How a structure is found: the paper's sequential path, or tables and the exact program."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import floor, inf
from pathlib import Path

from rich.console import Console
from torch import Tensor

from multipruner.config.recipe import Recipe
from multipruner.console.progress import counting_display, search_display
from multipruner.core.errors import InfeasibleError, NumericsError
from multipruner.core.structure import Choice, Structure
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Outputs, Prunable
from multipruner.engine.spread_objective import SpreadObjective
from multipruner.repair.columns import check_compensation
from multipruner.repair.final_norm import GainFit
from multipruner.repair.stream import accumulated
from multipruner.search import (
    DIMENSIONS,
    Dimension,
    Memo,
    Problem,
    Step,
    allocate,
    expected_candidates,
    reachable_ratio,
    replay,
    sequential_path,
    steps_to,
    too_small,
)
from multipruner.search.allocation import check_feasible

from .setting import Found, Setting, problem_of, task_of
from .trajectory import Trajectory
from .workspace import Workspace

Say = Callable[[str], None]


def check_reachable(recipe: Recipe, prunable: Prunable) -> None:
    """Refuse what cannot be reached, before anything is measured.

    Raises:
        ConfigError: when the grid or the repair does not fit the model.
        InfeasibleError: naming the nearest budget that can be kept.
    """
    check_compensation(recipe.compensation, prunable)
    if recipe.strategy == "milp":
        task = task_of(recipe, prunable)
        task.grid.check(task.dense)
        check_feasible(task)
    else:
        _check_path(problem_of(recipe, prunable))


def find(setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool) -> Found:
    """Search as the recipe says, go on with an interrupted search, or use a finished one that covers the ratio."""
    return STRATEGIES[setting.recipe.strategy](setting, workspace, console, say, overwrite)


def _check_path(problem: Problem) -> None:
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


def objective_of(setting: Setting, sequences: int) -> CalibrationObjective:
    """The recipe's loss on the first sequences of the calibration text (inside :meth:`Prunable.in_order`)."""
    return CalibrationObjective(
        setting.prunable,
        setting.calibration.head(sequences).ids,
        ignore_id=setting.calibration.ignore_id,
        batch_size=setting.recipe.calibration.batch_size,
        loss=setting.recipe.objective,
    )


def _path_objectives(setting: Setting) -> Mapping[Dimension, CalibrationObjective | SpreadObjective]:
    """Blocks are judged on all sequences, widths on the first few: they have many more candidates."""
    blocks = objective_of(setting, len(setting.calibration.ids))
    widths = objective_of(setting, setting.recipe.calibration.width_sequences)
    if setting.team.size == 1:
        return {"blocks": blocks, "mlp": widths, "heads": widths}
    spread = SpreadObjective(setting.team, "widths", widths)
    return {"blocks": SpreadObjective(setting.team, "blocks", blocks), "mlp": spread, "heads": spread}


def lend_a_hand(setting: Setting) -> None:
    """Score the candidates of rank 0 in another process of the job, until it says stop."""
    with setting.prunable.in_order(setting.ranking, setting.search_repair):
        _path_objectives(setting)
        setting.team.serve()


def _sequential(setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool) -> Found:
    """The paper's path; a smaller ratio of a finished one is cut from it."""
    problem = setting.problem
    trajectory, journal = workspace.open(setting.identity, problem.ratio, overwrite)
    if trajectory is not None and trajectory.finished:
        same = trajectory.ratio == problem.ratio
        own = "" if same else " (its shares are of that ratio; a new --output has this one's)"
        say(f"the finished search to {100 * trajectory.ratio:g}% covers this ratio: nothing to search{own}")
        steps = _cut(trajectory, problem)
        return Found(replay(problem.costs.dense, steps), steps[-1].loss, trajectory.ratio, {}, steps)
    done = trajectory.steps if trajectory is not None else ()
    if done:
        say(f"going on after step {len(done)} of an interrupted run")
    with setting.prunable.in_order(setting.ranking, setting.search_repair):
        objectives = _path_objectives(setting)
        counts = expected_candidates(problem)
        expected: dict[Dimension, float] = {name: n * objectives[name].tokens for name, n in counts.items()}
        with search_display(console, expected, problem.ratio) as display:
            steps = sequential_path(problem, objectives, done=done, on_step=journal.add, on_progress=display)
    journal.finish()
    work = {"blocks": objectives["blocks"].work, "widths": objectives["mlp"].work}
    return Found(replay(problem.costs.dense, steps), steps[-1].loss, problem.ratio, work, steps)


def _cut(trajectory: Trajectory, problem: Problem) -> list[Step]:
    """The part of a finished path that leads to a ratio."""
    steps = list(trajectory.steps)
    if trajectory.ratio != problem.ratio:
        steps = steps[: steps_to(steps, problem.ratio, problem.stop)]
    if not steps:
        least = trajectory.steps[0].ratio
        raise InfeasibleError(f"the first step removes {least:.5f}; ask for a ratio of at least that", nearest=least)
    return steps


def _loss(objective: CalibrationObjective, structure: Structure) -> float:
    """Infinity where the loss is not finite: such a candidate is the worst, and no reason to end the search."""
    try:
        return objective(structure)
    except NumericsError:
        return inf


class Remembered:
    """An objective whose losses are on disk: what was measured once is never measured again.

    Args:
        objective: measures.
        memo: remembers.
    """

    def __init__(self, objective: CalibrationObjective, memo: Memo) -> None:
        self.objective, self.memo, self._base = objective, memo, objective.base

    def __call__(self, structure: Structure) -> float:
        """The loss of one structure in nats; infinity where it is not finite."""
        key = structure.to_json()
        known = self.memo.get(key, 0)
        if known is None:
            if self.objective.base != self._base:
                self.objective.commit(self._base)
            known = (_loss(self.objective, structure),)
            self.memo.add([(key, 0, known)])
        return known[0]

    def commit(self, structure: Structure) -> None:
        """The structure that the next ones differ little from; its states are computed when one is measured."""
        self._base = structure

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """The best and the second best of several structures."""
        losses = [self(structure) for structure in structures]
        first, *rest = sorted(range(len(losses)), key=lambda index: (losses[index], index))
        if losses[first] == inf:
            raise NumericsError("no candidate has a finite loss; try --dtype float32 or bfloat16")
        if not rest:
            return Choice(structures[first], losses[first])
        return Choice(structures[first], losses[first], structures[rest[0]], losses[rest[0]])


def remembered(setting: Setting, path: Path, sequences: int | None = None) -> Remembered:
    """The recipe's loss on the first sequences of the calibration text (``None``: on all), kept in a file."""
    count, part = len(setting.calibration.ids), {}
    if sequences is not None and sequences < count:
        count, part = sequences, {"sequences": sequences}
    space = hashlib.sha256(json.dumps(setting.identity | part, sort_keys=True).encode()).hexdigest()
    return Remembered(objective_of(setting, count), Memo(path, space))


def rough_of(setting: Setting, path: Path) -> Remembered | None:
    """What measures the first tables of the program, where that is less text than all of it."""
    few = setting.recipe.calibration.width_sequences
    return remembered(setting, path, few) if few < len(setting.calibration.ids) else None


def _milp(setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool) -> Found:
    """Tables and the exact program; losses measured for one budget serve every other."""
    path = workspace.open_measurements(setting.identity, overwrite)
    with setting.prunable.in_order(setting.ranking, setting.search_repair):
        losses, rough = remembered(setting, path), rough_of(setting, path)
        known = len(losses.memo) + (len(rough.memo) if rough is not None else 0)
        if known:
            say(f"{known} losses were measured before and are not measured again")
        with counting_display(console) as display:
            result = allocate(setting.task, losses, display, sketch=rough)
    for round_ in result.rounds:
        say(
            f"round {round_.number}: predicted {round_.predicted:.4f}, measured {round_.loss:.4f} nats"
            + ("" if round_.accepted else " (not better)")
        )
    work = {"structures": losses.objective.work}
    if rough is not None:
        work["first tables"] = rough.objective.work
    reached = setting.prunable.costs.ratio(result.structure)
    return Found(result.structure, result.loss, reached, work, rounds=result.rounds)


def refitted(
    setting: Setting, structure: Structure, progress: Callable[[int, int], None]
) -> tuple[Outputs, Tensor | None]:
    """All output projections refitted to what has added up, and the gain of the last norm to what is left of it, as the
    recipe says (inside :meth:`Prunable.in_order`)."""
    assert setting.statistics_ids is not None
    recipe, ids = setting.recipe, setting.statistics_ids
    ridge = None if recipe.accumulate_ridge == "auto" else recipe.accumulate_ridge
    fit = GainFit(setting.prunable, ids.numel(), recipe.calibration.seed) if recipe.final_norm == "refit" else None
    outputs = accumulated(
        setting.prunable, structure, ids, share=recipe.accumulate, ridge=ridge, progress=progress, ends=fit and fit.see
    )
    return outputs, fit and fit.solve()


NOT_TAKEN = " (no better: not taken)"


def repair_all(setting: Setting, found: Found, say: Say, progress: Callable[[int, int], None]) -> Found:
    """Refit all output projections to what has added up, if that lowers the loss on text it was not fitted to; then the
    gain of the last norm, if that lowers it further."""
    prunable = setting.prunable
    with prunable.in_order(setting.ranking, setting.repair):
        outputs, gain = refitted(setting, found.structure, progress)
        objective = objective_of(setting, len(setting.calibration.ids))
        before = objective(found.structure)
        with prunable.with_outputs(outputs):
            after = _loss(objective, found.structure)
        with prunable.with_outputs(outputs, gain):
            last = _loss(objective, found.structure) if gain is not None else after
    say(f"repair of all blocks: {before:.4f} -> {after:.4f} nats" + ("" if after < before else NOT_TAKEN))
    if after >= before:
        return replace(found, loss=before)  # the search may have scored without the repair that is kept
    if gain is not None:
        say(f"gain of the last norm: {after:.4f} -> {last:.4f} nats" + ("" if last < after else NOT_TAKEN))
    gain, loss = (gain, last) if last < after else (None, after)
    return replace(found, loss=loss, outputs=outputs, gain=gain, loss_before_outputs=before)


def scored_with_repair(setting: Setting, found: Found) -> Found:
    """The loss of what a search without repairs found, with the repair that it gets at the end."""
    with setting.prunable.in_order(setting.ranking, setting.repair):
        loss = objective_of(setting, len(setting.calibration.ids))(found.structure)
    return replace(found, loss=loss, loss_before_outputs=found.loss)


STRATEGIES: dict[str, Callable[[Setting, Workspace, Console, Say, bool], Found]] = {
    "sequential": _sequential,
    "milp": _milp,
}
