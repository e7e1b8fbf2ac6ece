"""What the greedy path reaches under any budget: walked until a structure keeps all limits.

The path itself knows a ratio of the parameters only. It is aimed at a ratio, walked, and aimed further where its end
does not keep the limits yet; losses of one walk serve the next where the objectives remember them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

from multipruner.core.errors import InfeasibleError
from multipruner.core.structure import Anatomy, Structure
from multipruner.jobs.setting import Setting
from multipruner.search import Dimension, Limit, Objective, Problem, Step, replay, sequential_path
from multipruner.search import Progress as SearchProgress

ATTEMPTS = 12
"""Times that a path is aimed at most."""
MARGIN = 1.005
"""By how much the next aim goes beyond the proportion that is missing."""
CostsOf = Callable[[Structure], Mapping[str, float]]
"""structure -> its costs by the names that limits have."""


def problem_to(setting: Setting, ratio: float) -> Problem:
    """Return the path's problem with the recipe's stages, shares and grid, whatever budgets the recipe has."""
    recipe = setting.recipe
    return Problem(setting.prunable.costs, ratio, recipe.stages, recipe.shares, setting.grid, recipe.stop)


def judged_by(blocks: Objective, widths: Objective) -> dict[Dimension, Objective]:
    """Return judge blocks by one objective, channels and heads by another, as the greedy method does."""
    return {"blocks": blocks, "mlp": widths, "heads": widths}


def way(costs: Mapping[str, float], dense: Mapping[str, float], limits: Sequence[Limit]) -> float:
    """Tell how much of the way from dense to the limits a structure has gone: 1 and more where it keeps all of them."""
    shares = [inf]
    for limit in limits:
        cost, missing = costs[limit.name], dense[limit.name] - limit.limit
        if missing > 0:
            gone = (dense[limit.name] - cost) / missing
            # rounding must not say that a limit is kept, or that it is not
            shares.append(max(gone, 1.0) if cost <= limit.limit else min(gone, 1 - 1e-9))
    return min(shares)


def path_within(
    problem: Problem,
    objectives: Mapping[Dimension, Objective],
    limits: Sequence[Limit],
    costs_of: CostsOf,
    on_progress: Callable[[SearchProgress], None] | None = None,
) -> list[Step] | None:
    """Return a path whose end keeps all limits, aimed as near as it is known to need; ``None`` when none that was tried
    does.

    Args:
        problem: the path's; its ratio is the first aim.
        objectives: the loss of each dimension; called again for structures that were scored before.
        limits: what must be kept.
        costs_of: costs of a structure by the limits' names.
        on_progress: called after every candidate.
    """
    full = costs_of(problem.anatomy.dense)
    low, high, aim = 0.0, 1.0, problem.ratio
    for _ in range(ATTEMPTS):
        try:
            steps = sequential_path(replace(problem, ratio=aim), objectives, on_progress=on_progress)
        except InfeasibleError:
            high = aim
        else:
            gone = way(costs_of(replay(problem.anatomy, steps)), full, limits)
            if gone >= 1:
                return steps
            low = aim
            # proportion tells where to aim next; twice as far at most
            aim *= min(2.0, MARGIN / max(gone, 0.1))
        if aim >= high:
            aim = (low + high) / 2
    return None


def along(anatomy: Anatomy, steps: Sequence[Step]) -> Iterator[Structure]:
    """Yield the dense structure, and the one after every step."""
    structure = anatomy.dense
    yield structure
    for step in steps:
        structure = replay(anatomy, [step], structure)
        yield structure


def first_within(
    anatomy: Anatomy, steps: Sequence[Step], limits: Sequence[Limit], costs_of: CostsOf
) -> Structure | None:
    """Return the first structure of a path that keeps all limits."""
    full = costs_of(anatomy.dense)
    return next((structure for structure in along(anatomy, steps) if way(costs_of(structure), full, limits) >= 1), None)
