"""Every order against a plain loop that computes its scores one channel, one KV group at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from multipruner.engine.moments import Statistics, gather
from multipruner.engine.prunable import Prunable
from multipruner.importance.second_order import elimination_order
from multipruner.importance.table import rank
from tests.support.tiny import random_ids, tiny_model

GROUPS, PER_GROUP, HEAD, CHANNELS = 2, 2, 16, 40
KINDS = ("attention", "mlp")


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
    ranking = rank("magnitude", prunable, within=["queries"])
    for number, layer in enumerate(prunable.layers):
        (kv_groups, inside), (found,) = (ranking.blocks[prunable.anatomy.at(number, k)].axes for k in KINDS)
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
        assert found == _best_first(channels) and kv_groups == _best_first(groups)
        expected = tuple(tuple(h % PER_GROUP for h in _best_first(heads) if h // PER_GROUP == g) for g in range(GROUPS))
        assert inside == expected
        squares_differ = squares_differ or _best_first(squares) != _best_first(channels)
    assert squares_differ, "or this would not tell the norms apart"


@torch.no_grad()
def test_activation_is_the_norm_of_a_column_times_its_mean_square(prunable: Prunable) -> None:
    chance, statistics = torch.Generator().manual_seed(0), Statistics()
    for number in range(len(prunable.layers)):
        for kind, columns in (("attention", GROUPS * PER_GROUP * HEAD), ("mlp", CHANNELS)):
            mixing = torch.randn(columns, columns, generator=chance) * torch.rand(columns, generator=chance) ** 2
            statistics.grams[prunable.anatomy.at(number, kind)] = mixing.T @ mixing
    norms_differ = False
    ranking = rank("activation", prunable, statistics)
    for number, layer in enumerate(prunable.layers):
        attention, mlp = (prunable.anatomy.at(number, kind) for kind in KINDS)
        down, out = _weight(layer, "mlp.down_proj"), _weight(layer, "self_attn.o_proj")
        squares, inner = statistics.grams[mlp], statistics.grams[attention]
        channels = [float(down[:, c].square().sum() * squares[c, c]) for c in range(CHANNELS)]
        columns = [float(out[:, c].square().sum() * inner[c, c]) for c in range(out.shape[1])]
        width = PER_GROUP * HEAD
        assert ranking.blocks[mlp].axes == (_best_first(channels),)
        groups, whole = ranking.blocks[attention].axes
        assert groups == _best_first([sum(columns[g * width : (g + 1) * width]) for g in range(GROUPS)])
        assert whole == (tuple(range(PER_GROUP)),) * GROUPS, "not asked for: in the dense order"
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


def _plain_rounds(weight: Tensor, gram: Tensor, size: int, order: list[int], at_once: int) -> list[tuple[float, float]]:
    """For every round of an order, the dearest price that was paid and the cheapest one left, float64, every matrix
    inverted from scratch."""
    left, rounds = list(range(len(gram) // size)), []
    damped = gram.double() + 1e-2 * gram.double().diagonal().mean() * torch.eye(len(gram))
    while len(left) > at_once:
        kept = torch.tensor([group * size + i for group in left for i in range(size)])
        inverse = torch.linalg.inv(damped[kept][:, kept])
        fitted = torch.linalg.solve(damped[kept][:, kept], (weight.double() @ damped[:, kept]).T)
        prices = {}
        for place, group in enumerate(left):
            own = slice(place * size, (place + 1) * size)
            prices[group] = float((fitted[own] * torch.linalg.solve(inverse[own, own], fitted[own])).sum())
        gone, order = order[:at_once], order[at_once:]
        left = [group for group in left if group not in gone]
        rounds.append((max(prices[group] for group in gone), min(prices[group] for group in left)))
    return rounds


@pytest.mark.parametrize(("groups", "size", "rounds"), [(150, 1, 40), (48, 3, 48), (9, 16, 96)])
def test_columns_that_moved_are_priced_as_by_an_elimination_that_moves_nothing(groups, size, rounds) -> None:
    chance, columns = torch.Generator().manual_seed(groups), groups * size
    x = torch.randn(400, columns, generator=chance) @ torch.randn(columns, columns, generator=chance)
    weight, gram = torch.randn(20, columns, generator=chance), x.T @ x / len(x)
    order = list(reversed(elimination_order(weight, gram, groups=groups, rounds=rounds)))
    assert sorted(order) == list(range(groups))
    for paid, cheapest in _plain_rounds(weight, gram, size, order, -(-groups // rounds)):
        assert paid <= cheapest * (1 + 1e-5)


def test_equal_columns_leave_by_their_numbers_and_one_that_overflows_stays() -> None:
    assert elimination_order(torch.ones(3, 40), torch.eye(40), groups=40, rounds=7) == tuple(reversed(range(40)))
    weight = torch.ones(3, 40)
    weight[0, 5] = 1e30
    order = elimination_order(weight, torch.eye(40), groups=40, rounds=7)
    assert order[0] == 5 and sorted(order) == list(range(40))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_order_leaves_the_weights_alone(family: str) -> None:
    """An elimination updates weights as it goes, and a transposed projection is a view of the model's own."""
    model = tiny_model(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = Prunable.of(model)
    rank("second-order", dense, gather(dense, random_ids(4, 12)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
