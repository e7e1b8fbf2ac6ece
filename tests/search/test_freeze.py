"""Blocks that are to stay whole are as wide as in the dense model, whoever looks for a structure. No torch."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multipruner.config.amounts import frozen_blocks
from multipruner.config.recipe import Recipe
from multipruner.core.axes import DIMENSIONS
from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.core.structure import Anatomy, Structure
from multipruner.search import Grid, candidates, replay, sequential_path
from multipruner.search.grid import aligned
from multipruner.search.options import chains, levels
from tests.support.toys import ANATOMY, COSTS, DENSE, Additive, by_evolution, by_program, problem

KINDS = ("attention", "mlp")
blocks = st.frozensets(st.tuples(st.sampled_from(["", *KINDS]), st.integers(0, 5)), max_size=5)


def grid_with(frozen: frozenset[tuple[str, int]], **steps: int) -> Grid:
    try:
        return Grid({"channels": 8, "kv_groups": 1, **steps}, frozen=frozen).of_model(ANATOMY)
    except ConfigError:
        assume(False)
        raise


def kept(structure: Structure, grid: Grid) -> bool:
    return all(size == place.dense for place, size in zip(ANATOMY, structure, strict=True) if grid.freezes(place))


def by_path(grid: Grid, ratio: float) -> Structure:
    asked = problem(ratio, grid=grid)
    return replay(ANATOMY, sequential_path(asked, dict.fromkeys(DIMENSIONS, Additive())))


@settings(max_examples=25, deadline=None)
@given(blocks, st.floats(0.05, 0.5), st.integers(0, 10**6), st.booleans())
def test_a_frozen_block_is_as_wide_as_the_dense_one(
    frozen: frozenset[tuple[str, int]], ratio: float, seed: int, uniform: bool
) -> None:
    grid = grid_with(frozen)
    with suppress(InfeasibleError):
        assert kept(by_program(grid, ratio, uniform), grid)
    with suppress(InfeasibleError):
        assert kept(by_path(grid, ratio), grid)
    with suppress(InfeasibleError):
        for structure in by_evolution(grid, ratio, seed, replace(grid, frozen=frozenset()), 0.02):
            assert kept(structure, grid)
            assert abs(COSTS.ratio(structure) - ratio) <= 0.02 + 1e-9


@given(blocks)
def test_a_frozen_block_has_one_option(frozen: frozenset[tuple[str, int]]) -> None:
    grid = grid_with(frozen, queries=1)
    for place in ANATOMY:
        if grid.freezes(place):
            assert levels(place, grid) == (place.dense,) and chains(place, grid, place.dense) == ((place.dense,),)
        else:
            assert len(levels(place, grid)) > 2
    moved = {move[0] for dimension in DIMENSIONS for move in candidates(dimension, DENSE, ANATOMY, grid)}
    assert moved == {number for number, place in enumerate(ANATOMY) if not grid.freezes(place)}


def test_steps_need_to_divide_what_may_change_alone() -> None:
    odd = Grid({"channels": 24, "kv_groups": 1})
    with pytest.raises(ConfigError, match="24 does not divide"):
        odd.check(ANATOMY)
    frozen = frozenset(("mlp", layer) for layer in range(6))
    replace(odd, frozen=frozen).of_model(ANATOMY).check(ANATOMY)


def test_what_is_typed() -> None:
    assert frozen_blocks("0, 1,29") == {("", 0), ("", 1), ("", 29)}
    assert frozen_blocks("attention:0-2,mlp:29") == {*(("attention", n) for n in range(3)), ("mlp", 29)}
    assert frozen_blocks(None) == frozenset()
    assert Recipe.build({"model": "a", "freeze": [0, "mlp:3"]}).freeze == "0,mlp:3"
    assert Recipe.build({"model": "a", "freeze": 29}).freeze == "29"
    again = Recipe.build(Recipe.build({"model": "a", "freeze": "1,attention:0-3"}).model_dump())
    assert again.freeze == "1,attention:0-3"


@pytest.mark.parametrize("text", ["", "x", "1,", "3-1", "-1", "1:2", "heads:0", "mlp:", "attention:a-b"])
def test_what_cannot_be_meant_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="freeze"):
        Recipe.build({"model": "a", "freeze": text})


@pytest.mark.parametrize(
    ("frozen", "message"),
    [({("", 6)}, "no layer 6; its layers are 0 to 5"), ({("mixer", 0)}, "no mixer block in layer 0"),
     ({("", layer) for layer in range(6)}, "all blocks of the model")],
)  # fmt: skip
def test_blocks_that_no_model_has_are_refused(frozen: set[tuple[str, int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Grid({"channels": 8}, frozen=frozenset(frozen)).of_model(ANATOMY)


def test_an_alignment_asks_nothing_of_what_is_frozen() -> None:
    """One odd width that nothing leaves neither refuses an alignment nor makes its steps coarser."""
    odd = Anatomy(tuple(
        replace(place, dense=(66,)) if (place.kind, place.layer) == ("mlp", 0) else place for place in ANATOMY
    ), ANATOMY.constants)  # fmt: skip
    grid = Grid({"channels": 8}, frozen=frozenset({("mlp", 0)})).of_model(odd)
    with pytest.raises(ConfigError, match="align 4"):
        aligned(replace(grid, frozen=frozenset()), odd, 4)
    assert aligned(grid, odd, 4).steps["channels"] == aligned(grid, ANATOMY, 4).steps["channels"]
