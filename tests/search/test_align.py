"""Aligned grids: no search on them can reach a width that is neither dense nor a multiple."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multipruner.core.axes import DIMENSIONS
from multipruner.core.errors import ConfigError
from multipruner.core.structure import Anatomy, total
from multipruner.search import Grid, candidates
from multipruner.search.grid import aligned
from multipruner.search.options import levels
from tests.support.layers import uniform

models = st.builds(
    lambda layers, per_kv, kv, channels, head_dim: uniform(layers, per_kv * kv, kv, channels, head_dim),
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 40).map(lambda n: 8 * n),
    st.sampled_from([16, 32, 64, 80, 128]),
)  # fmt: skip


def _good(width: int, full: int, align: int) -> bool:
    return width in (0, full) or width % align == 0


def _check(anatomy: Anatomy, number: int, size: tuple[int, ...], align: int) -> None:
    """Channels of an MLP, and heads of either kind times their width."""
    place, head_dim = anatomy[number], anatomy.constants["head_dim"]
    axes = {"channels": 1} if place.kind == "mlp" else {"kv_groups": head_dim, "queries": head_dim}
    for axis, width in axes.items():
        kept, whole = total(place.kind, size, axis), total(place.kind, place.dense, axis)
        assert _good(kept * width, whole * width, align)


@given(models, st.integers(1, 64), st.integers(1, 4), st.integers(1, 256), st.none() | st.integers(1, 3))
def test_every_width_is_whole_or_a_multiple(
    anatomy: Anatomy, group: int, step: int, align: int, queries: int | None
) -> None:
    (kv_groups, each), (channels,) = anatomy.dense[0], anatomy.dense[1]
    asked = _grid(group, step, queries, frozenset({"channels"}))
    if channels % align:
        with pytest.raises(ConfigError, match=f"align {align}"):
            aligned(asked, anatomy, align)
        return
    grid = aligned(asked, anatomy, align)
    if queries is not None and queries > max(1, each - 1):
        with pytest.raises(ConfigError, match="query head step"):
            grid.check(anatomy)
        return
    grid.check(anatomy)
    assert queries or "queries" not in grid.steps
    assert grid.steps["channels"] >= min(group, channels) and grid.steps["kv_groups"] >= min(step, kv_groups)
    for number, place in enumerate(anatomy):
        for size in levels(place, grid):
            _check(anatomy, number, size, align)
    for dimension in DIMENSIONS:
        for move in candidates(dimension, anatomy.dense, anatomy, grid):
            _check(anatomy, *move, align)


def _grid(group: int, step: int = 1, queries: int | None = None, partial: frozenset[str] = frozenset()) -> Grid:
    return Grid({"channels": group, "kv_groups": step, **({} if queries is None else {"queries": queries})}, partial)


@given(models, st.integers(1, 256))
def test_an_aligned_grid_is_no_coarser_than_it_must_be(anatomy: Anatomy, align: int) -> None:
    (kv_groups, _), (channels,) = anatomy.dense[0], anatomy.dense[1]
    if channels % align == 0:
        grid = aligned(_grid(1), anatomy, align)
        finer = [n for n in range(1, grid.steps["channels"]) if channels % n == 0]
        assert all(n % align for n in finer)
        heads = [n for n in range(1, grid.steps["kv_groups"]) if kv_groups % n == 0]
        assert all(n * anatomy.constants["head_dim"] % align for n in heads)


def test_known_models() -> None:
    smollm2 = uniform(30, 9, 3, 1536, 64)
    assert aligned(_grid(128), smollm2, 64) == _grid(128, 1)
    assert aligned(_grid(128), smollm2, 256) == _grid(256, 3), "three KV heads of 64: whole or gone"
    llama = uniform(32, 32, 8, 14336, 128)
    assert aligned(_grid(128), llama, 512) == _grid(512, 4)
    assert aligned(_grid(128, queries=1), smollm2, 64) == _grid(128, 1, queries=1)
    assert aligned(_grid(128, queries=1), smollm2, 192) == _grid(192, 3, queries=1), "three by three"
    assert aligned(_grid(128, queries=1), smollm2, 128) == _grid(128, 3), "3 x 64 is no multiple"
    assert aligned(_grid(128, queries=1), llama, 512) == _grid(512, 4, queries=1)
    with pytest.raises(ConfigError, match=r"256, 512$"):
        aligned(_grid(128), smollm2, 1024)
    with pytest.raises(ConfigError, match="at least 1"):
        aligned(_grid(128), smollm2, 0)
