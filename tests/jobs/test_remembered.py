"""The objective that remembers: every loss is measured once, by whichever process, and none is lost to a stop."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from multipruner.core.errors import NumericsError
from multipruner.core.objective import Choice, best_two
from multipruner.core.structure import GONE, Structure
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Prunable
from multipruner.jobs.remembered import RememberedObjective
from multipruner.search import Grid, Memo
from multipruner.search.grid import candidates
from tests.support.tiny import random_ids, tiny_model
from tests.support.toys import DENSE


@pytest.fixture
def objective() -> CalibrationObjective:
    return CalibrationObjective(Prunable.of(tiny_model("llama")), random_ids(2, 8))


def _step(objective: CalibrationObjective) -> list[Structure]:
    anatomy, grid = objective.prunable.anatomy, Grid({"channels": 8, "kv_groups": 1})
    return [anatomy.dense.replace(*move) for move in candidates("blocks", anatomy.dense, anatomy, grid)]


def test_a_step_is_measured_once_and_shows_progress(objective: CalibrationObjective, tmp_path: Path) -> None:
    structures, seen, told = _step(objective), list[tuple[int, int]](), list[int]()
    expected = objective.argmin(structures)
    remembered = RememberedObjective(objective, Memo(tmp_path / "memo.jsonl", "a"), lambda: told.append(1))
    assert remembered.argmin(structures, lambda *at: seen.append(at)) == expected
    assert seen == [(number, len(structures)) for number in range(1, len(structures) + 1)]
    assert len(told) == len(structures) == len((tmp_path / "memo.jsonl").read_text().splitlines())
    before = objective.work.evaluations
    assert remembered.argmin(structures) == expected
    assert remembered(expected.best) == expected.loss
    assert objective.work.evaluations == before


def test_what_another_process_measured_is_not_measured_again(objective: CalibrationObjective, tmp_path: Path) -> None:
    one, other = (RememberedObjective(objective, Memo(tmp_path / "memo.jsonl", "a")) for _ in range(2))
    choice, before = one.argmin(_step(objective)), objective.work.evaluations
    assert other.argmin(_step(objective)) == choice
    assert objective.work.evaluations == before


def test_a_stop_loses_nothing(objective: CalibrationObjective, tmp_path: Path) -> None:
    remembered = RememberedObjective(objective, Memo(tmp_path / "memo.jsonl", "a"))

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        remembered.argmin(_step(objective), stop)
    assert len(Memo(tmp_path / "memo.jsonl", "a")) == 3


def test_the_base_is_taken_when_something_is_measured(objective: CalibrationObjective, tmp_path: Path) -> None:
    remembered, base = RememberedObjective(objective, Memo(tmp_path / "memo.jsonl", "a")), _step(objective)[0]
    remembered.commit(base)
    assert objective.base == objective.prunable.dense
    remembered(base)
    assert objective.base == base


def test_a_loss_that_is_not_finite_is_infinity(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = nan
    objective = CalibrationObjective(Prunable.of(model), random_ids(2, 8))
    remembered = RememberedObjective(objective, Memo(tmp_path / "memo.jsonl", "a"))
    dense = objective.prunable.dense
    assert remembered(dense) == inf
    assert json.loads((tmp_path / "memo.jsonl").read_text())["values"] == [None]
    without = dense.replace(objective.prunable.anatomy.at(1, "mlp"), GONE)
    choice = remembered.argmin([dense, without])
    assert (choice.best, choice.runner_up) == (without, None)
    with pytest.raises(NumericsError, match="the calibration loss is not finite"):
        remembered.argmin([dense])


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0, inf, nan, -inf]), min_size=1, max_size=6))
def test_the_best_two(losses: list[float]) -> None:
    structures = [Structure((DENSE[0],) * place) for place in range(len(losses))]
    finite = [place for place, loss in enumerate(losses) if abs(loss) < inf]
    if not finite:
        with pytest.raises(NumericsError, match=r"finite"):
            best_two(structures, losses)
        return
    first, *rest = sorted(finite, key=lambda place: losses[place])
    expected = Choice(structures[first], losses[first])
    if rest:
        expected = Choice(expected.best, expected.loss, structures[rest[0]], losses[rest[0]])
    assert best_two(structures, losses) == expected
