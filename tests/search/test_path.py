"""The search against toy objectives: no torch, no model, microseconds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.core.structure import GONE, Structure
from multipruner.search import (
    DIMENSIONS,
    Dimension,
    Grid,
    Problem,
    Shortlisted,
    Step,
    candidates,
    expected_candidates,
    reachable_ratio,
    replay,
    sequential_path,
    steps_to,
)
from tests.support.layers import anatomy_of, layers_of, structure_of
from tests.support.toys import ANATOMY, COSTS, DENSE, Additive, problem


def run(given_problem: Problem, objective: Additive | None = None, **keywords: object) -> list[Step]:
    objective = objective or Additive()
    return sequential_path(given_problem, dict.fromkeys(DIMENSIONS, objective), **keywords)  # type: ignore[arg-type]


def after(dimension: Dimension, structure: Structure, grid: Grid) -> list[Structure]:
    """What one step of a dimension can leave."""
    return [structure.replace(*move) for move in candidates(dimension, structure, ANATOMY, grid)]


FINE = Grid({"channels": 8, "kv_groups": 1})
orders = st.permutations(DIMENSIONS).map(tuple)
shares = st.fixed_dictionaries({name: st.integers(0, 10) for name in DIMENSIONS}).filter(lambda s: s["blocks"] > 0)


@settings(max_examples=80)
@given(orders, shares, st.floats(0.05, 0.5), st.integers(1, 50))
def test_every_step_is_the_best_of_its_dimension(
    order: tuple[Dimension, ...], share: dict[Dimension, float], ratio: float, seed: int
) -> None:
    asked = problem(ratio, order=order, shares=share)
    objective, structure = Additive(seed), DENSE
    try:
        steps = run(asked, objective)
    except InfeasibleError:
        return
    for step in steps:
        options = after(step.stage, structure, asked.grid)
        assert step.candidates == len(options)
        assert step.loss == min(map(objective, options))
        structure = replay(ANATOMY, [step], structure)
        assert step.ratio == COSTS.ratio(structure)
    assert [step.stage for step in steps] == sorted((step.stage for step in steps), key=order.index)


@settings(max_examples=60)
@given(orders, st.floats(0.05, 0.4), st.integers(1, 50))
def test_the_ratio_is_within_half_a_step_or_reached(order: tuple[Dimension, ...], ratio: float, seed: int) -> None:
    steps = run(problem(ratio, order=order), Additive(seed))
    ratios = [0.0] + [step.ratio for step in steps]
    last = ratios[-1] - ratios[-2]
    structure = replay(ANATOMY, steps)
    options = after(order[-1], structure, FINE)
    best = Additive(seed).argmin(options).best if options else structure
    next_size = COSTS.ratio(best) - ratios[-1]
    assert -max(next_size, last) / 2 - 1e-9 <= steps[-1].ratio - ratio <= last / 2 + 1e-9
    assert run(problem(ratio, "reach", order=order), Additive(seed))[-1].ratio >= ratio


@settings(max_examples=40)
@given(st.integers(0, 60), st.integers(1, 30))
def test_a_run_cut_anywhere_ends_the_same(cut: int, seed: int) -> None:
    whole = run(problem(), Additive(seed))
    cut = min(cut, len(whole))
    objective, new = Additive(seed), []
    resumed = run(problem(), objective, done=whole[:cut], on_step=new.append)
    assert resumed == whole
    assert new == whole[cut:]
    assert [step.to_json() | {"seconds": 0} for step in resumed] == [s.to_json() | {"seconds": 0} for s in whole]


def test_the_objective_is_told_of_every_commitment() -> None:
    objective = Additive()
    steps = run(problem(), objective)
    assert objective.committed[-1] == replay(ANATOMY, steps)
    assert len(set(objective.committed)) == len(steps) + 1


def test_a_dimension_without_share_is_left_alone() -> None:
    steps = run(problem(0.2, shares={"blocks": 0, "mlp": 1, "heads": 0}))
    assert {step.stage for step in steps} == {"mlp"}


def test_steps_survive_json() -> None:
    for step in run(problem()):
        assert Step.from_json(step.to_json()) == step
    with pytest.raises(ConfigError):
        Step.from_json({"stage": "mlp"})


def test_a_nested_path_serves_smaller_ratios() -> None:
    steps = run(problem(0.4))
    for ratio in (0.05, 0.1, 0.22, 0.4):
        count = steps_to(steps, ratio)
        gaps = [abs(r - ratio) for r in [0.0] + [step.ratio for step in steps]]
        assert gaps[count] == min(gaps)


def test_what_cannot_be_reached_is_said_with_the_maximum() -> None:
    asked = problem(0.95, shares={"blocks": 0, "mlp": 1, "heads": 0})
    most = reachable_ratio(asked)
    smallest = structure_of(*[(8, 4, 8)] * 6)
    assert most == pytest.approx(COSTS.ratio(smallest), abs=1e-3)
    with pytest.raises(InfeasibleError, match="out of reach") as caught:
        run(asked)
    assert caught.value.nearest == pytest.approx(COSTS.ratio(smallest))
    assert reachable_ratio(problem(0.3)) == 0.3


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.7])
def test_what_some_path_reaches_is_not_refused(ratio: float) -> None:
    asked = problem(ratio)
    assert reachable_ratio(asked) == ratio
    run(asked, Additive(3))


def test_less_than_half_a_step_is_refused_with_the_smallest() -> None:
    with pytest.raises(InfeasibleError, match="smallest step") as caught:
        run(problem(1e-4))
    least = min(COSTS.ratio(s) for d in DIMENSIONS for s in after(d, DENSE, FINE))
    assert caught.value.nearest == least


def test_a_cut_of_a_path_follows_its_stop_rule() -> None:
    steps = run(problem(0.4))
    reached = steps_to(steps, 0.2, "reach")
    assert steps[reached - 1].ratio >= 0.2 > steps[reached - 2].ratio


def test_groups_that_do_not_divide_are_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"48 does not divide the 64 MLP channels.*32, 64"):
        run(problem(grid=Grid({"channels": 48, "kv_groups": 1})))
    with pytest.raises(ConfigError, match="does not divide the 4 KV groups"):
        run(problem(grid=Grid({"channels": 8, "kv_groups": 3})))


def test_partial_groups_leave_from_the_end() -> None:
    partial = Grid({"channels": 24, "kv_groups": 1}, frozenset({"channels"}))
    steps = run(problem(0.1, grid=partial, shares={"blocks": 0, "mlp": 1, "heads": 0}))
    widths = {size.channels for size in layers_of(replay(ANATOMY, steps))}
    assert widths <= {64, 40}, "64 - 24 = 40 stay: another 24 would leave less than a group"
    with pytest.raises(ConfigError, match="--partial-groups"):
        run(problem(grid=Grid({"channels": 24, "kv_groups": 1})))


def test_candidates_keep_a_block_and_a_group() -> None:
    anatomy, one = anatomy_of((8, 4, 64), (8, 4, 64)), structure_of((8, 4, 64), (0, 0, 8))
    assert candidates("blocks", one, anatomy, FINE) == [(anatomy.at(0, "mlp"), GONE), (anatomy.at(1, "mlp"), GONE)]
    assert candidates("mlp", one, anatomy, FINE) == [(anatomy.at(0, "mlp"), (56,))]
    coarse = Grid({"channels": 8, "kv_groups": 2})
    assert candidates("heads", one, anatomy, coarse) == [(anatomy.at(0, "attention"), (2, 2))]
    assert candidates("heads", one.replace(0, (2, 2)), anatomy, coarse) == [], "a step of the grid stays"


def test_an_axis_without_a_step_stays_whole() -> None:
    for dimension in DIMENSIONS:
        moves = candidates(dimension, DENSE, ANATOMY, Grid({"channels": 8}))
        assert bool(moves) == (dimension != "heads")
    within = candidates("heads", DENSE, ANATOMY, Grid({"channels": 8, "queries": 1}))
    assert within == [(number, (4, 1)) for number in ANATOMY.of_kind("attention")]


def test_expected_candidates_are_of_the_right_size() -> None:
    counts, steps = expected_candidates(problem()), run(problem())
    for dimension in DIMENSIONS:
        seen = sum(step.candidates for step in steps if step.stage == dimension)
        assert counts[dimension] == pytest.approx(seen, rel=0.5, abs=30)


def test_search_needs_no_torch() -> None:
    code = "import sys, multipruner.search; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Counting(Additive):
    """Counts the structures that are asked for."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.asked = 0

    def __call__(self, structure: Structure) -> float:
        self.asked += 1
        return super().__call__(structure)


