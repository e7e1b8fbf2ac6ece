"""The exact program is exact, keeps every budget, and says what could be kept when it cannot; allocation improves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.core.objective import Choice
from multipruner.core.structure import GONE, Size, Structure
from multipruner.search import Grid, Limit, Task, allocate, solve
from multipruner.search.allocation import _Meter, _solutions, _tables
from multipruner.search.options import FIRST_ON_CURVES, interpolated, levels
from tests.support.layers import layers_of, uniform

ATTENTION: tuple[Size, ...] = (GONE, (1, 2), (2, 2))
MLP: tuple[Size, ...] = (GONE, (8,), (16,))
TWO, SIX = uniform(2, 4, 2, 16), uniform(6, 4, 2, 16)
Table = dict[int, dict[Size, float]]


def _table(losses: Sequence[float], layers: int) -> Table:
    numbers = iter(losses)
    return {block: {size: next(numbers) for size in (ATTENTION, MLP)[block % 2]} for block in range(2 * layers)}


def _weight(block: int, size: Size) -> float:
    """Attention and MLP in turn: three for a query head, one for a channel, and something for being there."""
    return (3.0 * size[0] * size[1] if block % 2 == 0 else size[0]) + 1.5 if size else 0.0


def _memory(block: int, size: Size) -> float:
    return float(size[0] * (block // 2 + 1)) if size and block % 2 == 0 else 0.0


def _all(table: Table) -> list[tuple[float, Structure]]:
    found = []
    for sizes in product(*(table[block] for block in sorted(table))):
        if any(sizes[::2]) and any(sizes[1::2]):
            found.append((sum(table[b][s] for b, s in enumerate(sizes)), Structure(sizes)))
    return found


losses_of_two_layers = st.lists(st.floats(-1, 9, allow_nan=False, width=32), min_size=12, max_size=12)


@given(losses_of_two_layers, st.floats(8, 70), st.floats(1, 7))
def test_the_program_finds_what_brute_force_finds(losses: list[float], weight: float, memory: float) -> None:
    table = _table(losses, 2)
    limits = (Limit.of_blocks("weight", _weight, 5.0, weight), Limit.of_blocks("memory", _memory, 0.0, memory))
    feasible = [pair for pair in _all(table) if all(limit.cost(pair[1]) <= limit.limit for limit in limits)]
    if not feasible:
        with pytest.raises(InfeasibleError):
            solve(table, limits, TWO)
        return
    solution = solve(table, limits, TWO)
    assert solution.predicted == pytest.approx(min(loss for loss, _ in feasible), abs=1e-6)
    assert all(limit.cost(solution.structure) <= limit.limit + 1e-9 for limit in limits)
    assert solution.gap == pytest.approx(0, abs=1e-6)


@given(losses_of_two_layers, st.floats(22, 70))
def test_uniform_solutions_are_the_best_uniform_ones(losses: list[float], weight: float) -> None:
    table, limits = _table(losses, 2), (Limit.of_blocks("weight", _weight, 5.0, weight),)

    def uniform(structure: Structure) -> bool:
        kept = {size for size in layers_of(structure) if any(size)}
        return len(kept) == 1 and all(map(all, kept))

    feasible = [(loss, s) for loss, s in _all(table) if uniform(s) and limits[0].cost(s) <= weight]
    assert feasible, "one narrow layer weighs less than 22"
    solution = solve(table, limits, TWO, uniform=True)
    assert uniform(solution.structure)
    assert solution.predicted == pytest.approx(min(loss for loss, _ in feasible), abs=1e-6)


def test_an_impossible_budget_names_the_nearest_possible_one() -> None:
    table, limits = _table([0.0] * 12, 2), (Limit.of_blocks("weight", _weight, 5.0, 10.0),)
    least = min(limits[0].cost(structure) for _, structure in _all(table))
    with pytest.raises(InfeasibleError, match="nearest") as caught:
        solve(table, limits, TWO)
    assert caught.value.nearest == pytest.approx(least, rel=1e-6)


def test_a_limit_that_the_program_does_not_know_is_refused() -> None:
    table, whole = _table([0.0] * 12, 2), Limit("weight", lambda structure: 0.0, 10.0)
    for limit in (whole, replace(Limit.of_blocks("weight", _weight, 0.0, 10.0), least=5.0)):
        with pytest.raises(ConfigError, match=r"sums over blocks, not .*weight <= 10$"):
            solve(table, (limit,), TWO)


@pytest.mark.parametrize("over", [0, 1, 3, 8, 20, 2_000_000])
def test_a_budget_is_kept_where_the_solver_is_content_with_a_little_more(over: int) -> None:
    """The solver's tolerance is a millionth of the budget; the whole model is so little over it, or just fits."""
    costs = {GONE: 0, (1, 1): 0, (8,): 2_000_000, (16,): 5_000_000}
    table: Table = {0: {(1, 1): 0.0}, 1: {(16,): 0.0, (8,): 0.1}, 3: {(16,): 0.0, (8,): 1.1}}
    limit = Limit.of_blocks("parameters", lambda block, size: costs[size], 0.0, 10_000_000.0 - over)
    solution = solve(table, (limit,), TWO)
    assert limit.cost(solution.structure) <= limit.limit
    assert solution.structure == Structure(((1, 1), (16,) if over == 0 else (8,), GONE, (16,)))


