"""The engine where tensors are not on the CPU: everything stays on the device, and hardly anybody waits for it.

Nothing here runs on a GPU: a sham device keeps the books (:mod:`tests.support.sham_device`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch

from multipruner.core.structure import Structure
from multipruner.engine.moments import gather
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Prunable
from multipruner.engine.token_losses import tokens_at_once
from multipruner.importance.energies import sensitivities
from multipruner.importance.second_order import Elimination, inverse_of
from multipruner.importance.table import rank
from multipruner.repair.final_norm import GainFit
from multipruner.repair.scoring import Repair
from multipruner.repair.stream import accumulated
from multipruner.sources.sampled_text import sample
from multipruner.storage.memory import peak_memory
from tests.support.sham_device import HERE, THERE, Sham, ShamDevice
from tests.support.tiny import random_ids, random_structure, tiny_model, tiny_tokenizer


@dataclass
class _Found:
    """What the engine makes of a model, step by step, and how often each step waited."""

    values: dict[str, Any]
    waits: dict[str, int]
    places: dict[str, int]


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.held if isinstance(tensor, Sham) else tensor


def _worked_through(model: Any, device: ShamDevice | None) -> _Found:
    """Moments, order, sensitivities, losses with repair, errors, last repair and last norm of a model."""
    prunable, ids = Prunable.of(model), random_ids(6, 16)
    values: dict[str, Any] = {}
    waits: dict[str, int] = {}

    def steps() -> Iterator[tuple[str, Any]]:
        moments = gather(prunable, ids)
        yield "moments", [_inner(moments.grams[block]) for block in range(len(prunable.anatomy))]
        ranking = rank("second-order", prunable, moments, within=["queries"])
        yield "order", ranking
        yield "sensitivities", sensitivities(prunable, ids[:3])
        repair = Repair(prunable, moments, ranking)
        with prunable.in_order(ranking, repair):
            objective = CalibrationObjective(prunable, ids, loss="kl", batch_size=3)
            yield "objective", objective(prunable.dense)
            structures = _structures(prunable)
            choice = objective.argmin(structures)
            yield "choice", (choice.best, choice.runner_up, choice.loss, choice.runner_up_loss)
            yield "again", objective.argmin(structures).best
            mlp = prunable.anatomy.at(1, "mlp")
            yield "errors", repair.errors(mlp, [(count,) for count in range(8, 48, 8)])
            fit = GainFit(prunable, ids.numel())
            outputs = accumulated(prunable, choice.best, ids, ends=fit.see)
            yield "outputs", [_inner(output.weight) for output in outputs.values()]
            gain = fit.solve()
            assert gain is not None
            yield "gain", _inner(gain)

    so_far = 0
    for name, value in steps():
        values[name] = value
        now = sum(device.waits.values()) if device else 0
        waits[name], so_far = now - so_far, now
    return _Found(values, waits, dict(device.waits) if device else {})


def _structures(prunable: Prunable) -> list[Structure]:
    return [random_structure(prunable.anatomy, seed) for seed in range(5)]


@pytest.fixture(scope="module")
def both() -> tuple[_Found, _Found]:
    """On the CPU, and on the sham device."""
    here = _worked_through(tiny_model("llama", layers=3), None)
    with ShamDevice() as device:
        there = _worked_through(device.moved(tiny_model("llama", layers=3)), device)
    return here, there


def test_the_engine_finds_the_same_where_tensors_are_elsewhere(both: tuple[_Found, _Found]) -> None:
    here, there = (found.values for found in both)
    assert here["order"] == there["order"] and here["again"] == there["again"]
    assert here["choice"][:2] == there["choice"][:2]
    assert there["choice"][2:] == pytest.approx(here["choice"][2:], rel=1e-4)
    for name in ("objective", "sensitivities", "errors"):
        assert there[name] == pytest.approx(here[name], rel=1e-3, abs=1e-6), name
    for name in ("moments", "outputs"):
        for one, other in zip(here[name], there[name], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(there["gain"], here["gain"], rtol=1e-3, atol=1e-4)


def test_nobody_waits_for_moments_and_candidates_wait_once_for_a_batch(both: tuple[_Found, _Found]) -> None:
    waits, places = both[1].waits, both[1].places
    assert waits["moments"] == 1, "a stock decoder looks at the positions of its batch"
    assert waits["again"] <= 2 * 5, "repaired before: two batches of five candidates"
    assert waits["errors"] <= 4, "however many widths there are"
    assert places["importance/energies.py:_cut_off"] == 2 * 6, "two numbers of every block, after the pass"
    assert not any(place.startswith("engine/moments") for place in places), places


def test_chunks_of_logits_add_up_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens at a time: two chunks a batch and sequence, and candidates whose bound is passed in the middle."""
    for name in ("_LOGIT_BYTES", "_LOGIT_BYTES_ELSEWHERE"):
        monkeypatch.setattr(f"multipruner.engine.token_losses.{name}", 0)
    prunable, ids = Prunable.of(tiny_model("llama")), random_ids(4, 17)
    structures = [random_structure(prunable.anatomy, seed) for seed in range(12)]
    expected = CalibrationObjective(prunable, ids, batch_size=2).argmin(structures)
    with ShamDevice() as device:
        prunable = Prunable.of(device.moved(tiny_model("llama")))
        objective = CalibrationObjective(prunable, ids, batch_size=2)
        device.waits.clear()
        found = objective.argmin(structures)
    assert (found.best, found.runner_up) == (expected.best, expected.runner_up)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert objective._chunk == 16
    assert dict(device.waits) == {"engine/objective.py:_token_losses": pytest.approx(24, abs=10)}


