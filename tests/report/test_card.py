"""What the card says of devices: numbers that divide every layer, and no other."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from multipruner.core.plan import PruningPlan, Ranking
from multipruner.report.card import model_card, tensor_parallel_sizes
from tests.support.layers import structure_of, uniform

LAYERS = st.lists(st.tuples(st.sampled_from([0, 2, 4, 6, 8]), st.integers(0, 16)), min_size=1, max_size=4)


def _plan(layers: list[tuple[int, int]]) -> PruningPlan:
    """A plan that keeps so many KV groups, each with its two query heads, and channels of every layer."""
    dense = uniform(len(layers), 16, 8, 16)
    structure = structure_of(*((2 * groups, groups, channels) for groups, channels in layers))
    return PruningPlan.from_structure(structure, Ranking.identity(dense), dense, model="m", model_type="llama")


@given(LAYERS)
def test_devices_divide_groups_and_channels_of_every_layer_that_has_them(layers: list[tuple[int, int]]) -> None:
    sizes, counts = tensor_parallel_sizes(_plan(layers)), [count for layer in layers for count in layer]
    fits = [n for n in range(2, max(2, *counts) + 1) if all(count % n == 0 for count in counts)]
    assert sizes == (fits if any(counts) else [])


def test_the_card_says_on_how_many_devices_layers_can_lie() -> None:
    assert "every layer divide by 2, 4, as servers" in model_card({}, _plan([(4, 12), (8, 0)]))
    assert "tensor parallelism" not in model_card({}, _plan([(4, 12), (6, 9)]))
