"""The paper's path (arXiv 2501.09949, section 3): one dimension after another, one greedy step after another.

There is one loop for all three dimensions. Every step removes what hurts the calibration loss least, and a
dimension ends at its cumulative share of the target ratio. The path is nested: any smaller ratio is one of its
prefixes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, inf
from typing import Literal

from multipruner.core.axes import Dimension
from multipruner.core.costs import Costs
from multipruner.core.errors import InfeasibleError
from multipruner.core.objective import Choice, Objective, best_two
from multipruner.core.structure import Anatomy, Structure
from multipruner.search.grid import Grid, Move, candidates
from multipruner.search.step import Step, replay


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked of a path.

    Attributes:
        costs: what structures cost, and the dense one.
        ratio: target, removed / all parameters.
        order: the dimensions in the order in which they are pruned.
        shares: of the target, per dimension; any scale.
        grid: how finely widths are cut.
        stop: ``"nearest"``: a dimension ends at the step nearest to its cumulative share; ``"reach"``: at the first
            step that reaches it (the official code, which therefore overshoots every time).
    """

    costs: Costs
    ratio: float
    order: tuple[Dimension, ...]
    shares: Mapping[Dimension, float]
    grid: Grid
    stop: Literal["nearest", "reach"] = "nearest"

    @property
    def anatomy(self) -> Anatomy:
        """The dense model's blocks."""
        return self.costs.anatomy

    def moves(self, dimension: Dimension, structure: Structure) -> list[Move]:
        """Return what one step of a dimension can do."""
        return candidates(dimension, structure, self.anatomy, self.grid)

    def stages(self) -> list[tuple[Dimension, float]]:
        """Return the dimensions that have a share, each with the cumulative ratio at which it ends."""
        total, running, stages = sum(self.shares.values()), 0.0, []
        for dimension in self.order:
            running += self.shares[dimension]
            if self.shares[dimension] > 0:
                stages.append((dimension, self.ratio * running / total))
        return stages


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a search is, for a progress display."""

    stage: Dimension
    step: int
    ratio: float
    stage_start: float
    stage_end: float
    loss: float | None
    candidate: int
    candidates: int


def sequential_path(
    problem: Problem,
    objectives: Mapping[Dimension, Objective],
    *,
    done: Sequence[Step] = (),
    on_step: Callable[[Step], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Step]:
    """Prune one dimension after another until the target ratio is reached.

    Args:
        problem: what is asked.
        objectives: the loss that each dimension is judged by.
        done: steps of an interrupted run of the same problem, not to be searched again.
        on_step: called after every new step.
        on_progress: called after every candidate.

    Returns:
        All steps, the given ones first.

    Raises:
        ConfigError: when the grid does not divide the model's sizes.
        InfeasibleError: when every dimension is exhausted before the ratio is reached.
    """
    problem.grid.check(problem.anatomy)
    steps = list(done)
    structure, pending, start = problem.anatomy.dense, list(done), 0.0
    for stage, end in problem.stages():
        while pending and pending[0].stage == stage:
            structure = replay(problem.anatomy, [pending.pop(0)], structure)
        if pending:  # a later dimension had begun already
            start = problem.costs.ratio(structure)
            continue
        objective = objectives[stage]
        objective.commit(structure)
        position = _Position(stage, start, end, on_progress)
        while step := _next_step(problem, position, structure, objective, steps):
            structure = replay(problem.anatomy, [step], structure)
            objective.commit(structure)
            steps.append(step)
            if on_step is not None:
                on_step(step)
        start = problem.costs.ratio(structure)
    _check_reached(problem, structure, steps)
    return steps


@dataclass(frozen=True, slots=True)
class _Position:
    stage: Dimension
    start: float
    end: float
    on_progress: Callable[[Progress], None] | None


def _next_step(
    problem: Problem, position: _Position, structure: Structure, objective: Objective, steps: Sequence[Step]
) -> Step | None:
    """Return the best removal of this dimension, or ``None`` when the dimension has ended."""
    costs, here = problem.costs, problem.costs.ratio(structure)
    moves = {structure.replace(*move): move[0] for move in problem.moves(position.stage, structure)}
    if here >= position.end or not moves:
        return None
    if problem.stop == "nearest" and all(_overshoots(costs.ratio(s), here, position.end) for s in moves):
        return None
    began = time.perf_counter()

    def tell(candidate: int, of: int) -> None:
        if position.on_progress is not None:
            loss = steps[-1].loss if steps else None
            report = Progress(position.stage, len(steps) + 1, here, position.start, position.end, loss, candidate, of)
            position.on_progress(report)

    choice = objective.argmin(list(moves), tell)
    step = _as_step(position.stage, moves, choice, costs, time.perf_counter() - began)
    if problem.stop == "nearest" and _overshoots(step.ratio, here, position.end):
        return None
    return step


def _overshoots(after: float, before: float, end: float) -> bool:
    """Tell whether not taking a step ends nearer to the target than taking it."""
    return after > end and after - end >= end - before


def _as_step(stage: Dimension, moves: Mapping[Structure, int], choice: Choice, costs: Costs, seconds: float) -> Step:
    def place(structure: Structure) -> tuple[str, int]:
        there = costs.anatomy[moves[structure]]
        return there.kind, there.layer

    kind, layer = place(choice.best)
    return Step(
        stage=stage,
        kind=kind,
        layer=layer,
        size=choice.best[moves[choice.best]],
        loss=choice.loss,
        ratio=costs.ratio(choice.best),
        backbone_ratio=costs.backbone_ratio(choice.best),
        candidates=len(moves),
        runner_up=place(choice.runner_up) if choice.runner_up is not None else None,
        runner_up_loss=choice.runner_up_loss if choice.runner_up is not None else None,
        measured=choice.measured,
        seconds=seconds,
    )


def _check_reached(problem: Problem, structure: Structure, steps: Sequence[Step]) -> None:
    """Refuse an end before the ratio, and name what can be reached: nothing could go, or a dimension is exhausted."""
    here = problem.costs.ratio(structure)
    final_dimension, end = problem.stages()[-1]
    if not steps:
        raise too_small(problem)
    last = here - (steps[-2].ratio if len(steps) > 1 else 0.0)
    if end - here > last / 2 and not problem.moves(final_dimension, structure):
        raise InfeasibleError(
            f"a ratio of {problem.ratio:g} is out of reach: every part that shares {_shares(problem)} may remove is "
            f"gone at {floor(here * 1e4) / 1e4:g}; ask for at most that, or give the dimension 'blocks' a larger share",
            nearest=here,
        )


def too_small(problem: Problem) -> InfeasibleError:
    """Return the error for a ratio to which taking no step at all is nearest."""
    costs = problem.costs
    dense = problem.anatomy.dense
    moves = [dense.replace(*move) for dimension, _ in problem.stages() for move in problem.moves(dimension, dense)]
    least = min(map(costs.ratio, moves), default=0.0)
    return InfeasibleError(
        f"a ratio of {problem.ratio:g} is nearer to nothing than to the smallest step, {least:.5f}: ask for at least "
        "that, or give smaller groups",
        nearest=least,
    )


def _shares(problem: Problem) -> str:
    return ", ".join(f"{dimension} {problem.shares[dimension]:g}" for dimension in problem.order)


class Shortlisted:
    """An objective that measures few candidates of a step: those that added least to the loss when last measured.

    What a removal adds changes little from one step to the next, and mostly grows, which lazy greedy algorithms live on
    (Minoux 1978). The first step of a dimension measures all candidates, every other the ``count`` that looked best and
    the block that was cut last. Decisions may differ from those of all losses.

    Args:
        objective: measures.
        count: candidates of a step, 1 or more.
        done: steps of an interrupted run that were measured so, each with the structures before and after it.
    """

    def __init__(
        self, objective: Objective, count: int, done: Iterable[tuple[Step, Structure, Structure]] = ()
    ) -> None:
        self.objective, self.count = objective, count
        self._adds: dict[int, float] = {}
        self._losses: dict[Structure, float] = {}
        self._base: Structure | None = None
        for step, before, after in done:
            self._adds.update(step.measured)
            self._losses[after] = step.loss
            self._cut(before, after)

    def __call__(self, structure: Structure) -> float:
        """Return the loss of one structure in nats."""
        return self.objective(structure)

    def commit(self, structure: Structure) -> None:
        """Make a structure the base that the next candidates are compared with; what was cut is to be measured anew."""
        self._cut(self._base or structure, structure)
        self.objective.commit(structure)

    def _cut(self, before: Structure, after: Structure) -> None:
        self._base = after
        for block in _changed(after, before):
            self._adds.pop(block, None)

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        """Return the best and the second best of those that are measured.

        Raises:
            NumericsError: when none has a finite loss.
        """
        base = self._base
        assert base is not None, "commit comes first"
        if base not in self._losses:
            self._losses[base] = self.objective(base)
        blocks = [next(_changed(structure, base)) for structure in structures]
        known = sorted((self._adds[block], place) for place, block in enumerate(blocks) if block in self._adds)
        few = {place for _, place in known[: self.count]}
        chosen = [place for place, block in enumerate(blocks) if place in few or block not in self._adds]
        losses = [inf] * len(structures)
        for number, place in enumerate(chosen, 1):
            losses[place] = self.objective(structures[place])
            if progress is not None:
                progress(number, len(chosen))
        measured = tuple((blocks[place], losses[place] - self._losses[base]) for place in chosen)
        self._adds.update(measured)
        choice = replace(best_two(structures, losses), measured=measured)
        self._losses[choice.best] = choice.loss
        return choice


def _changed(structure: Structure, base: Structure) -> Iterator[int]:
    """Yield the blocks in which two structures differ."""
    return (block for block, (size, there) in enumerate(zip(structure, base, strict=True)) if size != there)
