"""Errors of blocks of experts: by definition, and what the divergence makes of them; first tables need no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch

from multipruner.core.plan import Ranking
from multipruner.core.structure import GONE, Size, Structure
from multipruner.engine.layer_calls import State, stream_of
from multipruner.engine.moments import gather
from multipruner.engine.prunable import Prunable
from multipruner.importance.energies import FACTOR, first_tables, sensitivities
from multipruner.importance.errors_as_run import errors_as_run, sizes_run
from multipruner.importance.table import rank
from multipruner.search import Grid, Task, allocate
from multipruner.search.limits import Limit
from tests.support.tiny import MORE, random_ids, tiny_model

VARIANTS = ("mixtral", "qwen3_moe", "glm4_moe")


def _of(variant: str, **more: Any) -> tuple[Prunable, Ranking, torch.Tensor]:
    prunable, ids = Prunable.of(tiny_model(**{**MORE[variant], "layers": 3, **more})), random_ids(8, 32)
    return prunable, rank("second-order", prunable, gather(prunable, ids), lambda *at: None), ids


def _task(prunable: Prunable, most: float = 0.7) -> Task:
    costs = prunable.costs
    limit = Limit.of_blocks(
        "parameters", lambda block, size: costs.blocks[block](size).parameters, costs.constant,
        most * costs.parameters(prunable.dense),
    )  # fmt: skip
    straight = frozenset(n for n in range(len(prunable.anatomy)) if not prunable.block_spec(n).output)
    grid = Grid({"experts": 1, "kv_groups": 1, "channels": 8}).of_model(prunable.anatomy)
    return Task(prunable.anatomy, grid, (limit,), rounds=0, first=(), errors=_none, straight=straight)


def _none(block: int, chain: tuple[Size, ...]) -> list[float]:
    return [1.0 - place / (len(chain) - 1) for place in range(len(chain))]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_they_are_what_the_stream_differs_by(variant: str) -> None:
    """Of tokens that take other experts, too; in the order in which experts leave."""
    prunable, ranking, ids = _of(variant)
    with prunable.in_order(ranking):
        sizes = sizes_run(_task(prunable))
        calls = list[tuple[int, int]]()
        found = errors_as_run(prunable, ids, sizes, lambda *at: calls.append(at))
        assert set(found) == set(sizes) and calls[-1][0] == calls[-1][1] == max(sizes) + 1
        inputs = prunable.inputs(ids)
        state: State = inputs.hidden
        for block, dense in enumerate(prunable.dense):
            after = prunable.block(state, inputs, block, dense)
            for size in sizes.get(block, ()):
                other = prunable.block(state, inputs, block, size)
                error = (stream_of(after) - stream_of(other)).square().sum() / ids.numel()
                assert found[block][size] == pytest.approx(float(error), rel=1e-3)
            state = after
    assert errors_as_run(prunable, ids, {}) == {}


@pytest.mark.parametrize("variant", VARIANTS[:2])
@torch.no_grad()
def test_small_errors_foretell_the_divergence(variant: str) -> None:
    """But for the factor that real models want (:data:`FACTOR`): one expert less in the last layer."""
    prunable, ranking, ids = _of(variant)
    block = max(n for n, place in enumerate(prunable.anatomy) if place.kind == "experts")
    fewer = (prunable.dense[block][0] - 1,)
    with prunable.in_order(ranking):
        error = errors_as_run(prunable, ids, {block: [fewer]})[block][fewer]
        told = sensitivities(prunable, ids)[block] * error / FACTOR
        before = prunable.model(ids).logits.log_softmax(-1)
        with prunable.applied(prunable.dense.replace(block, fewer)):
            after = prunable.model(ids, use_cache=False).logits.log_softmax(-1)
    assert told == pytest.approx(float((before.exp() * (before - after)).sum(-1).mean()), rel=0.25)


def test_first_tables_measure_nothing_but_what_would_leave() -> None:
    prunable, ranking, ids = _of("qwen3_moe")
    asked = list[Structure]()

    def losses(structures: list[Structure]) -> Iterator[float]:
        for structure in structures:
            asked.append(structure)
            yield prunable.costs.ratio(structure) ** 2

    with prunable.in_order(ranking):
        task = _task(prunable)
        factors = [1.0 + block for block in range(len(prunable.anatomy))]
        ran = errors_as_run(prunable, ids, sizes_run(task))
        table = first_tables(task, factors, ran)
    assert set(table) == set(range(len(prunable.anatomy)))
    for block in task.straight:
        assert table[block][prunable.dense[block]] == 0
        for size, error in ran[block].items():
            assert table[block][size] == pytest.approx(factors[block] * error)
    assert _round(task, table, losses) <= {size for place in prunable.anatomy for size in (GONE, place.dense)}


def _round(task: Task, table: Mapping[int, Mapping[Size, float]], losses: Any) -> set[Size]:
    """Return sizes in the structures, one block changed, that the first tables measured."""

    class Counted:
        def __init__(self) -> None:
            self.seen = set[Size]()

        def __call__(self, structure: Structure) -> float:
            (loss,) = losses([structure])
            changed = [size for size, dense in zip(structure, task.anatomy.dense, strict=True) if size != dense]
            if len(changed) == 1:
                self.seen.add(changed[0])
            return loss

        def commit(self, structure: Structure) -> None:
            """Nothing is kept."""

    counted: Any = Counted()
    allocate(task, counted, estimate=lambda task: table)
    return counted.seen


def test_between_sizes_that_are_run_errors_are_on_straight_lines() -> None:
    prunable, _, _ = _of("qwen3_moe")
    task, factors = _task(prunable), [1.0] * len(prunable.anatomy)
    ran = {block: {GONE: 8.0, (2,): 6.0} for block in task.straight}
    table = first_tables(task, factors, ran)
    (block,) = sorted(task.straight)[:1]
    dense = prunable.dense[block][0]
    for experts in range(2, dense + 1):
        assert table[block][(experts,)] == pytest.approx(6.0 * (dense - experts) / (dense - 2))