def _shortlisted(asked: Problem, seed: int, count: int, done: tuple[Step, ...] = ()) -> tuple[list[Step], int]:
    losses = {name: Counting(seed) for name in ("blocks", "widths")}
    ends = [replay(ANATOMY, done[:number]) for number in range(len(done) + 1)]
    known = list(zip(done, ends, ends[1:], strict=False))
    blocks, widths = (
        Shortlisted(one, count, [each for each in known if (each[0].stage == "blocks") is (name == "blocks")])
        for name, one in losses.items()
    )
    steps = sequential_path(asked, {"blocks": blocks, "mlp": widths, "heads": widths}, done=done)
    return steps, sum(one.asked for one in losses.values())


@settings(max_examples=40)
@given(orders, st.floats(0.1, 0.5), st.integers(1, 50), st.integers(1, 3), st.data())
def test_a_shortlist_decides_as_all_losses_where_they_add_up_and_goes_on_as_it_would_have(
    order: tuple[Dimension, ...], ratio: float, seed: int, count: int, data: st.DataObject
) -> None:
    asked = problem(ratio, order=order, shares={"blocks": 3, "mlp": 5, "heads": 2})
    try:
        expected = run(asked, Additive(seed))
    except InfeasibleError:
        return
    steps, measured = _shortlisted(asked, seed, count)
    where = [(step.stage, step.kind, step.layer, step.size) for step in expected]
    assert [(step.stage, step.kind, step.layer, step.size) for step in steps] == where
    assert steps[-1].loss == pytest.approx(expected[-1].loss)
    stages = len({step.stage for step in steps})
    assert all(len(step.measured) <= count + 1 for step in steps if len(step.measured) < step.candidates)
    assert measured <= sum(len(step.measured) for step in steps) + 2 * stages + len(ANATOMY)
    done = tuple(Step.from_json(step.to_json()) for step in steps[: data.draw(st.integers(0, len(steps)))])
    assert _shortlisted(asked, seed, count, done)[0] == steps
