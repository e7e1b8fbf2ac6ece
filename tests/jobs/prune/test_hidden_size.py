"""Runs that make the residual stream narrower, from recipe to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import multipruner
from multipruner import Run
from multipruner.core.errors import ConfigError
from multipruner.core.structure import Structure
from multipruner.jobs.prune.given_plan import apply_given_plan
from multipruner.jobs.sweep.run import sweep
from tests.support.tiny import random_ids


def _settings(dense: Path) -> dict[str, Any]:
    text = str(dense / "text.txt")
    return {
        "model": str(dense), "ratio": 0.4, "channel_group": 8, "rounds": 0,
        "calibration": {"source": text, "sequences": 4, "length": 16, "moments_sequences": 12},
        "evaluation": {"text": text, "length": 64},
    }  # fmt: skip


@pytest.fixture(scope="module")
def narrow(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with 32 of 48 dimensions."""
    return multipruner.prune(**_settings(dense), hidden_size=32, output=tmp_path_factory.mktemp("hidden") / "narrow")


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(random_ids()).logits


def test_a_run_keeps_the_width_and_the_budget(narrow: Run) -> None:
    report, structure = narrow.report, narrow.plan.structure
    assert structure.hidden == 32 == narrow.model.config.hidden_size
    assert report["structure"]["hidden"] == 32 and Structure.from_json(report["structure"]) == structure
    assert sum(weight.numel() for weight in narrow.model.parameters()) == report["parameters"]["after"]
    assert report["ratio"] == pytest.approx(1 - report["parameters"]["after"] / report["parameters"]["before"])
    assert report["ratio"] >= 0.4
    assert "32 of 48 hidden dimensions" in report["picture"]
    assert "| hidden dimensions | 48 | 32 |" in (narrow.folder / "README.md").read_text()


def test_what_was_written_is_the_model_in_memory(narrow: Run) -> None:
    assert torch.equal(_logits(multipruner.load(narrow.folder)), _logits(narrow.model))


def test_its_plan_makes_the_same_model_again(narrow: Run, dense: Path, tmp_path: Path) -> None:
    recipe = multipruner.Recipe.build(_settings(dense))
    again = apply_given_plan(recipe, narrow.folder / "plan.json", tmp_path / "again")
    assert again.plan == narrow.plan
    assert (_logits(again.model) - _logits(narrow.model)).abs().max() < 1e-4


def test_the_width_is_chosen_by_the_loss(dense: Path, tmp_path: Path) -> None:
    run = multipruner.prune(**_settings(dense), hidden_size="auto", hidden_step=16, output=tmp_path / "auto")
    losses = {int(size): loss for size, loss in run.report["search"]["hidden_sizes"].items()}
    assert set(losses) == {48, 32} and run.report["ratio"] >= 0.4
    assert (run.plan.structure.hidden or 48) == min(losses, key=lambda size: losses[size])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hidden_size": 40}, "multiple of hidden_step = 32"),
        ({"hidden_size": 64}, "below the model's 48"),
        ({"hidden_size": 32, "method": "greedy"}, "needs --method program"),
    ],
)
def test_a_width_that_cannot_be_is_refused(dense: Path, tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        multipruner.prune(**_settings(dense), **settings, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_refuses_it(dense: Path, tmp_path: Path) -> None:
    from multipruner.config.sweep_points import SweepPoints

    recipe = multipruner.Recipe.build({**_settings(dense), "hidden_size": 32})
    with pytest.raises(ConfigError, match="a sweep keeps the hidden size"):
        sweep(recipe, SweepPoints("ratio", ("0.2",)), tmp_path / "sweep")
