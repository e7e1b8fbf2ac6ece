"""Searches that may take query heads out of KV groups: their grid, their options, what is measured, what is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.core.costs import Costs, LayerCost
from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.core.objective import Choice, best_two
from multipruner.core.structure import KINDS, BlockKind, LayerSize, Structure
from multipruner.search import Grid, Limit, Problem, Task, allocate, candidates, replay, sequential_path
from multipruner.search.limits import alone
from multipruner.search.options import EMPTY, chains, levels, predicted

FULL = LayerSize(9, 3, 0)
DENSE = Structure.uniform(3, 9, 3, 8)
FINE = Grid(4, 1, query_head_step=1)


class _Toy:
    """A loss that is a sum over layers; remembers what it was asked."""

    def __init__(self, worth: Callable[[int, LayerSize], float]) -> None:
        self.worth = worth
        self.asked: list[Structure] = []

    def __call__(self, structure: Structure) -> float:
        self.asked.append(structure)
        return sum(self.worth(layer, size) for layer, size in enumerate(structure))

    def commit(self, structure: Structure) -> None:
        pass

    def argmin(self, structures: Sequence[Structure], progress: object = None) -> Choice:
        return best_two(structures, [self(structure) for structure in structures])


def _heads(size: LayerSize) -> int:
    return size.query_heads // size.kv_heads if size.kv_heads else 0


def _weight(layer: int, kind: BlockKind, size: LayerSize) -> float:
    return float(size.query_heads + size.kv_heads + size.channels)


def test_a_group_keeps_one_query_head_at_least_and_steps_that_fit_none_are_refused() -> None:
    llama, smollm, mha = Structure.uniform(2, 32, 8, 8), Structure.uniform(2, 9, 3, 8), Structure.uniform(2, 8, 8, 8)
    assert Grid(8, query_head_step=1).queries(llama[0]) == (1, 2, 3, 4)
    assert Grid(8, query_head_step=3).queries(llama[0]) == (1, 4)
    assert Grid(8, query_head_step=2).queries(smollm[0]) == (1, 3)
    assert Grid(8).queries(llama[0]) == (4,) and Grid(8, query_head_step=1).queries(LayerSize(0, 0, 8)) == ()
    for dense, most in ((llama, 3), (smollm, 2), (mha, 1)):
        Grid(8, query_head_step=most).check(dense)
        with pytest.raises(
            ConfigError, match=rf"query head step {most + 1} .* give {'1 to ' if most > 1 else ''}{most}"
        ):
            Grid(8, query_head_step=most + 1).check(dense)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_options_are_all_pairs_by_their_number_of_parameters(groups: int, per: int, step: int, fewer: int) -> None:
    full, grid = LayerSize(groups * per, groups, 0), Grid(4, step, query_head_step=fewer)
    sizes = levels(full, "attention", grid)
    whole = levels(full, "attention", Grid(4, step))
    assert sizes[0] == EMPTY and sizes[-1] == full and len(set(sizes)) == len(sizes)
    assert set(whole) <= set(sizes)
    assert {(s.kv_heads, _heads(s)) for s in sizes[1:]} == {
        (size.kv_heads, queries) for size in whole[1:] for queries in range(per, 0, -fewer)
    }
    costs = LayerCost(7, 20, 20, 5, 3, 0, 0, 0)
    assert sorted(map(costs.parameters, sizes)) == list(map(costs.parameters, sizes))
    if per == 1:
        assert sizes == whole, "one query head per KV head: nothing changes"
    for current in sizes:
        through = chains(full, "attention", grid, current)
        assert all(current in chain and set(chain) <= set(sizes) for chain in through)
        tables = [dict.fromkeys(chain, 0.0) for chain in through]
        assert set(predicted(tables, full, "attention", grid)) == set(sizes), "every option has a prediction"


def test_off_the_chains_increases_add_up() -> None:
    groups, heads = chains(FULL, "attention", FINE, FULL)
    assert groups == (EMPTY, LayerSize(3, 1, 0), LayerSize(6, 2, 0), FULL)
    assert heads == (LayerSize(3, 3, 0), LayerSize(6, 3, 0), FULL)
    rows = predicted(
        [dict(zip(groups, (9.0, 4.0, 1.0, 0.0), strict=True)), dict(zip(heads, (2.0, 0.5, 0.0), strict=True))],
        FULL, "attention", FINE,
    )  # fmt: skip
    assert rows[LayerSize(2, 2, 0)] == 1.0 + 2.0 and rows[LayerSize(2, 1, 0)] == 4.0 + 0.5
    assert rows[EMPTY] == 9.0 and rows[FULL] == 0.0 and len(rows) == 10
    (groups,) = chains(FULL, "attention", FINE, EMPTY)
    rows = predicted([dict(zip(groups, (0.0, -1.0, -2.0, -3.0), strict=True))], FULL, "attention", FINE)
    assert rows[LayerSize(2, 1, 0)] == pytest.approx(-2 / 3) and rows[LayerSize(3, 3, 0)] == pytest.approx(-1)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=10, max_size=10), st.integers(3, 30))
def test_the_first_round_is_the_best_of_all_where_losses_add_up(numbers: list[int], most: int) -> None:
    """Groups, heads in them and channels cost on their own, and so few are there that all of the chains is measured."""
    dense = Structure.uniform(2, 6, 2, 8)

    def worth(layer: int, size: LayerSize) -> float:
        group, head, attention, channel, mlp = numbers[5 * layer : 5 * layer + 5]
        lost = channel * (8 - size.channels) / 4 + mlp * (not size.has_mlp)
        return lost + (group * (2 - size.kv_heads) + head * (3 - _heads(size)) if size.has_attention else attention)

    task = Task(dense, FINE, (Limit.of_blocks("weight", _weight, 0.0, most),), rounds=0)
    options = [
        LayerSize(a.query_heads, a.kv_heads, m.channels)
        for a in task.levels((0, "attention"))
        for m in task.levels((0, "mlp"))
    ]
    losses = [
        sum(worth(layer, size) for layer, size in enumerate(sizes))
        for sizes in product(options, repeat=2)
        if sum(size.query_heads + size.kv_heads + size.channels for size in sizes) <= most
        and all(any(size.has(kind) for size in sizes) for kind in KINDS)
    ]
    if not losses:
        with pytest.raises(InfeasibleError):
            allocate(task, _Toy(worth))
        return
    found = allocate(task, _Toy(worth))
    assert found.loss == pytest.approx(min(losses)) == pytest.approx(found.rounds[0].predicted)


def _spread(layer: int, size: LayerSize) -> float:
    """Every KV head is precious, a third of the query heads is worth little; channels are precious as well."""
    if not (size.has_attention and size.has_mlp):
        return 100.0
    return 20.0 * (3 - size.kv_heads) + {3: 0.0, 2: 0.5, 1: 9.0}[_heads(size)] + 10.0 * (8 - size.channels)


def test_partial_groups_are_found_where_they_are_best() -> None:
    limits = (Limit.of_blocks("weight", _weight, 0.0, 3 * (12 + 8) - 9),)
    whole = allocate(Task(DENSE, Grid(4), limits), _Toy(_spread))
    fine = allocate(Task(DENSE, FINE, limits), _Toy(_spread))
    assert fine.structure == Structure((LayerSize(6, 3, 8),) * 3) and fine.loss == 1.5
    assert whole.loss > 20 and all(_heads(size) in (0, 3) for size in whole.structure)
    uniform = allocate(Task(DENSE, FINE, limits, uniform=True), _Toy(_spread))
    assert uniform.structure == fine.structure


def test_later_rounds_measure_the_neighbours_of_partial_groups() -> None:
    """The whole (groups, heads) neighbourhood of a layer with partial groups is measured, not predicted."""

    def worth(layer: int, size: LayerSize) -> float:
        if not (size.has_attention and size.has_mlp):
            return 100.0
        # both together hurt far more than their sum: the first tables cannot know
        groups, heads = 3 - size.kv_heads, 3 - _heads(size)
        return 2.0 * groups + 1.0 * heads + 30.0 * groups * heads + 10.0 * (8 - size.channels)

    toy = _Toy(worth)
    task = Task(DENSE, FINE, (Limit.of_blocks("weight", _weight, 0.0, 3 * (12 + 8) - 14),), rounds=4)
    found = allocate(task, toy)
    measured = {size for structure in toy.asked for size in structure if _heads(size) in (1, 2) and size.kv_heads < 3}
    assert measured, "options off the first chains were measured in the end"
    best = min(
        sum(worth(layer, size) for layer, size in enumerate(sizes))
        for sizes in product(
            [LayerSize(a.query_heads, a.kv_heads, 8) for a in levels(FULL, "attention", FINE)], repeat=3
        )
        if sum(size.query_heads + size.kv_heads for size in sizes) <= 36 - 14
    )
    assert found.loss == min(round_.loss for round_ in found.rounds) == pytest.approx(best)


def test_without_the_step_nothing_else_is_measured() -> None:
    asked = []
    for grid in (Grid(4), Grid(4, query_head_step=1)):
        dense = Structure.uniform(2, 3, 3, 8)  # one query head per KV head
        toy = _Toy(_spread_alike)
        allocate(Task(dense, grid, (Limit.of_blocks("weight", _weight, 0.0, 20.0),)), toy)
        asked.append(toy.asked)
    assert asked[0] == asked[1]
    toy = _Toy(_spread)
    allocate(Task(DENSE, Grid(4), (Limit.of_blocks("weight", _weight, 0.0, 45.0),)), toy)
    assert {_heads(alone(size, "attention")) for structure in toy.asked for size in structure} <= {0, 3}


def _spread_alike(layer: int, size: LayerSize) -> float:
    return (layer + 1.0) * (3 - size.kv_heads) + 0.5 * (8 - size.channels)


COSTS = Costs(DENSE, LayerCost(4, 10, 10, 4, 6, 10, 10, 6), 100, 2, 50, 2)


def test_a_greedy_step_may_drop_query_heads_of_every_group() -> None:
    one = DENSE.replace(0, LayerSize(2, 2, 8)).replace(2, LayerSize(2, 1, 8))
    sizes = [(layer, structure[layer]) for _, layer, structure in candidates("heads", one, FINE)]
    assert sizes == [
        (0, LayerSize(1, 1, 8)),
        (1, LayerSize(6, 2, 8)), (1, LayerSize(6, 3, 8)),
        (2, LayerSize(1, 1, 8)),
    ]  # fmt: skip
    problem = Problem(COSTS, 0.1, ("heads", "mlp", "blocks"), {"blocks": 0, "mlp": 0, "heads": 1}, FINE)
    toy = _Toy(_spread)
    steps = sequential_path(problem, dict.fromkeys(problem.order, toy))
    assert replay(DENSE, steps) == Structure((LayerSize(6, 3, 8),) * len(steps) + DENSE.layers[len(steps) :])
    assert steps[-1].ratio == pytest.approx(COSTS.ratio(replay(DENSE, steps)))