@pytest.mark.parametrize("size", [1, 4])
def test_prices_together_are_those_of_every_group(size: int) -> None:
    chance = torch.Generator().manual_seed(size)
    rows = torch.randn(200, 24, generator=chance)
    state = Elimination(torch.randn(7, 24, generator=chance), inverse_of(rows.T @ rows / 200), size)
    for out in ([3], [1, 5], [0]):
        torch.testing.assert_close(state._prices_together(), state.prices(), rtol=1e-4, atol=1e-6)
        state.remove(torch.tensor(out))
    assert sorted(state.groups.tolist()) == [n for n in range(24 // size) if n not in (0, 1, 3, 5)]


def test_sampled_text_is_the_same_and_comes_back_once() -> None:
    here = sample(tiny_model("llama"), tiny_tokenizer(), 10, 12, seed=3)
    with ShamDevice() as device:
        there = sample(device.moved(tiny_model("llama")), tiny_tokenizer(), 10, 12, seed=3)
        waits = {place: count for place, count in device.waits.items() if "sampled_text" in place}
    assert type(there) is torch.Tensor and torch.equal(here, there)
    assert sum(waits.values()) == 1, waits


def test_more_tokens_meet_the_head_at_once_off_the_cpu() -> None:
    sizes = [tokens_at_once(torch.empty(32000, 1, device=device)) for device in (HERE, THERE)]
    assert sizes == [393, 2097]


def test_a_sham_device_tells_tensors_of_two_places_apart() -> None:
    with ShamDevice() as device:
        there = torch.ones(3, device=THERE)
        with pytest.raises(AssertionError, match="on the CPU"):
            _ = there + torch.ones(3)
        assert float((there + 1).sum()) == 6 and device.waits.total() == 1
        assert there[torch.tensor([0, 2])].cpu().tolist() == [1, 1] and device.waits.total() == 2


def test_the_peak_is_that_of_the_device_in_use() -> None:
    """A run on the second GPU leaves nothing on the first."""
    with (
        patch("torch.cuda.device_count", lambda: 2),
        patch("torch.cuda.max_memory_allocated", lambda device=0: 7 * device),
    ):
        assert peak_memory("cuda") == 7
