"""Every order against a plain loop that computes its scores one channel, one KV group at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Prunable
from multipruner.importance.second_order import elimination_order
from multipruner.importance.table import rank
from tests.support.tiny import tiny_model

GROUPS, PER_GROUP, HEAD, CHANNELS = 2, 2, 16, 40


@pytest.fixture(scope="module")
def prunable() -> Prunable:
    """Heavy-tailed weights: sums of absolute values and of squares order them differently."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                module.weight.pow_(3)
    return Prunable.of(model)


def _weight(layer: torch.nn.Module, path: str) -> Tensor:
    weight = layer.get_submodule(path).weight
    assert isinstance(weight, Tensor)
    return weight


def _best_first(scores: list[float]) -> tuple[int, ...]:
    return tuple(sorted(range(len(scores)), key=lambda index: -scores[index]))


@torch.no_grad()
def test_magnitude_is_the_l1_norm_of_what_feeds_a_channel_or_a_group(prunable: Prunable) -> None:
    squares_differ = False
    for layer, found in zip(prunable.layers, rank("magnitude", prunable, within_groups=True).layers, strict=True):
        gate, up = _weight(layer, "mlp.gate_proj"), _weight(layer, "mlp.up_proj")
        channels = [float(gate[c].abs().sum() + up[c].abs().sum()) for c in range(CHANNELS)]
        squares = [float(gate[c].square().sum() + up[c].square().sum()) for c in range(CHANNELS)]
        q, k, v = (_weight(layer, f"self_attn.{part}_proj") for part in "qkv")

        def rows(weight: Tensor, begin: int, count: int) -> float:
            return sum(float(weight[row].abs().sum()) for row in range(begin, begin + count))

        queries = PER_GROUP * HEAD
        groups = [
            (rows(q, g * queries, queries) + rows(k, g * HEAD, HEAD) + rows(v, g * HEAD, HEAD)) / (queries + 2 * HEAD)
            for g in range(GROUPS)
        ]
        heads = [rows(q, h * HEAD, HEAD) for h in range(GROUPS * PER_GROUP)]
        assert found.channels == _best_first(channels) and found.kv_groups == _best_first(groups)
        expected = tuple(tuple(h for h in _best_first(heads) if h // PER_GROUP == g) for g in range(GROUPS))
        assert found.query_heads == expected
        squares_differ = squares_differ or _best_first(squares) != _best_first(channels)
    assert squares_differ, "or this would not tell the norms apart"


@torch.no_grad()
def test_activation_is_the_norm_of_a_column_times_its_mean_square(prunable: Prunable) -> None:
    chance, statistics = torch.Generator().manual_seed(0), Statistics()
    for number in range(len(prunable.dense)):
        for kind, columns in (("attention", GROUPS * PER_GROUP * HEAD), ("mlp", CHANNELS)):
            mixing = torch.randn(columns, columns, generator=chance) * torch.rand(columns, generator=chance) ** 2
            statistics.grams[number, kind] = mixing.T @ mixing  # type: ignore[index]
    norms_differ = False
    for number, found in enumerate(rank("activation", prunable, statistics).layers):
        layer = prunable.layers[number]
        down, out = _weight(layer, "mlp.down_proj"), _weight(layer, "self_attn.o_proj")
        squares, inner = statistics.grams[number, "mlp"], statistics.grams[number, "attention"]
        channels = [float(down[:, c].square().sum() * squares[c, c]) for c in range(CHANNELS)]
        columns = [float(out[:, c].square().sum() * inner[c, c]) for c in range(out.shape[1])]
        width = PER_GROUP * HEAD
        assert found.channels == _best_first(channels)
        assert found.kv_groups == _best_first([sum(columns[g * width : (g + 1) * width]) for g in range(GROUPS)])
        norms = [float(down[:, c].square().sum()) for c in range(CHANNELS)]
        norms_differ = norms_differ or _best_first(norms) != _best_first(channels)
    assert norms_differ


@settings(max_examples=400)
@given(st.integers(0, 10**6), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 3, 6]))
def test_groups_leave_by_the_price_of_refitting_without_them(seed: int, size: int, rounds: int) -> None:
    """Against least squares from scratch, whole groups of columns, several at once where rounds are few."""
    chance, count = torch.Generator().manual_seed(seed), 6
    x = torch.randn(80, count * size, generator=chance) @ torch.randn(count * size, count * size, generator=chance)
    weight, gram = torch.randn(5, count * size, generator=chance), x.T @ x / len(x)
    damped = (gram + 1e-2 * gram.diagonal().mean() * torch.eye(count * size)).double()

    def left_over(groups: list[int]) -> float:
        kept = torch.tensor([g * size + i for g in groups for i in range(size)], dtype=torch.long)
        target = weight.double() @ damped
        fitted = torch.linalg.solve(damped[kept][:, kept], target[:, kept].T).T
        return float((weight.double() @ target.T).trace() - (fitted @ target[:, kept].T).trace())

    leaving = list(reversed(elimination_order(weight, gram, groups=count, rounds=rounds)))
    left, at_once = list(range(count)), -(-count // rounds)
    while len(left) > at_once:
        gone, leaving = leaving[:at_once], leaving[at_once:]
        prices = {group: left_over([other for other in left if other != group]) for group in left}
        dearest = max(prices[group] for group in gone)
        left = [group for group in left if group not in gone]
        assert dearest <= min(prices[group] for group in left) * (1 + 1e-2) + 1e-6
    assert sorted(leaving) == sorted(left)


def test_an_elimination_works_by_rows() -> None:
    """Updates of a matrix that lies by columns take three times as long."""
    from multipruner.importance.second_order import _inverse

    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(0))
    assert _inverse(x.T @ x).is_contiguous()