def test_options_without_a_finite_loss_are_no_options() -> None:
    table = _table([0.0] * 12, 2)
    table[1] = {MLP[0]: float("nan"), MLP[2]: 1.0}
    assert solve(table, (), TWO).structure[1] == (16,)
    table[1] = {MLP[0]: float("inf")}
    with pytest.raises(ConfigError, match="the MLP block of layer 0"):
        solve(table, (), TWO)


class _Coupled:
    """A toy whose blocks cost more when their neighbours are narrow too: single losses mislead."""

    def __init__(self, worth: Callable[[int, str], float]) -> None:
        self.worth, self.calls = worth, 0

    def __call__(self, structure: Structure) -> float:
        self.calls += 1
        missing = [
            (1 - (size.channels / 16 if kind == "mlp" else size.query_heads / 4)) * self.worth(layer, kind)
            for layer, size in enumerate(layers_of(structure))
            for kind in ("attention", "mlp")
        ]
        return sum(m * m for m in missing) + 4 * sum(a * b for a, b in zip(missing, missing[2:], strict=False))

    def commit(self, structure: Structure) -> None:
        pass

    def argmin(self, structures: Sequence[Structure], progress: object = None) -> Choice:
        best = min(structures, key=self)
        return Choice(best, self(best))


def _task(limit: float, rounds: int = 3, uniform: bool = False) -> Task:
    grid = Grid({"channels": 4, "kv_groups": 1})
    return Task(SIX, grid, (Limit.of_blocks("weight", _weight, 0.0, limit),), uniform, rounds)


def test_measuring_again_around_the_solution_finds_a_better_one() -> None:
    objective = _Coupled(lambda layer, kind: 1 + (layer % 3) / 2)
    once, again = allocate(_task(110, rounds=0), objective), allocate(_task(110), objective)
    assert again.loss < once.loss
    assert again.loss == objective(again.structure) == min(r.loss for r in again.rounds)
    assert _task(110).limits[0].cost(again.structure) <= 110
    assert again.rounds[0].accepted


def test_refining_goes_on_until_nothing_helps_and_no_longer_than_asked() -> None:
    objective = _Coupled(lambda layer, kind: 1 + (layer % 3) / 2)
    once, refined = (
        allocate(_task(90, rounds=0), objective),
        allocate(replace(_task(90, 0), refine_seconds=60), objective),
    )
    assert len(refined.rounds) > len(once.rounds) == 1
    assert refined.loss < once.loss and not refined.rounds[-1].accepted
    assert sum(round_.seconds for round_ in refined.rounds) < 60


def test_first_tables_come_from_the_sketch_and_everything_else_from_the_loss_itself() -> None:
    worth = lambda layer, kind: 1 + (layer % 3) / 2  # noqa: E731
    exact, alone = _Coupled(worth), _Coupled(worth)
    sketch = _Coupled(lambda layer, kind: worth(layer, kind) * (1.1 if layer == 2 else 1.0))
    found, plain = allocate(_task(110), exact, sketch=sketch), allocate(_task(110), alone)
    assert found.loss == exact(found.structure) and found.rounds[-1].loss >= found.loss
    assert sketch.calls > 20 and exact.calls < alone.calls
    assert sum(r.measured for r in found.rounds) == sketch.calls + exact.calls - 2  # the dense loss, and the one above
    same = allocate(_task(110), _Coupled(worth), sketch=_Coupled(worth))
    assert same.structure == plain.structure and same.loss == plain.loss


