"""Searches that may take query heads out of KV groups: their grid, their options, what is measured, what is found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.core.costs import BlockCost, Costs
from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.core.layout import Layout
from multipruner.core.objective import Choice, best_two
from multipruner.core.structure import GONE, Place, Size, Structure
from multipruner.search import Grid, Limit, Problem, Task, allocate, candidates, replay, sequential_path
from multipruner.search.options import chains, levels, predicted
from tests.support.layers import Layer, changed, layers_of, structure_of, uniform

FULL = Place(0, "attention", (3, 3))
ANATOMY = uniform(3, 9, 3, 8)


def _grid(group: int, step: int = 1, queries: int | None = None) -> Grid:
    return Grid({"channels": group, "kv_groups": step, **({} if queries is None else {"queries": queries})})


WHOLE, FINE = _grid(4), _grid(4, queries=1)


class _Toy:
    """A loss that is a sum over layers; remembers what it was asked."""

    def __init__(self, worth: Callable[[int, Layer], float]) -> None:
        self.worth = worth
        self.asked: list[Structure] = []

    def __call__(self, structure: Structure) -> float:
        self.asked.append(structure)
        return sum(self.worth(layer, size) for layer, size in enumerate(layers_of(structure)))

    def commit(self, structure: Structure) -> None:
        pass

    def argmin(self, structures: Sequence[Structure], progress: object = None) -> Choice:
        return best_two(structures, [self(structure) for structure in structures])


def _heads(size: Layer) -> int:
    """Query heads in every KV group."""
    return size.query_heads // size.kv_heads if size.kv_heads else 0


def _weight(block: int, size: Size) -> float:
    """Query heads and KV heads, or channels."""
    return float(size[0] * size[1] + size[0] if len(size) == 2 else sum(size))


def test_a_group_keeps_one_query_head_at_least_and_steps_that_fit_none_are_refused() -> None:
    llama, smollm, mha = uniform(2, 32, 8, 8), uniform(2, 9, 3, 8), uniform(2, 8, 8, 8)
    assert _grid(8, queries=1).of(llama[0])[1] == (1, 2, 3, 4)
    assert _grid(8, queries=3).of(llama[0])[1] == (1, 4)
    assert _grid(8, queries=2).of(smollm[0])[1] == (1, 3)
    assert _grid(8).of(llama[0])[1] == (4,) and _grid(8, queries=1).of(llama[1]) == ((8,),)
    for anatomy, most in ((llama, 3), (smollm, 2), (mha, 1)):
        _grid(8, queries=most).check(anatomy)
        with pytest.raises(
            ConfigError, match=rf"query head step {most + 1} .* give {'1 to ' if most > 1 else ''}{most}"
        ):
            _grid(8, queries=most + 1).check(anatomy)


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))
def test_options_are_all_pairs_by_their_number_of_parameters(groups: int, per: int, step: int, fewer: int) -> None:
    full, grid = Place(0, "attention", (groups, per)), _grid(4, step, fewer)
    sizes = levels(full, grid)
    whole = levels(full, _grid(4, step))
    assert sizes[0] == GONE and sizes[-1] == full.dense and len(set(sizes)) == len(sizes)
    assert set(whole) <= set(sizes)
    assert set(sizes[1:]) == {(size[0], queries) for size in whole[1:] for queries in range(per, 0, -fewer)}
    cost = BlockCost("attention", {}, 7, ((Layout("kv_groups * queries * 20"),), (Layout("kv_groups * 20"),)))
    parameters = [cost(size).parameters for size in sizes]
    assert sorted(parameters) == parameters
    if per == 1:
        assert sizes == whole, "one query head per KV head: nothing changes"
    for current in sizes:
        through = chains(full, grid, current)
        assert all(current in chain and set(chain) <= set(sizes) for chain in through)
        tables = [dict.fromkeys(chain, 0.0) for chain in through]
        assert set(predicted(tables, full, grid, current)) == set(sizes), "every option has a prediction"


def test_off_the_chains_increases_add_up() -> None:
    groups, heads = chains(FULL, FINE, (3, 3))
    assert groups == (GONE, (1, 3), (2, 3), (3, 3))
    assert heads == ((3, 1), (3, 2), (3, 3))
    rows = predicted(
        [dict(zip(groups, (9.0, 4.0, 1.0, 0.0), strict=True)), dict(zip(heads, (2.0, 0.5, 0.0), strict=True))],
        FULL, FINE, (3, 3),
    )  # fmt: skip
    assert rows[2, 1] == 1.0 + 2.0 and rows[1, 2] == 4.0 + 0.5
    assert rows[GONE] == 9.0 and rows[3, 3] == 0.0 and len(rows) == 10
    (groups,) = chains(FULL, FINE, GONE)
    rows = predicted([dict(zip(groups, (0.0, -1.0, -2.0, -3.0), strict=True))], FULL, FINE, GONE)
    assert rows[1, 2] == pytest.approx(-2 / 3) and rows[3, 1] == pytest.approx(-1)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=10, max_size=10), st.integers(3, 30))
def test_the_first_round_is_the_best_of_all_where_losses_add_up(numbers: list[int], most: int) -> None:
    """Groups, heads in them and channels cost on their own, and so few are there that all of the chains is measured."""
    anatomy = uniform(2, 6, 2, 8)

    def worth(layer: int, size: Layer) -> float:
        group, head, attention, channel, mlp = numbers[5 * layer : 5 * layer + 5]
        lost = channel * (8 - size.channels) / 4 + mlp * (not size.channels)
        return lost + (group * (2 - size.kv_heads) + head * (3 - _heads(size)) if size.kv_heads else attention)

    task = Task(anatomy, FINE, (Limit.of_blocks("weight", _weight, 0.0, most),), rounds=0)
    options = layers_of(Structure(tuple(s for pair in product(task.levels(0), task.levels(1)) for s in pair)))
    losses = [
        sum(worth(layer, size) for layer, size in enumerate(sizes))
        for sizes in product(options, repeat=2)
        if sum(size.query_heads + size.kv_heads + size.channels for size in sizes) <= most
        and any(size.kv_heads for size in sizes)
        and any(size.channels for size in sizes)
    ]
    if not losses:
        with pytest.raises(InfeasibleError):
            allocate(task, _Toy(worth))
        return
    found = allocate(task, _Toy(worth))
    assert found.loss == pytest.approx(min(losses)) == pytest.approx(found.rounds[0].predicted)


def _spread(layer: int, size: Layer) -> float:
    """Every KV head is precious, a third of the query heads is worth little; channels are precious as well."""
    if not (size.kv_heads and size.channels):
        return 100.0
    return 20.0 * (3 - size.kv_heads) + {3: 0.0, 2: 0.5, 1: 9.0}[_heads(size)] + 10.0 * (8 - size.channels)


def test_partial_groups_are_found_where_they_are_best() -> None:
    limits = (Limit.of_blocks("weight", _weight, 0.0, 3 * (12 + 8) - 9),)
    whole = allocate(Task(ANATOMY, WHOLE, limits), _Toy(_spread))
    fine = allocate(Task(ANATOMY, FINE, limits), _Toy(_spread))
    assert fine.structure == structure_of(*[(6, 3, 8)] * 3) and fine.loss == 1.5
    assert whole.loss > 20 and all(_heads(size) in (0, 3) for size in layers_of(whole.structure))
    alike = allocate(Task(ANATOMY, FINE, limits, uniform=True), _Toy(_spread))
    assert alike.structure == fine.structure


def test_later_rounds_measure_the_neighbours_of_partial_groups() -> None:
    """The whole (groups, heads) neighbourhood of a layer with partial groups is measured, not predicted."""

    def worth(layer: int, size: Layer) -> float:
        if not (size.kv_heads and size.channels):
            return 100.0
        # both together hurt far more than their sum: the first tables cannot know
        groups, heads = 3 - size.kv_heads, 3 - _heads(size)
        return 2.0 * groups + 1.0 * heads + 30.0 * groups * heads + 10.0 * (8 - size.channels)

    toy = _Toy(worth)
    task = Task(ANATOMY, FINE, (Limit.of_blocks("weight", _weight, 0.0, 3 * (12 + 8) - 14),), rounds=4)
    found = allocate(task, toy)
    asked = {size for structure in toy.asked for size in layers_of(structure)}
    measured = {size for size in asked if _heads(size) in (1, 2) and size.kv_heads < 3}
    assert measured, "options off the first chains were measured in the end"
    best = min(
        sum(worth(layer, size) for layer, size in enumerate(sizes))
        for sizes in product(layers_of(Structure(tuple(s for a in levels(FULL, FINE) for s in (a, (8,))))), repeat=3)
        if sum(size.query_heads + size.kv_heads for size in sizes) <= 36 - 14
    )
    assert found.loss == min(round_.loss for round_ in found.rounds) == pytest.approx(best)


def test_without_the_step_nothing_else_is_measured() -> None:
    asked = []
    for grid in (WHOLE, FINE):
        anatomy = uniform(2, 3, 3, 8)  # one query head per KV head
        toy = _Toy(_spread_alike)
        allocate(Task(anatomy, grid, (Limit.of_blocks("weight", _weight, 0.0, 20.0),)), toy)
        asked.append(toy.asked)
    assert asked[0] == asked[1]
    toy = _Toy(_spread)
    allocate(Task(ANATOMY, WHOLE, (Limit.of_blocks("weight", _weight, 0.0, 45.0),)), toy)
    assert {_heads(size) for structure in toy.asked for size in layers_of(structure)} <= {0, 3}


def _spread_alike(layer: int, size: Layer) -> float:
    return (layer + 1.0) * (3 - size.kv_heads) + 0.5 * (8 - size.channels)


_QUERIES, _GROUPS = Layout("kv_groups * queries"), Layout("kv_groups")
_ATTENTION = BlockCost("attention", {}, 4, ((_QUERIES, Layout("10")), (_GROUPS, Layout("10"))))
_MLP = BlockCost("mlp", {}, 4, ((Layout("channels"), Layout("6")),))
COSTS = Costs(ANATOMY, (_ATTENTION, _MLP) * 3, 100, 50, 2)


def test_a_greedy_step_may_drop_query_heads_of_every_group() -> None:
    one = changed(changed(ANATOMY.dense, 0, (2, 2, 8)), 2, (2, 1, 8))
    moves = candidates("heads", one, ANATOMY, FINE)
    sizes = [(ANATOMY[block].layer, layers_of(one.replace(block, size))[block // 2]) for block, size in moves]
    assert sizes == [
        (0, (1, 1, 8)),
        (1, (6, 2, 8)), (1, (6, 3, 8)),
        (2, (1, 1, 8)),
    ]  # fmt: skip
    problem = Problem(COSTS, 0.1, ("heads", "mlp", "blocks"), {"blocks": 0, "mlp": 0, "heads": 1}, FINE)
    toy = _Toy(_spread)
    steps = sequential_path(problem, dict.fromkeys(problem.order, toy))
    assert replay(ANATOMY, steps) == structure_of(*[(6, 3, 8)] * len(steps), *layers_of(ANATOMY.dense)[len(steps) :])
    assert steps[-1].ratio == pytest.approx(COSTS.ratio(replay(ANATOMY, steps)))
