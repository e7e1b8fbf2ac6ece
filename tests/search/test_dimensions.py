"""Where only some dimensions may shrink, the others stay as they are, whoever looks for a structure. No torch."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.config.recipe import Recipe
from multipruner.core.axes import DIMENSIONS
from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.core.structure import GONE, Anatomy, Structure
from multipruner.search import Grid, candidates
from multipruner.search.ladder import Ladder
from multipruner.search.options import chains, levels
from tests.support.layers import cut_dimensions
from tests.support.toys import ANATOMY, COSTS, DENSE, by_evolution, by_program

STEPS = {"mlp": {"channels": 8}, "heads": {"kv_groups": 1, "queries": 1}}
some = st.sets(st.sampled_from(DIMENSIONS), min_size=1)
FROZEN = frozenset({("mlp", 1), ("attention", 2)})


def grid_of(dimensions: Collection[str], frozen: frozenset[tuple[str, int]] = frozenset()) -> Grid:
    steps = {name: step for one in dimensions for name, step in STEPS.get(one, {}).items()}
    return Grid(steps, frozen=frozen, whole="blocks" in dimensions).of_model(ANATOMY)


def kept(structure: Structure, dimensions: Collection[str]) -> bool:
    """Whether nothing left but what may."""
    return cut_dimensions(ANATOMY, structure) <= {*dimensions}


@settings(max_examples=40, deadline=None)
@given(some, st.floats(0.02, 0.6), st.integers(0, 10**6), st.booleans())
def test_what_may_not_shrink_stays(dimensions: set[str], ratio: float, seed: int, uniform: bool) -> None:
    grid = grid_of(dimensions)
    with suppress(InfeasibleError):
        found = by_program(grid, ratio, uniform)
        assert kept(found, dimensions) and COSTS.ratio(found) >= ratio - 1e-9
    with suppress(InfeasibleError):
        for structure in by_evolution(grid, ratio, seed, grid_of(DIMENSIONS), 0.05):
            assert kept(structure, dimensions)
            assert abs(COSTS.ratio(structure) - ratio) <= 0.05 + 1e-9


@given(some, st.booleans(), st.data())
def test_levels_are_the_options_of_every_block(dimensions: set[str], frozen: bool, data: st.DataObject) -> None:
    grid = grid_of(dimensions, FROZEN if frozen else frozenset())
    ladder = Ladder(ANATOMY, grid)
    chosen = [data.draw(st.integers(0, top)) for top in ladder.tops]
    structure = ladder.structure(chosen)
    assert ladder.structure(ladder.levels(structure)) == structure and kept(structure, dimensions)
    assert all(size in levels(place, grid) for place, size in zip(ANATOMY, structure, strict=True))
    for kind in ANATOMY.kinds:
        assert ladder.blocks(chosen, kind) == ANATOMY.count(structure, kind)
    for rung, top in enumerate(ladder.tops):
        for change in (-1, 1):
            if ladder.can(chosen, rung, change):
                after = [level + change * (number == rung) for number, level in enumerate(chosen)]
                gone = not structure[ladder.rungs[rung].place]
                assert 0 <= after[rung] <= top and (gone or ladder.structure(after) != structure)


@given(some)
def test_options_and_steps_are_of_the_dimensions_that_may_shrink(dimensions: set[str]) -> None:
    grid = grid_of(dimensions)
    for place in ANATOMY:
        own, (first, *_) = levels(place, grid), chains(place, grid, place.dense)
        assert own[-1] == place.dense == first[-1] and len(set(own)) == len(own)
        assert (GONE in own) == (GONE in first) == ("blocks" in dimensions)
    for dimension in DIMENSIONS:
        found = candidates(dimension, DENSE, ANATOMY, grid)
        assert bool(found) == (dimension in dimensions)
        assert all(kept(DENSE.replace(*move), dimensions) for move in found)


def test_a_narrower_grid_is_another_one() -> None:
    grid = grid_of(("mlp", "heads"))
    assert grid.to_json() != replace(grid, whole=True).to_json() == grid_of(DIMENSIONS).to_json()


def test_a_model_without_any_of_them_is_refused() -> None:
    only = Anatomy(tuple(place for place in ANATOMY if place.kind == "mlp"), ANATOMY.constants)
    with pytest.raises(ConfigError, match=r"nothing of this model is of them.* mlp, and whole ones leave with blocks"):
        Grid({"kv_groups": 1}, whole=False).of_model(only)


def test_they_are_typed_in_any_order() -> None:
    recipe = Recipe.build({"model": "a", "dimensions": "heads, blocks"})
    assert recipe.dimensions == ("blocks", "heads")
    assert Recipe.build(recipe.model_dump()).dimensions == ("blocks", "heads")
    assert Recipe.build({"model": "a"}).dimensions == DIMENSIONS
    for wrong in ("", "depth", []):
        with pytest.raises(ConfigError, match="dimensions"):
            Recipe.build({"model": "a", "dimensions": wrong})
    with pytest.raises(ConfigError, match="--dimensions needs --method program"):
        Recipe.build({"model": "a", "method": "greedy", "dimensions": "mlp"})
