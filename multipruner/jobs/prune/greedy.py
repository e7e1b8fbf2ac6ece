"""The paper's greedy path as a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from multipruner.console.events import tell
from multipruner.console.progress import search_display, waiting_display
from multipruner.console.say import Say
from multipruner.core.errors import InfeasibleError
from multipruner.core.structure import Anatomy
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.spread_objective import SpreadObjective
from multipruner.jobs.remembered import objective_of
from multipruner.jobs.setting import Found, Setting
from multipruner.jobs.workspace import Workspace
from multipruner.search import (
    Dimension,
    Objective,
    Problem,
    Shortlisted,
    Step,
    expected_candidates,
    replay,
    sequential_path,
    steps_to,
)
from multipruner.search.step import Trajectory

_Judge = CalibrationObjective | SpreadObjective


def _path_objectives(setting: Setting) -> Mapping[Dimension, _Judge]:
    """Return blocks are judged on all sequences, widths on the first few: they have many more candidates."""
    blocks = objective_of(setting, len(setting.calibration.ids))
    widths = objective_of(setting, setting.recipe.calibration.width_sequences * setting.calibration.each)
    if setting.team.size == 1:
        return {"blocks": blocks, "mlp": widths, "heads": widths}
    spread = SpreadObjective(setting.team, "widths", widths)
    return {"blocks": SpreadObjective(setting.team, "blocks", blocks), "mlp": spread, "heads": spread}


def _judges(
    objectives: Mapping[Dimension, _Judge], shortlist: int | None, done: Sequence[Step], anatomy: Anatomy
) -> Mapping[Dimension, Objective]:
    """Return what the path asks: the objectives, or what measures few of a step's candidates by them, and knows what
    was measured in the steps that are done."""
    if shortlist is None:
        return objectives
    ends = [replay(anatomy, done[:number]) for number in range(len(done) + 1)]
    steps = list(zip(done, ends, ends[1:], strict=False))
    made = {
        id(one): Shortlisted(one, shortlist, [step for step in steps if objectives[step[0].stage] is one])
        for one in objectives.values()
    }
    return {dimension: made[id(one)] for dimension, one in objectives.items()}


def lend_a_hand(setting: Setting) -> None:
    """Score the candidates of rank 0 in another process of the job, until it says stop."""
    with setting.prunable.in_order(setting.ranking, setting.search_repair):
        _path_objectives(setting)
        setting.team.serve()


def greedy(setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool) -> Found:
    """Walk the paper's path; a smaller ratio of a finished one is cut from it."""
    problem = setting.problem
    trajectory, journal = workspace.open(setting.identity, problem.ratio, overwrite)
    if trajectory is not None and trajectory.finished:
        same = trajectory.ratio == problem.ratio
        own = "" if same else " (its shares are of that ratio; a new --output has this one's)"
        say(f"the finished search to {100 * trajectory.ratio:g}% covers this ratio: nothing to search{own}")
        steps = _cut(trajectory, problem)
        return Found(replay(problem.anatomy, steps), steps[-1].loss, trajectory.ratio, {}, steps)
    done = trajectory.steps if trajectory is not None else ()
    if done:
        say(f"going on after step {len(done)} of an interrupted run")
    with setting.prunable.in_order(setting.ranking, setting.search_repair):
        with waiting_display(console, "dense model"):
            objectives = _path_objectives(setting)
        counts = expected_candidates(problem, setting.recipe.shortlist)
        expected: dict[Dimension, float] = {name: n * objectives[name].tokens for name, n in counts.items()}
        with search_display(console, expected, problem.ratio) as display:

            def taken(step: Step) -> None:
                journal.add(step)
                tell(console, "decision", what="step", dimension=step.stage, kind=step.kind, layer=step.layer,
                     ratio=step.ratio, loss=step.loss)  # fmt: skip

            judges = _judges(objectives, setting.recipe.shortlist, done, problem.anatomy)
            steps = sequential_path(problem, judges, done=done, on_step=taken, on_progress=display)
    journal.finish()
    work = {"blocks": objectives["blocks"].work, "widths": objectives["mlp"].work}
    return Found(replay(problem.anatomy, steps), steps[-1].loss, problem.ratio, work, steps)


def _cut(trajectory: Trajectory, problem: Problem) -> list[Step]:
    """Return the part of a finished path that leads to a ratio."""
    steps = list(trajectory.steps)
    if trajectory.ratio != problem.ratio:
        steps = steps[: steps_to(steps, problem.ratio, problem.stop)]
    if not steps:
        least = trajectory.steps[0].ratio
        raise InfeasibleError(f"the first step removes {least:.5f}; ask for a ratio of at least that", nearest=least)
    return steps
