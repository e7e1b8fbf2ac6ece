"""Laws of structures and plans."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.core.errors import ConfigError
from multipruner.core.plan import KeptLayer, LayerRanking, PruningPlan, Ranking
from multipruner.core.structure import LayerSize, Structure

sizes = st.builds(
    lambda groups, per, channels: LayerSize(groups * per, groups, channels),
    st.integers(0, 4), st.integers(1, 3), st.integers(0, 50),
)  # fmt: skip
structures = st.lists(sizes, min_size=1, max_size=6).map(lambda rows: Structure(tuple(rows)))


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    layers, groups, per, channels = (draw(st.integers(1, n)) for n in (5, 4, 3, 40))
    dense = Structure.uniform(layers, groups * per, groups, channels)
    ranking = Ranking(
        tuple(
            LayerRanking(tuple(draw(st.permutations(range(groups)))), tuple(draw(st.permutations(range(channels)))))
            for _ in range(layers)
        )
    )
    kept = [draw(st.integers(0, groups)) for _ in range(layers)]
    widths = [draw(st.integers(0, channels)) for _ in range(layers)]
    structure = Structure(tuple(LayerSize(k * per, k, w) for k, w in zip(kept, widths, strict=True)))
    return PruningPlan.from_structure(structure, ranking, dense, model="m", model_type="llama")


@given(structures)
def test_structure_round_trip(structure: Structure) -> None:
    assert Structure.from_json(structure.to_json()) == structure
    assert hash(Structure.from_json(structure.to_json())) == hash(structure)


@settings(max_examples=60)
@given(plans())
def test_plan_round_trip_to_the_byte(plan: PruningPlan) -> None:
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()
    assert plan.structure.fits_in(plan.dense)


@settings(max_examples=40)
@given(plans(), st.data())
def test_widths_are_nested(plan: PruningPlan, data: st.DataObject) -> None:
    ranking = Ranking.identity(plan.dense)
    smaller = Structure(
        tuple(LayerSize(s.query_heads, s.kv_heads, data.draw(st.integers(0, s.channels))) for s in plan.structure)
    )
    cut = PruningPlan.from_structure(smaller, ranking, plan.dense, model="m", model_type="llama")
    whole = PruningPlan.from_structure(plan.structure, ranking, plan.dense, model="m", model_type="llama")
    for a, b in zip(cut.layers, whole.layers, strict=True):
        assert set(a.channels) <= set(b.channels)


def test_sizes_that_cannot_be_are_refused() -> None:
    for bad in ((4, 0, 1), (0, 2, 1), (3, 2, 1), (-1, -1, 1)):
        with pytest.raises(ConfigError):
            LayerSize(*bad)


@pytest.mark.parametrize(
    "kept",
    [
        KeptLayer((0, 1), (0,), (1, 0)),  # not ascending
        KeptLayer((0, 1), (0,), (0, 9)),  # out of range
        KeptLayer((0, 2), (0,), (0,)),  # a query head of a group that is gone
        KeptLayer((0, 1, 2), (0, 1), (0,)),  # unequal groups
        KeptLayer((0,), (), (0,)),  # query heads without KV heads
    ],
)
def test_plans_that_cannot_be_are_refused(kept: KeptLayer) -> None:
    with pytest.raises(ConfigError):
        PruningPlan("m", None, None, "llama", Structure.uniform(1, 4, 2, 8), (kept,))


def test_query_heads_inside_groups_may_go_when_evenly() -> None:
    plan = PruningPlan(
        "m", None, None, "llama", Structure.uniform(1, 4, 2, 8), (KeptLayer((0, 3), (0, 1), tuple(range(8))),)
    )
    assert plan.structure[0] == LayerSize(2, 2, 8)


def test_text_that_is_no_plan_is_refused() -> None:
    plan = PruningPlan.from_structure(
        Structure.uniform(1, 2, 1, 4), Ranking.identity(Structure.uniform(1, 4, 2, 8)),
        Structure.uniform(1, 4, 2, 8), model="m", model_type="llama",
    )  # fmt: skip
    for text in ("", "{}", "[]", plan.to_json().replace('"version": 1', '"version": 9'), plan.to_json()[:-30]):
        with pytest.raises(ConfigError):
            PruningPlan.from_json(text)