@given(losses_of_two_layers.filter(lambda losses: len(set(losses)) == 12), st.integers(0, 11))
def test_cautious_steps_change_few_blocks_and_keep_the_budgets(losses: list[float], pick: int) -> None:
    table = _table(losses * 3, 6)
    task = _task(110)
    base = solve(table, task.limits, task.anatomy).structure
    prices = {block: dict(zip(sizes, (losses * 2)[pick : pick + 3], strict=True)) for block, sizes in table.items()}
    free, *cautious = _solutions(task, prices, base)
    assert free.structure == solve(prices, task.limits, task.anatomy).structure or free.structure != base
    for solution in (free, *cautious):
        assert task.limits[0].cost(solution.structure) <= 110 + 1e-9
    for solution in cautious:
        changed = sum(size != old for size, old in zip(solution.structure, base, strict=True))
        assert 0 < changed <= len(table) // 4
    assert len({solution.structure for solution in (free, *cautious)}) == 1 + len(cautious)


def test_an_impossible_allocation_measures_nothing() -> None:
    objective = _Coupled(lambda layer, kind: 1.0)
    with pytest.raises(InfeasibleError):
        allocate(_task(1), objective)
    assert objective.calls == 0


def test_allocation_reports_what_it_measures() -> None:
    seen: list[tuple[str, int, int]] = []
    result = allocate(_task(110, rounds=1, uniform=True), _Coupled(lambda *at: 1.0), lambda *at: seen.append(at))
    assert {what for what, *_ in seen} == {"first tables", "round 1"}
    assert all(0 < done <= total for _, done, total in seen)
    assert len({size for size in layers_of(result.structure) if any(size)}) == 1


def test_first_tables_on_curves_measure_one_width_and_what_would_go() -> None:
    """Losses that are the errors' multiples are known from one width each; absence, which is dearer, from a loss."""

    def own(layer: int, kind: str) -> float:
        return 1 + (layer % 3) / 2 + (kind == "mlp")

    class Additive(_Coupled):
        calls: int

        def __call__(self, structure: Structure) -> float:
            self.calls += 1
            sizes = zip(structure, SIX.places, strict=True)
            lost = [own(at.layer, at.kind) * (1 - (size[0] / at.dense[0] if size else -2.0)) ** 2 for size, at in sizes]
            return sum(lost)

    def errors(block: int, chain: Sequence[Size]) -> list[float]:
        return [(1 - (size[0] / SIX[block].dense[0] if size else 0.0)) ** 2 for size in chain]

    toy, everywhere = Additive(own), Additive(own)
    task = replace(_task(60, rounds=0), first=(0.5,), errors=errors)
    found = allocate(task, toy)
    exact = {b: {size: everywhere(SIX.dense.replace(b, size)) for size in task.levels(b)} for b in range(len(SIX))}
    best = solve(exact, task.limits, SIX)
    assert found.loss == pytest.approx(everywhere(best.structure)) and toy.calls < everywhere.calls


def test_estimated_tables_measure_only_what_would_go() -> None:
    """An estimate that takes removed blocks for cheap is corrected, block by block, by their losses."""
    worth = lambda layer, kind: 1 + (layer % 3) / 2  # noqa: E731
    toy, asked = _Coupled(worth), []

    def estimate(task: Task) -> dict[int, dict[Size, float]]:
        asked.append(task)
        dense, table = task.anatomy.dense, {}
        for block in range(len(dense)):
            own = task.levels(block)
            table[block] = {size: toy(dense.replace(block, size)) * (0.01 if not size else 1.0) for size in own}
        return table

    task = replace(_task(110, rounds=0), errors=lambda block, chain: [float(len(chain) - n) for n in range(len(chain))])
    found = allocate(task, toy, estimate=estimate)
    assert asked == [task] and len(found.rounds) == 1
    exact = {
        block: {size: toy(SIX.dense.replace(block, size)) for size in task.levels(block)} for block in range(len(SIX))
    }
    best = solve(exact, task.limits, SIX)
    assert found.structure == best.structure, "no block goes for what it was said to cost"
    assert found.rounds[0].predicted == pytest.approx(best.predicted)
    removed = sum(not size for size in found.structure)
    others = 2  # the dense model and the solution
    assert removed <= found.rounds[0].measured - others <= len(SIX)


