"""Laws of structures and plans."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.core.axes import BLOCK_KINDS
from multipruner.core.earlier import sizes_of_layer
from multipruner.core.errors import ConfigError
from multipruner.core.plan import BlockUnits, PruningPlan, Ranking
from multipruner.core.structure import GONE, Anatomy, Place, Size, Structure, total
from tests.support.layers import layers_of, structure_of, uniform
from tests.support.tiny import random_ranking, random_structure

layers = st.builds(
    lambda groups, per, channels: (groups * per, groups, channels),
    st.integers(0, 4), st.integers(1, 3), st.integers(0, 50),
)  # fmt: skip
"""Layers as version 1 wrote them: query heads, KV heads, channels."""
models = st.lists(layers, min_size=1, max_size=6)
structures = st.lists(st.lists(st.integers(1, 60), max_size=3).map(tuple), max_size=8).map(
    lambda sizes: Structure(tuple(sizes))
)


@st.composite
def anatomies(draw: st.DrawFn, *, along: bool | None = None) -> Anatomy:
    """Dense models whose layers differ, some of them with one block only; not all are of every kind. Sizes name every
    axis or those that every size does.
    """
    places, every = [], draw(st.booleans()) if along is None else along
    for layer in range(draw(st.integers(1, 5))):
        for kind in draw(st.sampled_from([("attention", "mlp"), ("mlp", "attention"), ("attention",), ("mlp",)])):
            axes = BLOCK_KINDS[kind].axes if every else BLOCK_KINDS[kind].always
            size = tuple(draw(st.integers(1, 40 if kind == "mlp" else 4)) for _ in axes)
            places.append(Place(layer, kind, size))
    return Anatomy(tuple(places), {"head_dim": 16})


@st.composite
def plans(draw: st.DrawFn, *, partial: bool = True) -> PruningPlan:
    """Plans of random rankings of random anatomies; without ``partial`` all query heads of a group stay."""
    anatomy, seed = draw(anatomies(along=None if partial else False)), draw(st.integers(0, 10**6))
    structure = random_structure(anatomy, seed, partial=partial, drop=0.4)
    ranking = random_ranking(anatomy, seed)
    return PruningPlan.from_structure(structure, ranking, anatomy, model="m", model_type="llama")


@given(structures)
def test_structure_round_trip(structure: Structure) -> None:
    written = json.loads(json.dumps(structure.to_json()))
    assert written == {"blocks": [list(size) for size in structure]}
    assert Structure.from_json(written) == structure
    assert hash(Structure.from_json(written)) == hash(structure)


@given(models)
def test_structures_of_version_1_are_the_same_blocks(rows: list[tuple[int, int, int]]) -> None:
    """A row of every layer then, attention and MLP in turn now."""
    structure = Structure.from_json([list(row) for row in rows])
    assert Structure.from_json(structure.to_json()) == structure
    for row, attention, mlp in zip(rows, structure.blocks[::2], structure.blocks[1::2], strict=True):
        heads, groups, channels = row
        assert (total("attention", attention, "queries"), total("attention", attention, "kv_groups")) == (heads, groups)
        assert total("mlp", mlp, "channels") == channels
        assert (bool(attention), bool(mlp)) == (groups > 0, channels > 0)
        assert sizes_of_layer(row) == (attention, mlp)
    assert layers_of(structure) == rows


@settings(max_examples=60)
@given(plans())
def test_plan_round_trip_to_the_byte(plan: PruningPlan) -> None:
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert plan.structure.fits_in(plan.dense)
    assert json.loads(plan.to_json())["version"] == (4 if plan.along else 2)


def _ranges(indices: Any) -> str:
    return ",".join(map(str, indices))


@settings(max_examples=60)
@given(st.lists(layers.filter(all), min_size=1, max_size=4), st.integers(0, 10**6))
def test_plans_of_version_1_are_the_same_plan(rows: list[tuple[int, int, int]], seed: int) -> None:
    """Written out by hand as version 1 wrote it: query heads by their number in the layer."""
    anatomy = Anatomy(tuple(Place(layer, *block) for layer, row in enumerate(rows)
                            for block in zip(("attention", "mlp"), sizes_of_layer(row), strict=True)))  # fmt: skip
    structure = random_structure(anatomy, seed, partial=True, drop=0.4)
    plan = PruningPlan.from_structure(structure, random_ranking(anatomy, seed), anatomy, model="m", model_type="llama")
    kept = []
    for layer, (heads, groups, _) in enumerate(rows):
        attention, mlp = plan.kept(2 * layer), plan.kept(2 * layer + 1)
        pairs: Any = zip(attention["kv_groups"], attention["queries"], strict=True)  # type: ignore[arg-type]
        numbers = [group * (heads // groups) + query for group, inside in pairs for query in inside]
        kept.append({"query_heads": _ranges(numbers), "kv_heads": _ranges(attention["kv_groups"]),
                     "channels": _ranges(mlp["channels"])})  # fmt: skip
    base = {"name": "m", "revision": None, "fingerprint": None, "model_type": "llama"}
    record = {"format": "multipruner-plan", "version": 1, "base_model": base, "dense": rows, "layers": kept}
    assert PruningPlan.from_json(json.dumps(record)) == plan


@given(plans())
def test_a_plan_keeps_the_first_units_of_its_ranking_in_the_dense_order(plan: PruningPlan) -> None:
    for place, kept, size in zip(plan.anatomy, plan.blocks, plan.structure, strict=True):
        assert kept.size == size
        for axis, units in zip(BLOCK_KINDS[place.kind].axes, kept.axes, strict=False):
            for row in units if axis.within else (units,):
                assert list(row) == sorted(row)  # type: ignore[arg-type]


@settings(max_examples=60)
@given(anatomies(), st.integers(0, 10**6), st.data())
def test_units_are_nested(anatomy: Anatomy, seed: int, data: st.DataObject) -> None:
    """Whatever the ranking, a smaller structure's plan keeps a part of what a larger one's keeps, on every axis."""
    ranking, larger = random_ranking(anatomy, seed), random_structure(anatomy, seed, partial=True)

    def less(size: Size) -> Size:
        return tuple(data.draw(st.integers(1, count)) for count in size) if data.draw(st.booleans()) else GONE

    smaller = Structure(tuple(map(less, larger)))
    cut, whole = (
        PruningPlan.from_structure(structure, ranking, anatomy, model="m", model_type="llama")
        for structure in (smaller, larger)
    )
    assert (cut.structure, whole.structure) == (smaller, larger)
    for place, few, many in zip(anatomy, cut.blocks, whole.blocks, strict=True):
        if not few.axes:
            continue
        if place.kind == "mlp":
            assert set(few.axes[0]) <= set(many.axes[0])
            continue
        order = ranking.blocks[anatomy.at(place.layer, place.kind)].axes
        assert set(few.axes[0]) == set(order[0][: len(few.axes[0])])
        for axis in range(1, len(few.axes)):
            inside = dict(zip(many.axes[0], many.axes[axis], strict=True))
            for group, units in zip(few.axes[0], few.axes[axis], strict=True):
                assert set(units) <= set(inside[group])  # type: ignore[arg-type]
                assert set(units) == set(order[axis][group][: few.size[axis]])  # type: ignore[arg-type, index]


def test_sizes_that_cannot_be_are_refused() -> None:
    for bad in ((4, 0, 1), (0, 2, 1), (3, 2, 1), (-1, -1, 1)):
        with pytest.raises(ConfigError):
            structure_of(bad)
    for size in ((0,), (2, 0), (-1, 2)):
        with pytest.raises(ConfigError, match="at least one of everything"):
            Structure((size,))
    for value in ({"blocks": [[1.5]]}, {"blocks": [[True]]}, {"blocks": ["12"]}, {}, [[1, 1]], 7):
        with pytest.raises((KeyError, TypeError, ValueError)):
            Structure.from_json(value)


@given(anatomies(), st.integers(0, 10**6))
def test_an_anatomy_finds_its_blocks_and_counts_them(anatomy: Anatomy, seed: int) -> None:
    structure = random_structure(anatomy, seed, partial=True, drop=0.5)
    for number, place in enumerate(anatomy):
        assert anatomy.at(place.layer, place.kind) == number
        assert number in anatomy.of_kind(place.kind) and number in anatomy.of_layer(place.layer)
        for size in (place.dense, GONE):
            assert structure.replace(number, size)[number] == size
    assert anatomy.dense.fits_in(anatomy.dense) and anatomy.empty.fits_in(anatomy.dense)
    assert anatomy.layers == 1 + max(place.layer for place in anatomy)
    assert sum(anatomy.count(structure, kind) for kind in anatomy.kinds) == sum(map(bool, structure))
    living = [layer for layer in range(anatomy.layers) if any(structure[n] for n in anatomy.of_layer(layer))]
    assert anatomy.living_layers(structure) == living
    rest = anatomy.of_layers(living)
    assert rest.layers == len(living) and rest.constants == anatomy.constants
    assert rest.dense == Structure(tuple(p.dense for p in anatomy if p.layer in living))
    heads = sum(size[0] * size[1] for place, size in zip(anatomy, structure, strict=True)
                if place.kind == "attention" and size)  # fmt: skip
    assert anatomy.total(structure, "queries") == heads
    with pytest.raises(KeyError, match="layer 99"):
        anatomy.at(99, "mlp")


ONE_LAYER = uniform(1, 4, 2, 8)
WHOLE = BlockUnits((tuple(range(8)),))


@pytest.mark.parametrize(
    ("attention", "mlp"),
    [
        (((0,), ((0, 1),)), ((1, 0),)),  # not ascending
        (((0,), ((0, 1),)), ((0, 9),)),  # out of range
        (((0,), ((0, 2),)), ((0,),)),  # a query head that the group has not
        (((0, 1), ((0, 1), (0,))), ((0,),)),  # unequal groups
        (((0, 1), ((0, 1),)), ((0,),)),  # a group without query heads
        (((), ((0,),)), ((0,),)),  # query heads without KV heads
        (((0,), ((),)), ((0,),)),  # a group that keeps none
        (((0,),), ((0,),)),  # KV groups alone
        (((0,), (0, 1)), ((0,),)),  # not by group
    ],
)
def test_plans_that_cannot_be_are_refused(attention: Any, mlp: Any) -> None:
    with pytest.raises(ConfigError):
        PruningPlan("m", None, None, "llama", ONE_LAYER, (BlockUnits(attention), BlockUnits(mlp)))


def test_query_heads_inside_groups_may_go_when_evenly() -> None:
    kept = BlockUnits(((0, 1), ((0,), (1,))))
    plan = PruningPlan("m", None, None, "llama", ONE_LAYER, (kept, WHOLE))
    assert plan.structure == structure_of((2, 2, 8)) == Structure(((2, 1), (8,)))


def test_a_plan_is_of_its_models_blocks() -> None:
    with pytest.raises(ConfigError, match="1 blocks, the dense model 2"):
        PruningPlan("m", None, None, "llama", ONE_LAYER, (WHOLE,))
    with pytest.raises(ConfigError, match="larger than the dense model"):
        PruningPlan.from_structure(
            structure_of((4, 2, 9)), Ranking.identity(ONE_LAYER), ONE_LAYER, model="m", model_type="llama"
        )


def test_text_that_is_no_plan_is_refused() -> None:
    plan = PruningPlan.from_structure(
        structure_of((2, 1, 4)), Ranking.identity(ONE_LAYER), ONE_LAYER, model="m", model_type="llama"
    )
    text = plan.to_json()
    assert PruningPlan.from_json(text) == plan
    for bad in ("", "{}", "[]", text.replace('"version": 2', '"version": 9'), text[:-30],
                text.replace('"0-3"', '"0-99999999999"')):  # fmt: skip
        assert bad != text
        with pytest.raises(ConfigError):
            PruningPlan.from_json(bad)
    with pytest.raises(ConfigError, match="kind 'rotor': a newer multipruner"):
        PruningPlan.from_json(text.replace('"kind": "mlp"', '"kind": "rotor"'))
