"""Genomes: whatever is done to them, budget, alignment and the last blocks stay. No torch."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.config.recipe import Recipe
from multipruner.core.axes import DIMENSIONS
from multipruner.core.costs import BlockCost, Costs
from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.core.layout import Layout
from multipruner.core.structure import Structure
from multipruner.search.genome import CHANGES, StructureSpace
from multipruner.search.grid import Grid
from multipruner.search.ladder import Ladder
from multipruner.search.limits import Budget, Limit
from multipruner.search.objectives import CONSENT, check_objectives
from multipruner.search.schedule import Schedule, ScheduleSpace
from tests.support.layers import changed, layers_of, structure_of, uniform
from tests.support.toys import ANATOMY, COSTS, DENSE, costs_of

SMALL = uniform(2, 4, 2, 24)
SMALL_COSTS = costs_of(SMALL, 1000)
WIDE = uniform(4, 12, 3, 32)
"""Four query heads in every KV group."""


def _grid(group: int, step: int = 1, queries: int | None = None, *, partial: bool = False) -> Grid:
    steps = {"channels": group, "kv_groups": step, **({} if queries is None else {"queries": queries})}
    return Grid(steps, frozenset({"channels"} if partial else ()))


WHOLE = [_grid(8), _grid(16, 2), _grid(24, partial=True)]
"""Of whole KV groups."""
INNER = [_grid(8, queries=1), _grid(16, 2, 1), _grid(24, queries=1, partial=True)]
"""Query heads may leave inside the groups."""


def check(space: StructureSpace, structure: Structure, grid: Grid) -> None:
    """The three promises, computed anew here."""
    dense = space.ladder.dense
    assert structure.fits_in(dense)
    layers, steps = layers_of(structure), grid.steps
    assert any(size.kv_heads for size in layers)
    assert any(size.channels for size in layers)
    for size, full in zip(layers, layers_of(dense), strict=True):
        assert size.kv_heads % steps["kv_groups"] == 0
        if size.kv_heads:
            whole, each = full.query_heads // full.kv_heads, size.query_heads // size.kv_heads
            assert each >= 1 and (whole - each) % steps.get("queries", whole) == 0
        assert size.channels == 0 or (
            (full.channels - size.channels) % steps["channels"] == 0 and size.channels >= steps["channels"]
        )
    for bound in space.budget.bounds:
        assert bound.least <= bound.cost(structure) <= bound.limit


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.floats(0.05, 0.7), st.sampled_from(WHOLE + INNER))
def test_operators_keep_budget_alignment_and_the_last_blocks(seed: int, ratio: float, grid: Grid) -> None:
    rng = random.Random(seed)
    space = StructureSpace(ANATOMY, grid, Budget.from_ratio(COSTS, ratio, 0.02))
    parents = [space.random(rng) for _ in range(3)]
    children = [space.mutate(parents[0], rng, strength) for strength in (1, 1, 2, 4)]
    children += space.mate(parents[0], parents[1], rng) + space.mate(parents[2], children[0], rng)
    for structure in parents + children:
        check(space, structure, grid)
        assert space.holds(structure)
        assert abs(COSTS.ratio(structure) - ratio) <= 0.02 + 1e-9


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.floats(0.1, 0.6), st.integers(1, 3))
def test_every_mutation_keeps_the_budget_where_query_heads_leave_inside_groups(
    seed: int, ratio: float, queries: int
) -> None:
    """Each operator by itself, and the structures that it is brought back from."""
    costs, grid, rng = costs_of(WIDE, 3000), _grid(8, queries=queries), random.Random(seed)
    space = StructureSpace(WIDE, grid, Budget.from_ratio(costs, ratio, 0.02))
    one = space.random(rng)
    assert space.admit(one, rng) is one
    for change in CHANGES:
        levels = space.ladder.levels(one)
        getattr(space, f"_{change}")(levels, rng)
        assert all(0 <= level <= top for level, top in zip(levels, space.ladder.tops, strict=True))
        raw = space.ladder.structure(levels)
        check(StructureSpace(WIDE, grid), raw, grid)
        check(space, space.admit(raw, rng), grid)


@given(st.integers(0, 10**6), st.floats(0.3, 1.0), st.floats(0.2, 1.0), st.booleans(), st.sampled_from([None, 1]))
@settings(max_examples=50)
def test_any_upper_bounds_hold_together(
    seed: int, parameters: float, cache: float, fill: bool, queries: int | None
) -> None:
    bounds = (
        Limit("parameters", COSTS.parameters, parameters * COSTS.parameters(DENSE)),
        Limit("kv_bytes", COSTS.kv_bytes_per_token, cache * COSTS.kv_bytes_per_token(DENSE)),
    )
    grid = _grid(8, queries=queries)
    space, rng = StructureSpace(ANATOMY, grid, Budget(bounds, fill=fill)), random.Random(seed)
    one, other = space.random(rng), space.random(rng)
    for structure in (one, other, space.mutate(one, rng), *space.mate(one, other, rng)):
        check(space, structure, grid)
        if fill:  # nothing can grow by a group and still fit
            levels = space.ladder.levels(structure)
            for place, top in enumerate(space.ladder.tops):
                if levels[place] < top:
                    larger = space.ladder.structure([level + (place == i) for i, level in enumerate(levels)])
                    assert larger != structure and not space.budget.holds(larger)


def test_a_tight_budget_on_the_sizes_of_a_real_model_is_met() -> None:
    hidden, anatomy = 576, uniform(30, 9, 3, 1536)  # SmolLM2-135M
    wide, channels = Layout(str(hidden)), Layout("channels")
    queries, groups = Layout("kv_groups * queries * 64"), Layout("kv_groups * 64")
    attention = BlockCost("attention", {}, hidden, ((queries, wide), (groups, wide), (groups, wide), (wide, queries)))
    mlp = BlockCost("mlp", {}, hidden, ((channels, wide), (channels, wide), (wide, channels)))
    costs = Costs(anatomy, (attention, mlp) * 30, 49152 * hidden + hidden, 49152 * hidden, 2)
    assert costs.parameters(anatomy.dense) == 134_515_008
    for grid in (_grid(128), _grid(128, queries=1)):
        space, rng = StructureSpace(anatomy, grid, Budget.from_ratio(costs, 0.2, 0.0003)), random.Random(1)
        one, other = space.random(rng), space.random(rng)
        for structure in (one, other, space.mutate(one, rng), *space.mate(one, other, rng)):
            assert abs(costs.ratio(structure) - 0.2) <= 0.0003 + 1e-12


@pytest.mark.parametrize("queries", [None, 1])
def test_mutation_alone_reaches_every_structure_that_holds(queries: int | None) -> None:
    budget = Budget.from_ratio(SMALL_COSTS, 0.4, 0.08 if queries is None else 0.03)
    space, rng = StructureSpace(SMALL, _grid(8, queries=queries), budget), random.Random(0)
    everything = {
        space.ladder.structure(levels)
        for levels in product(*(range(top + 1) for top in space.ladder.tops))
        if space.holds(space.ladder.structure(levels))
    }
    assert len(everything) > 20
    here, seen = space.random(rng), set()
    for _ in range(4000):
        seen.add(here)
        here = space.mutate(here, rng)
    assert seen == everything


def test_operators_depend_on_the_generator_alone() -> None:
    space = StructureSpace(ANATOMY, _grid(8), Budget.from_ratio(COSTS, 0.3, 0.02))

    def walk() -> list[Structure]:
        rng = random.Random(5)
        found = [space.random(rng), space.random(rng)]
        for _ in range(10):
            found += space.mate(found[-1], space.mutate(found[-2], rng), rng)
        return found

    random.seed(1)
    before, first = random.getstate(), walk()
    random.random()
    assert walk() == first
    random.seed(1)
    assert random.getstate() == before


@given(st.integers(0, 10**6), st.sampled_from(WHOLE))
def test_levels_and_structures_translate_both_ways(seed: int, grid: Grid) -> None:
    ladder, rng = Ladder(ANATOMY, grid), random.Random(seed)
    levels = [rng.randint(0, top) for top in ladder.tops]
    assert ladder.levels(ladder.structure(levels)) == levels
    assert ladder.structure(ladder.tops) == DENSE


@given(st.integers(0, 10**6), st.sampled_from([*INNER, _grid(8, queries=2), _grid(8, queries=3)]))
def test_levels_of_an_inner_axis_translate_both_ways(seed: int, grid: Grid) -> None:
    """A block that is gone has no query heads: those levels stand at the dense one then."""
    anatomy = uniform(4, 16, 4, 48)
    ladder, rng = Ladder(anatomy, grid), random.Random(seed)
    assert len(ladder) == 3 * 4, "KV groups, query heads inside them and channels of every layer"
    levels = [rng.randint(0, top) for top in ladder.tops]
    structure = ladder.structure(levels)
    meant = list(levels)
    for rung, row in enumerate(ladder.rungs):
        first = [other.place for other in ladder.rungs].index(row.place)
        if not ladder.removes(rung) and not levels[first]:
            meant[rung] = ladder.tops[rung]
    assert ladder.levels(structure) == meant
    assert ladder.structure(meant) == structure
    assert ladder.structure(ladder.tops) == anatomy.dense
    for rung, row in enumerate(ladder.rungs):
        level = rng.randint(1, ladder.tops[rung])
        one = ladder.structure([level if other == rung else top for other, top in enumerate(ladder.tops)])
        changed_place = anatomy.dense[row.place]
        expected = (*changed_place[: row.axis], row.counts[level], *changed_place[row.axis + 1 :])
        assert one == anatomy.dense.replace(row.place, expected)
        for change in (-1, 1):
            if ladder.can(meant, rung, change):
                moved = [number + change * (other == rung) for other, number in enumerate(meant)]
                assert ladder.structure(moved) != structure, "something comes of every change that can be"


def test_uneven_groups_leave_from_the_end() -> None:
    ladder = Ladder(ANATOMY, _grid(24, partial=True))
    assert [ladder.structure([4, level, *ladder.tops[2:]])[1] for level in range(3)] == [(), (40,), (64,)]


def test_given_structures_are_admitted_as_they_are_or_moved_into_the_budget() -> None:
    space, rng = StructureSpace(ANATOMY, _grid(8), Budget.from_ratio(COSTS, 0.3, 0.02)), random.Random(3)
    inside = space.random(rng)
    assert space.admit(inside, rng) is inside
    for other in (DENSE, changed(DENSE, 0, (2, 1, 13)), changed(DENSE, 1, (0, 0, 64)), changed(DENSE, 2, (3, 3, 64))):
        check(space, space.admit(other, rng), _grid(8))
    for larger in (structure_of(*[(16, 8, 64)] * 6), structure_of(*[(8, 4, 64)] * 5)):
        with pytest.raises(ConfigError, match="larger than the dense"):
            space.admit(larger, rng)


def test_what_cannot_be_is_refused_with_the_nearest_value() -> None:
    with pytest.raises(InfeasibleError, match="parameters") as unreachable:
        StructureSpace(ANATOMY, _grid(8), Budget((Limit("parameters", COSTS.parameters, 5100),)))
    assert unreachable.value.nearest == 5000 + 10 + 300 + 10 + 240
    with pytest.raises(InfeasibleError, match="parameters") as finer:
        StructureSpace(ANATOMY, _grid(8, queries=1), Budget((Limit("parameters", COSTS.parameters, 5100),)))
    assert finer.value.nearest == 5000 + 10 + 200 + 10 + 240, "one query head on one KV head"
    tight = StructureSpace(ANATOMY, _grid(64, 4), Budget.from_ratio(COSTS, 0.2, 0.0001))
    with pytest.raises(InfeasibleError, match="wider tolerance") as between:
        tight.random(random.Random(0))
    assert between.value.nearest is not None
    with pytest.raises(ConfigError, match="divide"):
        StructureSpace(ANATOMY, _grid(7))
    with pytest.raises(ConfigError, match="ratio"):
        Budget.from_ratio(COSTS, 1.0)


SCHEDULES = ScheduleSpace((8, 16, 32), ("magnitude", "none"), (False, True))


@given(st.integers(0, 10**6))
def test_schedules_stay_permutations_and_shares_of_a_hundred(seed: int) -> None:
    rng = random.Random(seed)
    one, other = SCHEDULES.random(rng), SCHEDULES.random(rng)
    changed = SCHEDULES.mutate(one, rng, 2.0)
    assert changed != one
    for schedule in (one, other, changed, *SCHEDULES.mate(one, other, rng)):
        assert sorted(schedule.order) == sorted(DIMENSIONS)
        assert sum(schedule.shares) == 100
        assert SCHEDULES.admit(schedule, rng) == schedule
        assert SCHEDULES.from_json(SCHEDULES.to_json(schedule)) == schedule
        decoded = schedule.decode()
        assert decoded.pop("repair") in (False, True)
        recipe = Recipe.build({"model": "m", **decoded})
        assert (recipe.stages, recipe.channel_group) == (schedule.order, schedule.channel_group)


def test_schedules_that_walk_the_same_path_are_one() -> None:
    rng = random.Random(0)
    twins = [
        Schedule(("heads", "blocks", "mlp"), (100, 0, 0), 16, "none", True),
        Schedule(("mlp", "heads", "blocks"), (100, 0, 0), 32, "none", True),
    ]
    assert len({SCHEDULES.admit(twin, rng) for twin in twins}) == 1


def test_schedules_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="name each of"):
        Schedule(("mlp", "mlp", "heads"), (1, 1, 98), 8, "magnitude", False)
    for shares in ((50, 50, 1), (-1, 100, 1), (50, 50)):
        with pytest.raises(ConfigError, match="100 in all"):
            Schedule(DIMENSIONS, shares, 8, "magnitude", False)
    with pytest.raises(ConfigError, match="channel group 9"):
        SCHEDULES.admit(Schedule(DIMENSIONS, (1, 98, 1), 9, "magnitude", False), random.Random(0))
    with pytest.raises(ConfigError, match="importances"):
        ScheduleSpace((8,), ())


def test_every_mutation_of_a_schedule_happens() -> None:
    rng, base = random.Random(0), Schedule(("blocks", "mlp", "heads"), (44, 52, 4), 8, "magnitude", False)
    names = ("order", "shares", "channel_group", "importance", "compensation")
    changed = {name for _ in range(100) for name in names
               if getattr(SCHEDULES.mutate(base, rng), name) != getattr(base, name)}  # fmt: skip
    assert changed == set(names)


def test_tasks_are_no_objectives_unless_consent_is_typed() -> None:
    assert check_objectives(["loss", "params", "kv_bytes"]) == ("loss", "parameters", "kv_bytes")
    for task in ("arc_easy", "wikitext", "mmlu_stem", "hellaswag", "ppl"):
        for consent in (None, "", "yes"):
            with pytest.raises(ConfigError, match=r"evaluation task.*no longer a test.*calibration"):
                check_objectives(["loss", task], consent)
        assert check_objectives([task, "latency"], CONSENT.upper()) == (task, "latency")
    with pytest.raises(ConfigError, match="evaluation task"):
        check_objectives(["loss", "my_own_task"], is_task=lambda name: name == "my_own_task")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["los"], "did you mean 'loss'"),
        (["loss", "loss"], "once"),
        (["latency", "flops"], "smallest model"),
        ([], "loss"),
    ],
)
def test_objectives_that_cannot_be_meant_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_objectives(names, CONSENT)