def test_blocks_whose_errors_nobody_knows_are_measured_and_lie_on_straight_lines() -> None:
    """Estimated and on curves where errors are known; the others at three widths."""
    seen: list[Structure] = []

    class Seen(_Coupled):
        def __call__(self, structure: Structure) -> float:
            seen.append(structure)
            return super().__call__(structure)

    def errors(block: int, chain: Sequence[Size]) -> list[float]:
        assert block not in (1, 6), "nobody asks for what nobody knows"
        return [float(len(chain) - n) ** 2 for n in range(len(chain))]

    def estimate(task: Task) -> dict[int, dict[Size, float]]:
        known = set(range(len(SIX))) - task.straight
        return {block: {size: 1.0 - sum(size) / 100 for size in task.levels(block)} for block in known}

    task = replace(_task(110, rounds=0), first=(), errors=errors, straight=frozenset({1, 6}))
    toy = Seen(lambda *at: 1.0)
    allocate(task, toy, estimate=estimate)
    changed = [[(b, size) for b, (size, whole) in enumerate(zip(one, SIX.dense, strict=True)) if size != whole]
               for one in seen[:-1]]  # fmt: skip
    single = [one[0] for one in changed if one]
    assert {(b, size) for b, size in single if b in task.straight} == {
        (1, GONE), (1, (8,)), (1, (12,)), (6, GONE), (6, (1, 2)),
    }  # fmt: skip
    assert all(not size for b, size in single if b not in task.straight) and len(set(single)) == len(single)
    table, _ = _tables(replace(task, first=FIRST_ON_CURVES), _Meter(toy, lambda *at: None), SIX.dense, None, 0, {0})
    assert set(table) == set(range(1, len(SIX)))
    assert table[1][(4,)] == pytest.approx((table[1][GONE] + table[1][(8,)]) / 2)


LOSSES = st.lists(st.floats(0, 10), min_size=4, max_size=4)


@given(LOSSES, st.lists(st.floats(0.1, 9), min_size=6, max_size=6, unique=True))
def test_losses_between_measured_ones_follow_the_errors(losses: list[float], errors: list[float]) -> None:
    sizes = [GONE, *((4 * n,) for n in range(1, 7))]
    of = [20.0, *sorted(errors, reverse=True)]
    gone, two, five, top = losses
    rows = {sizes[0]: gone, sizes[2]: two, sizes[5]: five, sizes[6]: top}
    found = interpolated(rows, sizes, of)
    assert {size: found[size] for size in rows} == rows and set(found) == set(sizes)
    slope = (two - five) / (of[2] - of[5])
    for place in (3, 4):
        assert found[sizes[place]] == pytest.approx(two + slope * (of[place] - of[2]))
    assert found[sizes[1]] == pytest.approx(two + max(slope, 0) * (of[1] - of[2])), "whatever its absence costs"
    straight = interpolated({sizes[0]: gone, sizes[6]: top}, sizes, of)
    assert straight == interpolated({sizes[0]: gone, sizes[6]: top}, sizes), "absence says nothing of errors"


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 64))
def test_levels_run_from_nothing_to_everything(channels: int, kv_heads: int, group: int) -> None:
    anatomy = uniform(2, 2 * kv_heads, kv_heads, channels)
    for place in anatomy.places[:2]:
        sizes = levels(place, Grid({"channels": group, "kv_groups": 1}))
        assert sizes[0] == GONE and sizes[-1] == place.dense
        assert list(sizes) == sorted(sizes, key=lambda size: size[:1])
        assert all(size[1:] == (2,) for size in sizes[1:] if place.kind == "attention")
        rows = interpolated({sizes[0]: 1.0, sizes[-1]: 0.0}, sizes)
        assert set(rows) == set(sizes)
        assert sorted(rows.values(), reverse=True) == [rows[size] for size in sizes]
        structure = anatomy.dense.replace(anatomy.at(1, place.kind), sizes[0])
        assert anatomy.count(structure, place.kind) == 1 and structure.blocks[:2] == anatomy.dense.blocks[:2]
