"""Errors of nested widths are those of every width by itself, and what losses between them are drawn with."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multipruner.engine.cutting import Projection
from multipruner.engine.layer_calls import stream_of
from multipruner.engine.moments import gather
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.repair.columns import repaired
from multipruner.repair.errors import nested_errors
from multipruner.repair.scoring import Repair
from multipruner.search.grid import Grid
from multipruner.search.options import chains
from tests.support.tiny import random_ids, tiny_model


@given(st.integers(0, 10**6), st.sampled_from(["lstsq", "bias"]), st.booleans())
def test_nested_widths_are_each_by_itself(seed: int, how: str, centred: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, 9, generator=generator, dtype=torch.float64) + 0.5
    weight = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    gram, mean = inputs.T @ inputs / len(inputs), inputs.mean(dim=0)
    order = torch.randperm(9, generator=generator)
    kept = [order[:n] for n in (0, 2, 3, 7, 9)]
    found = nested_errors(weight, gram, mean if centred else None, kept, how, ridge=0.1)  # type: ignore[arg-type]
    moments = gram - torch.outer(mean, mean) if centred else gram
    if how == "lstsq":
        moments = moments + 0.1 * moments.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    for columns, error in zip(kept, found, strict=True):
        lost = torch.ones(9, dtype=torch.bool)
        lost[columns] = False
        left = moments[lost][:, lost]
        if how == "lstsq":
            across = moments[lost][:, columns]
            left = left - across @ torch.linalg.solve(moments[columns][:, columns], across.T)
        assert error == pytest.approx(float((weight[:, lost] @ left * weight[:, lost]).sum()), rel=1e-3, abs=1e-3)


def test_means_that_dwarf_the_deviations_leave_errors_finite() -> None:
    """What float32 leaves of such a covariance need not factor; the repair takes as large a ridge there."""
    generator = torch.Generator().manual_seed(0)
    inputs = 300 + 0.01 * torch.randn(64, 24, generator=generator)
    gram, mean = inputs.T @ inputs / len(inputs), inputs.mean(dim=0)
    covariance = gram - torch.outer(mean, mean)
    assert float(torch.linalg.eigvalsh(covariance).min()) < 0, "rounding has spoilt it"
    weight = torch.randn(5, 24, generator=generator)
    kept = [torch.arange(n) for n in (0, 8, 24)]
    found = nested_errors(weight, gram, mean, kept)
    assert found[0] >= found[1] >= found[2] == 0
    assert repaired("lstsq", Projection(weight, torch.zeros(5)), gram, mean, kept[1]).weight.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_errors_of_repaired_blocks_are_those_on_the_text(family: str) -> None:
    """What a block gives and what it gives when it is narrower and repaired, token by token."""
    prunable, ids = Prunable.of(tiny_model(family)), random_ids(8, 16)
    moments = gather(prunable, ids)
    ranking = rank("second-order", prunable, moments)
    grid = Grid({"channels": 8, "kv_groups": 1, "queries": 1})
    with torch.no_grad():
        inputs = prunable.inputs(ids)
        hidden = inputs.hidden
        repair = Repair(prunable, moments, ranking, ridge=1e-6)
        with prunable.in_order(ranking, repair):
            for block, dense in enumerate(prunable.dense):
                after = stream_of(prunable.block(hidden, inputs, block, dense))
                for chain in chains(prunable.anatomy[block], grid, dense):
                    errors = repair.errors(block, chain)
                    assert errors[-1] == 0 and all(one >= other for one, other in pairwise(errors))
                    for size, error in zip(chain, errors, strict=True):
                        narrow = stream_of(prunable.block(hidden, inputs, block, size))
                        seen = (narrow - after).square().sum(-1).mean()
                        assert error == pytest.approx(float(seen), rel=0.02, abs=1e-5)
                hidden = after
