"""Aligned grids: no search on them can reach a width that is neither dense nor a multiple."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multipruner.core.axes import DIMENSIONS
from multipruner.core.errors import ConfigError
from multipruner.core.structure import KINDS, Structure
from multipruner.search import Grid, candidates
from multipruner.search.grid import aligned
from multipruner.search.limits import alone
from multipruner.search.options import levels

models = st.builds(
    lambda layers, per_kv, kv, channels: Structure.uniform(layers, per_kv * kv, kv, channels),
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 12), st.integers(1, 40).map(lambda n: 8 * n),
)  # fmt: skip


def _good(width: int, full: int, align: int) -> bool:
    return width in (0, full) or width % align == 0


@given(
    models, st.integers(1, 64), st.integers(1, 4), st.sampled_from([16, 32, 64, 80, 128]), st.integers(1, 256),
    st.none() | st.integers(1, 3),
)  # fmt: skip
def test_every_width_is_whole_or_a_multiple(
    dense: Structure, group: int, step: int, head_dim: int, align: int, queries: int | None
) -> None:
    full = dense[0]
    asked = Grid(group, step, partial=True, query_head_step=queries)
    if full.channels % align:
        with pytest.raises(ConfigError, match=f"align {align}"):
            aligned(asked, dense, head_dim, align)
        return
    grid = aligned(asked, dense, head_dim, align)
    if queries is not None and queries > max(1, full.query_heads // full.kv_heads - 1):
        with pytest.raises(ConfigError, match="query head step"):
            grid.check(dense)
        return
    grid.check(dense)
    assert queries or grid.query_head_step is None
    assert grid.channel_group >= min(group, full.channels) and grid.kv_group_step >= min(step, full.kv_heads)
    for kind in KINDS:
        for size in levels(alone(full, kind), kind, grid):
            assert _good(size.channels, full.channels, align)
            for heads, whole in ((size.kv_heads, full.kv_heads), (size.query_heads, full.query_heads)):
                assert _good(heads * head_dim, whole * head_dim, align)
    for dimension in DIMENSIONS:
        for _, layer, structure in candidates(dimension, dense, grid):
            assert _good(structure[layer].channels, full.channels, align)
            assert _good(structure[layer].kv_heads * head_dim, full.kv_heads * head_dim, align)
            assert _good(structure[layer].query_heads * head_dim, full.query_heads * head_dim, align)


@given(models, st.sampled_from([16, 64]), st.integers(1, 256))
def test_an_aligned_grid_is_no_coarser_than_it_must_be(dense: Structure, head_dim: int, align: int) -> None:
    full = dense[0]
    if full.channels % align == 0:
        grid = aligned(Grid(1), dense, head_dim, align)
        finer = [n for n in range(1, grid.channel_group) if full.channels % n == 0]
        assert all(n % align for n in finer)
        heads = [n for n in range(1, grid.kv_group_step) if full.kv_heads % n == 0]
        assert all(n * head_dim % align for n in heads)


def test_known_models() -> None:
    smollm2 = Structure.uniform(30, 9, 3, 1536)
    assert aligned(Grid(128), smollm2, 64, 64) == Grid(128, 1)
    assert aligned(Grid(128), smollm2, 64, 256) == Grid(256, 3), "three KV heads of 64: whole or gone"
    llama = Structure.uniform(32, 32, 8, 14336)
    assert aligned(Grid(128), llama, 128, 512) == Grid(512, 4)
    assert aligned(Grid(128, query_head_step=1), smollm2, 64, 64) == Grid(128, 1, query_head_step=1)
    assert aligned(Grid(128, query_head_step=1), smollm2, 64, 192) == Grid(192, 3, query_head_step=1), "three by three"
    assert aligned(Grid(128, query_head_step=1), smollm2, 64, 128) == Grid(128, 3), "3 x 64 is no multiple"
    assert aligned(Grid(128, query_head_step=1), llama, 128, 512) == Grid(512, 4, query_head_step=1)
    with pytest.raises(ConfigError, match=r"256, 512$"):
        aligned(Grid(128), smollm2, 64, 1024)
    with pytest.raises(ConfigError, match="at least 1"):
        aligned(Grid(128), smollm2, 64, 0)
