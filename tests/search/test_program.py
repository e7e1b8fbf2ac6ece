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
from multipruner.core.structure import BlockKind, LayerSize, Structure
from multipruner.search import Grid, Limit, Task, allocate, solve
from multipruner.search.allocation import _solutions, with_block
from multipruner.search.limits import alone
from multipruner.search.options import interpolated, levels
from multipruner.search.program import Block, assemble

ATTENTION = (LayerSize(0, 0, 0), LayerSize(2, 1, 0), LayerSize(4, 2, 0))
MLP = (LayerSize(0, 0, 0), LayerSize(0, 0, 8), LayerSize(0, 0, 16))


def _table(losses: Sequence[float], layers: int) -> dict[Block, dict[LayerSize, float]]:
    kinds: tuple[tuple[BlockKind, tuple[LayerSize, ...]], ...] = (("attention", ATTENTION), ("mlp", MLP))
    numbers = iter(losses)
    return {(layer, kind): {size: next(numbers) for size in sizes} for layer in range(layers) for kind, sizes in kinds}


def _weight(layer: int, kind: BlockKind, size: LayerSize) -> float:
    return 3.0 * size.query_heads + size.channels + (1.5 if size.has(kind) else 0)


def _memory(layer: int, kind: BlockKind, size: LayerSize) -> float:
    return float(size.kv_heads * (layer + 1))


def _all(table: dict[Block, dict[LayerSize, float]]) -> list[tuple[float, Structure]]:
    blocks = sorted(table)
    found = []
    for sizes in product(*(table[block] for block in blocks)):
        structure = assemble(dict(zip(blocks, sizes, strict=True)))
        if structure.count("attention") and structure.count("mlp"):
            found.append((sum(table[b][s] for b, s in zip(blocks, sizes, strict=True)), structure))
    return found


losses_of_two_layers = st.lists(st.floats(-1, 9, allow_nan=False, width=32), min_size=12, max_size=12)


@given(losses_of_two_layers, st.floats(8, 70), st.floats(1, 7))
def test_the_program_finds_what_brute_force_finds(losses: list[float], weight: float, memory: float) -> None:
    table = _table(losses, 2)
    limits = (Limit.of_blocks("weight", _weight, 5.0, weight), Limit.of_blocks("memory", _memory, 0.0, memory))
    feasible = [pair for pair in _all(table) if all(limit.cost(pair[1]) <= limit.limit for limit in limits)]
    if not feasible:
        with pytest.raises(InfeasibleError):
            solve(table, limits)
        return
    solution = solve(table, limits)
    assert solution.predicted == pytest.approx(min(loss for loss, _ in feasible), abs=1e-6)
    assert all(limit.cost(solution.structure) <= limit.limit + 1e-9 for limit in limits)
    assert solution.gap == pytest.approx(0, abs=1e-6)


@given(losses_of_two_layers, st.floats(22, 70))
def test_uniform_solutions_are_the_best_uniform_ones(losses: list[float], weight: float) -> None:
    table, limits = _table(losses, 2), (Limit.of_blocks("weight", _weight, 5.0, weight),)

    def uniform(structure: Structure) -> bool:
        kept = {size for size in structure if size != LayerSize(0, 0, 0)}
        return len(kept) == 1 and all(size.has_attention and size.has_mlp for size in kept)

    feasible = [(loss, s) for loss, s in _all(table) if uniform(s) and limits[0].cost(s) <= weight]
    assert feasible, "one narrow layer weighs less than 22"
    solution = solve(table, limits, uniform=True)
    assert uniform(solution.structure)
    assert solution.predicted == pytest.approx(min(loss for loss, _ in feasible), abs=1e-6)


def test_an_impossible_budget_names_the_nearest_possible_one() -> None:
    table, limits = _table([0.0] * 12, 2), (Limit.of_blocks("weight", _weight, 5.0, 10.0),)
    least = min(limits[0].cost(structure) for _, structure in _all(table))
    with pytest.raises(InfeasibleError, match="nearest") as caught:
        solve(table, limits)
    assert caught.value.nearest == pytest.approx(least, rel=1e-6)


def test_a_limit_that_the_program_does_not_know_is_refused() -> None:
    table, whole = _table([0.0] * 12, 2), Limit("weight", lambda structure: 0.0, 10.0)
    for limit in (whole, replace(Limit.of_blocks("weight", _weight, 0.0, 10.0), least=5.0)):
        with pytest.raises(ConfigError, match=r"sums over blocks, not .*weight <= 10$"):
            solve(table, (limit,))


