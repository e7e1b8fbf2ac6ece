"""The default method end to end on a tiny model: tables, exact program, repair, checkpoint; resumed and re-used."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import multipruner
from multipruner.commands.main import main
from multipruner.config.choices import METHODS
from multipruner.config.effort import EFFORTS
from multipruner.config.recipe import Recipe
from multipruner.core.plan import PruningPlan
from multipruner.jobs import last_repair
from multipruner.sources.calibration import load_calibration
from tests.support.commands import arguments
from tests.support.layers import layers_of
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("global") / "finished"
    assert main(arguments(dense, output)) == 0
    return output


def _report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


def _measured(folder: Path) -> int:
    return len((folder / "measurements.jsonl").read_text().splitlines()) - 1


def test_the_budget_is_kept_and_nearly_used_up(finished: Path) -> None:
    report = _report(finished)
    assert 0.3 <= report["ratio"] < 0.33
    assert report["search"]["method"] == "program" and report["search"]["objective"] == "kl"
    assert report["search"]["rounds"][0]["round"] == 0
    best = min(r["loss"] for r in report["search"]["rounds"])
    before = report["search"]["loss_before_repair_of_all"]
    assert report["search"]["loss"] < before == best if before else report["search"]["loss"] == best
    assert not finished.with_name("finished.partial").exists()


def test_the_written_model_has_the_divergence_that_was_measured(finished: Path, dense: Path) -> None:
    """Repair included: what is on disk is what was scored."""
    report, original = _report(finished), AutoModelForCausalLM.from_pretrained(dense).eval()
    recipe = Recipe.build(report["recipe"])
    text = load_calibration(recipe.calibration, tiny_tokenizer(), original)
    pruned = multipruner.load(finished).eval()
    with torch.no_grad():
        p = original(input_ids=text.ids).logits[:, :-1].log_softmax(-1)
        q = pruned(input_ids=text.ids).logits[:, :-1].log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1)
    scored = text.ids[:, 1:] != text.ignore_id
    expected = ((divergence * scored).sum(1) / scored.sum(1)).mean()
    assert report["search"]["loss"] == pytest.approx(float(expected), rel=2e-2, abs=1e-4)


def test_the_plan_alone_gives_other_weights_than_the_repaired_ones(finished: Path, dense: Path) -> None:
    plan = PruningPlan.from_json((finished / "plan.json").read_text())
    sliced = multipruner.apply_plan(AutoModelForCausalLM.from_pretrained(dense), plan)
    written = multipruner.load(finished)
    assert sliced.config.to_dict()["per_layer_config"] == written.config.to_dict()["per_layer_config"]
    differing = {
        name.rsplit(".", 2)[-2]
        for name, tensor in sliced.state_dict().items()
        if not torch.equal(tensor, written.state_dict()[name])
    }
    assert differing and differing <= {"down_proj", "o_proj", "norm"}


def test_the_last_norm_can_be_kept(finished: Path, dense: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(dense, tmp_path / "kept", "--final-norm", "keep")) == 0
    assert "gain of the last norm" not in capsys.readouterr().out
    norms = [multipruner.load(folder).model.norm.weight for folder in (finished, tmp_path / "kept")]
    original = AutoModelForCausalLM.from_pretrained(dense).model.norm.weight
    assert torch.equal(norms[1], original) and not torch.equal(norms[0], original)
    losses = [_report(folder)["search"]["loss"] for folder in (finished, tmp_path / "kept")]
    assert losses[0] < losses[1]


def test_another_ratio_measures_little_more(finished: Path, dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    assert main(arguments(dense, output)) == 0
    first = _measured(output)
    assert first == _measured(finished)
    assert main(arguments(dense, output, "--ratio", "0.2")) == 0
    assert 0.2 <= _report(output)["ratio"] < 0.23
    assert _measured(output) < 2 * first, "the first tables serve every ratio"
    assert main(arguments(dense, output)) == 0
    assert _report(output)["structure"] == _report(finished)["structure"]


def test_other_settings_are_refused_unless_overwritten(finished: Path, dense: Path, capsys) -> None:
    before = (finished / "plan.json").read_text()
    assert main(arguments(dense, finished, "--objective", "nll")) == 2
    assert "objective" in capsys.readouterr().err
    assert (finished / "plan.json").read_text() == before


def test_a_killed_run_goes_on_and_ends_the_same(finished: Path, dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    measurements = tmp_path / "killed.partial" / "measurements.jsonl"
    command = [sys.executable, "-m", "multipruner", *arguments(dense, output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while process.poll() is None and not (measurements.exists() and len(measurements.read_bytes().splitlines()) > 8):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and measurements.exists()
    assert main(arguments(dense, output)) == 0
    assert (output / "plan.json").read_text() == (finished / "plan.json").read_text()
    assert _report(output)["search"]["work_of_this_process"]["structures"]["evaluations"] < _measured(output)
    assert not measurements.parent.exists()


def test_uniform_results_are_stock_checkpoints(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "uniform"
    assert main(arguments(dense, output, "--layout", "uniform")) == 0
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "llama" and "auto_map" not in config
    stock = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(stock(ids).logits, multipruner.load(output)(ids).logits)
    assert len({tuple(row) for row in _report(output)["structure"] if any(row)}) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--ratio", "0.99"), "nearest"),
        (("--channel-group", "7"), "does not divide"),
        (("--method", "fast"), "--method"),
        (("--ridge", "0"), "ridge"),
        (("--importance", "activatoin"), "activation"),
    ],
)
def test_bad_input_is_one_line(flags: tuple[str, ...], expected: str, dense: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "bad"
    assert main(arguments(dense, output, *flags)) == 2
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1
    assert not output.exists() and not output.with_name("bad.partial").exists()


def test_nan_weights_are_named(dense: Path, tmp_path: Path, capsys) -> None:
    model = tiny_model("llama", layers=4)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    command = arguments(dense, tmp_path / "out", "--model", str(tmp_path / "nan"))
    assert main(command) == 2
    assert "NaN" in capsys.readouterr().err


@pytest.mark.parametrize("repair", ["none", "lstsq"])
@pytest.mark.parametrize("importance", ["magnitude", "activation", "second-order", "none"])
def test_ingredients_combine(importance: str, repair: str, dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "mixed"
    flags = ("--importance", importance, "--repair", repair, "--rounds", "0", "--objective", "nll")
    assert main(arguments(dense, output, *flags)) == 0
    assert _report(output)["ratio"] >= 0.3


def test_repair_at_the_end_only_leaves_the_search_without_it(dense: Path, tmp_path: Path) -> None:
    """The search decides as without repair, and the model is repaired all the same."""
    runs = {"none": ("--repair", "none"), "final": ("--repair-stage", "final", "--accumulate", "0"),
            "all": ("--repair-stage", "final", "--accumulate-ridge", "auto")}  # fmt: skip
    for name, flags in runs.items():
        assert main(arguments(dense, tmp_path / name, *flags)) == 0
    plans = {name: json.loads((tmp_path / name / "plan.json").read_text())["blocks"] for name in runs}
    assert plans["final"] == plans["none"] == plans["all"]
    losses = {name: _report(tmp_path / name)["search"] for name in runs}
    assert losses["final"]["loss_before_repair_of_all"] == losses["none"]["loss"] != losses["final"]["loss"]
    test_the_written_model_has_the_divergence_that_was_measured(tmp_path / "final", dense)
    test_the_written_model_has_the_divergence_that_was_measured(tmp_path / "all", dense)


def test_a_method_is_a_set_of_defaults_that_gives_way() -> None:
    paper = Recipe.build({"model": "m", "method": "paper", "importance": "none"})
    assert (paper.method, paper.importance, paper.calibration.length) == ("paper", "none", 128)
    default = Recipe.build({"model": "m"})
    assert (default.method, default.objective, default.repair) == ("program", "kl", "lstsq")
    row = EFFORTS["thorough"].by_method["paper"]["calibration"]
    assert "calibration" not in METHODS["paper"].preset and row["length"] == 128, "building changes no table"


def test_a_run_of_the_other_method_leaves_nothing_behind(finished: Path, dense: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "switched"
    partial = tmp_path / "switched.partial"
    partial.mkdir()
    left = {"format": "multipruner-trajectory", "of": "an interrupted run of the paper's path"}
    (partial / "trajectory.jsonl").write_text(json.dumps(left) + "\n")
    assert main(arguments(dense, output)) == 2
    assert "another kind of run" in capsys.readouterr().err and (partial / "trajectory.jsonl").exists()
    assert main(arguments(dense, output, "--overwrite")) == 0
    assert (output / "plan.json").read_text() == (finished / "plan.json").read_text()
    assert (output / "measurements.jsonl").exists() and not (output / "trajectory.jsonl").exists()
    assert main(arguments(dense, output, "--method", "paper", "--overwrite")) == 0
    assert (output / "trajectory.jsonl").exists() and not (output / "measurements.jsonl").exists()


def test_the_card_promises_no_more_than_holds(finished: Path, dense: Path, tmp_path: Path) -> None:
    assert "bit for bit" not in (finished / "README.md").read_text()
    assert main(arguments(dense, tmp_path / "plain", "--repair", "none", "--rounds", "0")) == 0
    assert "bit for bit" in (tmp_path / "plain" / "README.md").read_text()
    narrower = ("--repair", "none", "--rounds", "0", "--hidden-size", "32")  # gains are fitted, which no plan says
    assert main(arguments(dense, tmp_path / "narrow", *narrower)) == 0
    assert "bit for bit" not in (tmp_path / "narrow" / "README.md").read_text()


@pytest.mark.parametrize("factor", [float("inf"), -1.0], ids=["overflows", "harms"])
def test_a_repair_of_all_that_does_no_good_is_not_taken(
    factor: float, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = last_repair.refitted

    def broken(*given: Any) -> Any:
        outputs, gain = fitted(*given)
        return {block: output._replace(weight=factor * output.weight) for block, output in outputs.items()}, gain

    monkeypatch.setattr(last_repair, "refitted", broken)
    assert main(arguments(dense, tmp_path / "run", "--repair-stage", "final", "--rounds", "0")) == 0
    assert "(no better: not taken)" in capsys.readouterr().out
    search = _report(tmp_path / "run")["search"]
    assert not search["last_norm_refitted"]
    assert search["loss"] != search["rounds"][0]["loss"], "the search did not score the repair of single blocks"
    test_the_written_model_has_the_divergence_that_was_measured(tmp_path / "run", dense)


def test_aligned_widths_are_multiples(dense: Path, tmp_path: Path) -> None:
    assert main(arguments(dense, tmp_path / "aligned", "--align", "20", "--rounds", "0")) == 0
    plan = PruningPlan.from_json((tmp_path / "aligned" / "plan.json").read_text())
    assert plan.structure != plan.dense
    head_dim = 16
    for size, full in zip(layers_of(plan.structure), layers_of(plan.dense), strict=True):
        assert size.channels == full.channels or size.channels % 20 == 0
        assert size.kv_heads in (0, full.kv_heads) or size.kv_heads * head_dim % 20 == 0
    assert main(arguments(dense, tmp_path / "odd", "--align", "7")) == 2
    assert not (tmp_path / "odd").exists()
