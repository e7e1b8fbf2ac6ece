"""The greedy path of a schedule, with every loss of it on disk: paths share their beginnings."""

from __future__ import annotations

from multipruner.core.structure import Structure
from multipruner.jobs.setting import Setting
from multipruner.search import Dimension, Objective, Problem, Step, replay, sequential_path


def walk(setting: Setting, problem: Problem, blocks: Objective, widths: Objective) -> tuple[Structure, list[Step]]:
    """Return the structure that a greedy path leads to, and its steps.

    Args:
        setting: of the model (inside :meth:`~multipruner.engine.prunable.Prunable.in_order`).
        problem: order, shares, ratio, grid.
        blocks, widths: the losses that whole blocks, and channels and heads, are judged by.

    Raises:
        InfeasibleError: when these shares do not reach the ratio.
    """
    objectives: dict[Dimension, Objective] = {"blocks": blocks, "mlp": widths, "heads": widths}
    steps = sequential_path(problem, objectives)
    return replay(setting.prunable.anatomy, steps), steps
