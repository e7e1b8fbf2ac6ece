"""Runs whose residual stream leaves in a basis of its own, from recipe to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import multipruner
from multipruner import Run
from multipruner.commands.main import main
from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.plan import PruningPlan
from multipruner.jobs.prune.given_plan import apply_given_plan
from tests.support.tiny import random_ids, tiny_model, tiny_tokenizer


def _settings(dense: Path) -> dict[str, Any]:
    text = str(dense / "text.txt")
    return {
        "model": str(dense), "ratio": 0.4, "channel_group": 8, "rounds": 0, "hidden_size": 32,
        "calibration": {"source": text, "sequences": 4, "length": 16, "moments_sequences": 12},
        "evaluation": {"text": text, "length": 64},
    }  # fmt: skip


@pytest.fixture(scope="module")
def turned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return multipruner.prune(**_settings(dense), rotate="on", output=tmp_path_factory.mktemp("turned") / "run")


@pytest.fixture(scope="module")
def tied(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tied") / "tiny"
    tiny_model("llama", tied=True, layers=2).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "text.txt").write_text((dense / "text.txt").read_text())
    return folder


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(random_ids()).logits


def test_the_plan_says_so_and_the_folder_holds_it(turned: Run) -> None:
    plan = turned.plan
    assert plan.bases == ("hidden",) and plan.turned == "hidden dimensions" and plan.stream == tuple(range(32))
    assert '"version": 4' in plan.to_json() and PruningPlan.from_json(plan.to_json()) == plan
    card = (turned.folder / "README.md").read_text()
    assert "Its hidden dimensions are those of bases that the run worked out of its text." in card
    assert turned.report["recipe"]["rotate"] == "on" and turned.model.config.hidden_size == 32
    assert torch.equal(_logits(multipruner.load(turned.folder)), _logits(turned.model))


def test_gains_are_one_but_for_a_factor(turned: Run) -> None:
    """Only the last norm's is refitted by the dimension."""
    for layer in turned.model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            gain = getattr(layer, name, None)
            assert gain is None or bool((gain.weight == gain.weight[0]).all())


def test_a_given_plan_works_the_basis_out_anew(turned: Run, dense: Path, tmp_path: Path) -> None:
    recipe = multipruner.Recipe.build(_settings(dense))
    again = apply_given_plan(recipe, turned.folder / "plan.json", tmp_path / "again")
    assert again.plan == turned.plan and again.report["recipe"]["rotate"] == "on"
    assert (_logits(again.model) - _logits(turned.model)).abs().max() < 1e-4


def test_a_plan_alone_cannot_cut_the_weights(turned: Run, dense: Path, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(ConfigError, match="hidden dimensions are not those of the weights"):
        multipruner.apply_plan(tiny_model("llama", layers=4), turned.plan)
    code = main(["apply", str(turned.folder), "--model", str(dense), "--output", str(tmp_path / "out")])
    assert code and not (tmp_path / "out").exists()
    assert "its hidden dimensions are those of bases that the run worked out" in capsys.readouterr().err


def test_what_was_measured_in_another_basis_is_another_run(turned: Run, dense: Path) -> None:
    with pytest.raises(multipruner.MultiprunerError, match="hidden_basis"):
        multipruner.prune(**_settings(dense), rotate="off", output=turned.folder)


def test_a_killed_run_goes_on_in_the_same_basis(turned: Run, dense: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from multipruner.jobs.prune import run as job

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            multipruner.prune(**_settings(dense), rotate="on", output=tmp_path / "run")
    console = Console(record=True, width=200, quiet=False, file=(tmp_path / "log").open("w"))
    again = multipruner.prune(**_settings(dense), rotate="on", output=tmp_path / "run", console=console)
    assert "losses were measured before" in console.export_text()
    assert again.plan == turned.plan and torch.equal(_logits(again.model), _logits(turned.model))


def test_a_tied_head_is_left_as_it_is_with_a_line(tied: Path, tmp_path: Path) -> None:
    console = Console(record=True, width=200, file=(tmp_path / "log").open("w"))
    run = multipruner.prune(**_settings(tied), rotate="auto", output=tmp_path / "run", console=console)
    assert run.plan.bases == () and run.plan.structure.hidden == 32 and run.model.config.tie_word_embeddings
    assert "in no basis of their own: its head is its embeddings" in console.export_text()


def test_what_cannot_be_turned_is_refused_where_it_is_asked_for(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rotate = on: its head is its embeddings.*give --rotate off"):
        multipruner.prune(**_settings(tied), rotate="on", output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