@pytest.mark.parametrize("over", [0, 1, 3, 8, 20, 2_000_000])
def test_a_budget_is_kept_where_the_solver_is_content_with_a_little_more(over: int) -> None:
    """The solver's tolerance is a millionth of the budget; the whole model is so little over it, or just fits."""
    costs = {0: 0, 8: 2_000_000, 16: 5_000_000}
    attention = LayerSize(1, 1, 0)
    table: dict[Block, dict[LayerSize, float]] = {(0, "attention"): {attention: 0.0}}
    for layer in range(2):
        table[layer, "mlp"] = {LayerSize(0, 0, 16): 0.0, LayerSize(0, 0, 8): 0.1 + layer}
    limit = Limit.of_blocks("parameters", lambda layer, kind, size: costs[size.channels], 0.0, 10_000_000.0 - over)
    solution = solve(table, (limit,))
    assert limit.cost(solution.structure) <= limit.limit
    assert [size.channels for size in solution.structure] == ([16, 16] if over == 0 else [8, 16])


def test_options_without_a_finite_loss_are_no_options() -> None:
    table = _table([0.0] * 12, 2)
    table[0, "mlp"] = {MLP[0]: float("nan"), MLP[2]: 1.0}
    assert solve(table, ()).structure[0].channels == 16
    table[0, "mlp"] = {MLP[0]: float("inf")}
    with pytest.raises(ConfigError, match="layer 0"):
        solve(table, ())


class _Coupled:
    """A toy whose blocks cost more when their neighbours are narrow too: single losses mislead."""

    def __init__(self, worth: Callable[[int, str], float]) -> None:
        self.worth, self.calls = worth, 0

    def __call__(self, structure: Structure) -> float:
        self.calls += 1
        missing = [
            (1 - (size.channels / 16 if kind == "mlp" else size.query_heads / 4)) * self.worth(layer, kind)
            for layer, size in enumerate(structure)
            for kind in ("attention", "mlp")
        ]
        return sum(m * m for m in missing) + 4 * sum(a * b for a, b in zip(missing, missing[2:], strict=False))

    def commit(self, structure: Structure) -> None:
        pass

    def argmin(self, structures: Sequence[Structure], progress: object = None) -> Choice:
        best = min(structures, key=self)
        return Choice(best, self(best))


def _task(limit: float, rounds: int = 3, uniform: bool = False) -> Task:
    dense = Structure.uniform(6, 4, 2, 16)
    return Task(dense, Grid(4), (Limit.of_blocks("weight", _weight, 0.0, limit),), uniform, rounds)


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
    base = solve(table, task.limits).structure
    prices = {block: dict(zip(sizes, (losses * 2)[pick : pick + 3], strict=True)) for block, sizes in table.items()}
    free, *cautious = _solutions(task, prices, base)
    assert free.structure == solve(prices, task.limits).structure or free.structure != base
    for solution in (free, *cautious):
        assert task.limits[0].cost(solution.structure) <= 110 + 1e-9
    for solution in cautious:
        changed = sum(
            not size.same_block(old, kind)
            for size, old in zip(solution.structure, base, strict=True)
            for kind in ("attention", "mlp")
        )
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
    assert len({size for size in result.structure if size != LayerSize(0, 0, 0)}) == 1


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 64))
def test_levels_run_from_nothing_to_everything(channels: int, kv_heads: int, group: int) -> None:
    full = LayerSize(2 * kv_heads, kv_heads, channels)
    for kind in ("attention", "mlp"):
        sizes = levels(alone(full, kind), kind, Grid(group))
        assert sizes[0] == LayerSize(0, 0, 0) and sizes[-1] == alone(full, kind)
        assert list(sizes) == sorted(sizes, key=lambda size: (size.kv_heads, size.channels))
        rows = interpolated({sizes[0]: 1.0, sizes[-1]: 0.0}, sizes)
        assert set(rows) == set(sizes)
        assert sorted(rows.values(), reverse=True) == [rows[size] for size in sizes]
        structure = with_block(Structure((full, full)), (1, kind), sizes[0])
        assert not structure[1].has(kind) and structure[0] == full
