"""Laws of the residual stream's width in structures, plans and costs."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.core.blocks import BlockCost
from multipruner.core.costs import Costs
from multipruner.core.errors import ConfigError
from multipruner.core.layout import Layout
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Anatomy, Structure, picture
from tests.support.tiny import random_ranking, random_structure

HIDDEN = 24


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    """Plans that keep some dimensions of the stream, in a random order of importance, and some of every block."""
    anatomy = Anatomy.uniform(draw(st.integers(1, 4)), {"attention": (2, 2), "mlp": (9,)}, {"hidden": HIDDEN})
    seed, order = draw(st.integers(0, 10**6)), tuple(draw(st.permutations(range(HIDDEN))))
    structure = Structure(random_structure(anatomy, seed).blocks, draw(st.integers(1, HIDDEN)))
    ranking = Ranking(random_ranking(anatomy, seed).blocks, order)
    return PruningPlan.from_structure(structure, ranking, anatomy, model="m", model_type="llama")


@settings(max_examples=60)
@given(plans())
def test_a_plan_says_which_dimensions_stay(plan: PruningPlan) -> None:
    text = plan.to_json()
    again = PruningPlan.from_json(text)
    assert again == plan and again.to_json() == text and again.structure == plan.structure
    if plan.stream is None:  # all of them: a plan that earlier versions read
        assert "stream" not in json.loads(text) and json.loads(text)["version"] == 2
        assert "hidden" not in plan.structure.to_json()
    else:
        assert json.loads(text)["version"] == 3 and again.hidden == HIDDEN
        assert plan.structure.hidden == len(plan.stream) and sorted(plan.stream) == list(plan.stream)
        assert f"{len(plan.stream)} of {HIDDEN} hidden dimensions" in picture(plan.structure, plan.anatomy)
    assert Structure.from_json(json.loads(json.dumps(plan.structure.to_json()))) == plan.structure


@given(plans())
def test_narrower_streams_keep_the_leading_dimensions_of_the_order(plan: PruningPlan) -> None:
    order = (*(plan.stream or range(HIDDEN)), *sorted(set(range(HIDDEN)) - set(plan.stream or range(HIDDEN))))
    ranking = Ranking(Ranking.identity(plan.anatomy).blocks, order)
    anatomy = Anatomy(plan.anatomy.places, {"hidden": HIDDEN})
    fewer = PruningPlan.from_structure(Structure(anatomy.dense.blocks, 1), ranking, anatomy, model="", model_type="")
    assert fewer.stream == order[:1]


def test_a_structure_keeps_its_width_where_a_block_changes() -> None:
    structure = Structure(((2, 2), (9,)), 8)
    assert structure.replace(1, ()).hidden == 8 and structure != Structure(structure.blocks)
    with pytest.raises(ConfigError, match="at least one dimension"):
        Structure(structure.blocks, 0)


@pytest.mark.parametrize("kept", ["0-30", "3,2", "", "1,1"])
def test_a_plan_with_dimensions_that_are_not_there_is_refused(kept: str) -> None:
    anatomy = Anatomy.uniform(1, {"mlp": (9,)}, {"hidden": HIDDEN})
    structure = Structure(anatomy.dense.blocks, 8)
    plan = PruningPlan.from_structure(structure, Ranking.identity(anatomy), anatomy, model="", model_type="")
    record = json.loads(plan.to_json())
    record["stream"]["kept"]["hidden"] = kept
    with pytest.raises(ConfigError, match="hidden dimensions must be ascending indices below 24"):
        PruningPlan.from_json(json.dumps(record))


@given(st.integers(1, HIDDEN), st.integers(1, 9))
def test_costs_follow_the_width(hidden: int, channels: int) -> None:
    """An MLP of two matrices with a norm, tied embeddings of 50 tokens and a last norm."""
    anatomy = Anatomy.uniform(1, {"mlp": (9,)}, {"hidden": HIDDEN})
    up, down = (Layout("channels"), Layout("hidden")), (Layout("hidden"), Layout("channels"))
    block = BlockCost("mlp", anatomy.constants, HIDDEN, (up, down), stream=1)
    costs = Costs(anatomy, (block,), 51 * HIDDEN, 50 * HIDDEN, 4, stream=51)
    narrow = Structure(((channels,),), hidden)
    assert costs.parameters(narrow) == 51 * hidden + hidden + 2 * hidden * channels
    assert costs.flops_per_token(narrow) == 2 * (50 * hidden + 2 * hidden * channels)
    there = costs.narrowed(hidden)
    assert there.parameters(Structure(narrow.blocks)) == costs.parameters(narrow)
    assert there.ratio(Structure(narrow.blocks)) == costs.ratio(narrow)
    assert costs.ratio(Structure(anatomy.dense.blocks, HIDDEN)) == 0
