"""Laws of layouts: what stays of a tensor's dimension follows from what stays of the axes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multipruner.core.axes import AXES, BLOCK_KINDS
from multipruner.core.layout import Layout, kept_counts

LAYOUTS = (
    "hidden", "3", "experts", "channels", "channels + channels", "channels * 2", "2 * channels", "kv_groups",
    "kv_groups * head_dim", "kv_groups * queries * head_dim", "kv_groups * (queries + 2) * head_dim",
    "kv_groups * queries * head_dim + kv_groups * head_dim + kv_groups * head_dim",
    "kv_groups * value_dim", "kv_groups * queries * value_dim", "kv_groups * 3 * head_dim + channels + hidden",
    "kv_groups * (queries * head_dim + head_dim + head_dim)", "expert_groups * group_experts",
    "kv_groups * queries * (2 * rope_pairs + hidden)", "kv_groups * (rope_pairs * 2 + hidden)",
)  # fmt: skip
layouts = st.sampled_from(LAYOUTS).map(Layout)
counts = st.fixed_dictionaries(
    {
        "kv_groups": st.integers(1, 4),
        "queries": st.integers(1, 4),
        "head_dim": st.integers(1, 3),
        "value_dim": st.integers(1, 3),
        "rope_pairs": st.integers(1, 3),
        "channels": st.integers(1, 9),
        "experts": st.integers(1, 6),
        "mixers": st.just(1),
        "expert_groups": st.integers(1, 3),
        "group_experts": st.integers(1, 4),
        "hidden": st.integers(1, 5),
    }
)


@st.composite
def selections(draw: st.DrawFn, dense: dict[str, int]) -> dict[str, Any]:
    """Any units in any order; of every KV group the same number of query heads."""
    groups = draw(st.lists(st.integers(0, dense["kv_groups"] - 1), unique=True))
    channels = draw(st.lists(st.integers(0, dense["channels"] - 1), unique=True))
    queries = draw(st.integers(0, dense["queries"]))
    inside = [draw(st.permutations(range(dense["queries"])))[:queries] for _ in groups]
    within = {"kv_groups": groups, "queries": inside, "channels": channels}
    for axis in ("value_dim", "rope_pairs"):
        few = draw(st.integers(0, dense[axis]))
        within[axis] = [draw(st.permutations(range(dense[axis])))[:few] for _ in groups]
    return within


def numbers(layout: Layout, kept: Any, dense: dict[str, int]) -> list[int]:
    index = layout.index(kept, dense)
    return list(range(layout.size(dense)))[index] if isinstance(index, slice) else list(index)


def after(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """What stays where one selection is made of what another one left."""
    return {
        "kv_groups": [first["kv_groups"][group] for group in second["kv_groups"]],
        **{
            name: [
                [first[name][group][unit] for unit in inside]
                for group, inside in zip(second["kv_groups"], second[name], strict=True)
            ]
            for name in ("queries", "value_dim", "rope_pairs")
        },
        "channels": [first["channels"][channel] for channel in second["channels"]],
    }


@given(layouts, counts)
def test_keeping_everything_is_the_identity(layout: Layout, dense: dict[str, int]) -> None:
    whole = slice(0, layout.size(dense))
    assert layout.index({}, dense) == whole
    assert layout.index({name: dense[name] for name in AXES}, dense) == whole
    inside = [range(dense["queries"])] * dense["kv_groups"]
    said = {"kv_groups": range(dense["kv_groups"]), "queries": inside, "channels": range(dense["channels"])}
    assert layout.index(said, dense) == whole


@given(layouts, counts, st.data())
def test_the_size_is_the_length_of_the_index(layout: Layout, dense: dict[str, int], data: st.DataObject) -> None:
    kept = data.draw(selections(dense))
    left = numbers(layout, kept, dense)
    assert len(left) == layout.size(kept_counts(kept, dense))
    assert len(set(left)) == len(left) and set(left) <= set(range(layout.size(dense)))


@given(layouts, counts, st.data())
def test_selections_compose(layout: Layout, dense: dict[str, int], data: st.DataObject) -> None:
    first = data.draw(selections(dense))
    smaller = kept_counts(first, dense)
    if min(smaller[name] for name in AXES) == 0:
        return
    second = data.draw(selections(smaller))
    once = numbers(layout, first, dense)
    assert [once[number] for number in numbers(layout, second, smaller)] == numbers(layout, after(first, second), dense)


@given(layouts, counts, st.data())
def test_leading_units_are_a_slice_exactly_where_they_are_the_beginning(
    layout: Layout, dense: dict[str, int], data: st.DataObject
) -> None:
    kept = {name: data.draw(st.integers(0, dense[name])) for name in AXES}
    index = layout.index(kept, dense)
    left = numbers(layout, kept, dense)
    assert left == sorted(left)
    assert isinstance(index, slice) == (left == list(range(len(left))))


@given(layouts, counts, st.sampled_from(sorted(AXES)))
def test_units_are_what_leaves_with_each(layout: Layout, dense: dict[str, int], axis: str) -> None:
    units = layout.units(axis, dense)
    outer = AXES[axis].within
    assert len(units) == dense[axis] * (dense[outer] if outer else 1)
    if not outer:
        for number, unit in enumerate(units):
            others = [other for other in range(dense[axis]) if other != number]
            assert sorted({*unit, *numbers(layout, {axis: others}, dense)}) == list(range(layout.size(dense)))
    together = [element for unit in units for element in unit]
    assert len(set(together)) == len(together)


def test_layouts_of_models_that_exist() -> None:
    dense = {"kv_groups": 2, "queries": 2, "head_dim": 2, "channels": 3}
    kept: dict[str, Any] = {"kv_groups": (1,), "queries": ((1,),), "channels": (0, 2)}
    expected = {
        "kv_groups * queries * head_dim": (6, 7),
        "kv_groups * head_dim": (2, 3),
        "kv_groups * (queries + 2) * head_dim": (10, 11, 12, 13, 14, 15),  # Falcon
        "kv_groups * 3 * head_dim": (6, 7, 8, 9, 10, 11),  # GPT-NeoX
        "kv_groups * queries * head_dim + kv_groups * head_dim + kv_groups * head_dim": (6, 7, 10, 11, 14, 15),  # Phi-3
        "channels + channels": (0, 2, 3, 5),
        "channels * 2": (0, 1, 4, 5),
    }
    for text, index in expected.items():
        assert Layout(text).index(kept, dense) == index, text
    assert Layout("kv_groups * queries * head_dim").units("queries", dense) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert Layout("kv_groups * (queries + 2) * head_dim").units("queries", dense) == ((0, 1), (2, 3), (8, 9), (10, 11))
    assert Layout("channels + channels").units("channels", dense) == ((0, 3), (1, 4), (2, 5))


def test_parameters_of_a_model_that_exists() -> None:
    """SmolLM2-135M: 30 layers, tied embeddings."""
    dense = {"kv_groups": 3, "queries": 3, "head_dim": 64, "hidden": 576, "channels": 1536, "tokens": 49152}
    matrices = [
        ("kv_groups * queries * head_dim", "hidden"), ("kv_groups * head_dim", "hidden"),
        ("kv_groups * head_dim", "hidden"), ("hidden", "kv_groups * queries * head_dim"),
        ("channels", "hidden"), ("channels", "hidden"), ("hidden", "channels"), ("hidden",), ("hidden",),
    ]  # fmt: skip

    def parameters(counts: dict[str, int]) -> int:
        total = 0
        for dims in matrices:
            size = 1
            for text in dims:
                size *= Layout(text).size(counts)
            total += size
        return total

    assert 30 * parameters(dense) + (49152 + 1) * 576 == 134_515_008
    narrow = {**dense, "kv_groups": 2, "channels": 1000}
    assert parameters(dense) - parameters(narrow) == 2 * 3 * 64 * 576 + 2 * 64 * 576 + 3 * 536 * 576


@pytest.mark.parametrize(
    "text", ["", "channels -", "channels - 1", "-1", "0", "channels / 2", "f(channels)", "1.5", "a.b", "'x'", "True"]
)
def test_text_that_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected sums and products"):
        Layout(text)


@pytest.mark.parametrize("text", ["queries", "queries * kv_groups", "kv_groups + queries", "(kv_groups + 1) * queries"])
def test_an_axis_within_another_one_stands_to_its_right(text: str) -> None:
    with pytest.raises(ValueError, match="queries must be multiplied with kv_groups, to its left"):
        Layout(text).index({}, {"kv_groups": 2, "queries": 2})
    assert Layout(text).size({"kv_groups": 2, "queries": 3}) > 0, "which is a number all the same"


def test_a_missing_count_is_named() -> None:
    with pytest.raises(ValueError, match=r"how many heads there are; known: channels"):
        Layout("heads * 2").size({"channels": 3})
    with pytest.raises(ValueError, match=r"every unit must keep the same number, not \[1, 2\]"):
        kept_counts({"queries": ((0,), (0, 1))}, {})


def test_every_axis_has_one_name() -> None:
    assert len(AXES) == sum(len(kind.axes) for kind in BLOCK_KINDS.values())
    assert all(not axis.within or axis.within in AXES for axis in AXES.values())
