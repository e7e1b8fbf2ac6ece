"""One folder and several runs: none is given up unasked, none goes on with what was measured for another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from multipruner.commands.main import main
from multipruner.engine.fingerprint import configuration
from multipruner.search import Memo
from multipruner.search.step import TrajectoryJournal
from tests.support.commands import arguments
from tests.support.tiny import tiny_model, tiny_tokenizer

PAPER = ("--method", "paper", "--width-sequences", "2")


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("workspace") / "finished"
    assert main(arguments(dense, output)) == 0
    return output


def _interrupted(monkeypatch: pytest.MonkeyPatch, kind: Any, after: int, command: list[str]) -> None:
    """Run a command that is stopped when it has written so many lines."""
    add, lines = kind.add, []

    def stopping(self: Any, *entry: Any) -> None:
        add(self, *entry)
        lines.append(entry)
        if len(lines) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(kind, "add", stopping)
        assert main(command) == 130


def _identity(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text().splitlines()[0])["identity"]


def test_the_paper_s_path_does_not_replace_a_finished_run(finished: Path, dense: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    capsys.readouterr()
    assert main(arguments(dense, output, *PAPER)) == 2
    assert "another kind of run" in (said := capsys.readouterr().err) and "--overwrite" in said
    for name in ("plan.json", "measurements.jsonl", "model.safetensors"):
        assert (output / name).read_bytes() == (finished / name).read_bytes()
    (output / "measurements.jsonl").unlink()  # a plan alone, as other commands write it
    assert main(arguments(dense, output, *PAPER)) == 2
    assert main(arguments(dense, output, *PAPER, "--overwrite")) == 0


def test_the_paper_s_path_does_not_give_up_an_interrupted_run(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, kept = tmp_path / "run", tmp_path / "run.partial" / "measurements.jsonl"
    _interrupted(monkeypatch, Memo, 10, arguments(dense, output))
    before = kept.read_bytes()
    assert main(arguments(dense, output, *PAPER)) == 2
    assert kept.read_bytes() == before and before.count(b"\n") == 11
    assert main(arguments(dense, output, *PAPER, "--overwrite")) == 0
    assert not kept.exists()


def test_the_exact_program_names_a_run_of_the_paper_s_path(dense: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(dense, tmp_path / "run", *PAPER)) == 0
    capsys.readouterr()
    assert main(arguments(dense, tmp_path / "run")) == 2
    assert "another kind of run" in (said := capsys.readouterr().err) and "None" not in said


@pytest.mark.parametrize(("kind", "flags"), [(Memo, ("--objective", "nll")), (TrajectoryJournal, PAPER)])
def test_a_finished_run_does_not_go_on_with_what_another_measured(
    kind: Any, flags: tuple[str, ...], finished: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    _interrupted(monkeypatch, kind, 2, arguments(dense, output, *flags, "--overwrite"))
    assert main(arguments(dense, output, "--overwrite")) == 0
    assert (output / "measurements.jsonl").read_bytes() == (finished / "measurements.jsonl").read_bytes()
    assert _identity(output / "measurements.jsonl")["objective"] == "kl"
    assert not (output / "trajectory.jsonl").exists()
    assert main(arguments(dense, output)) == 0, "its own measurements serve it"
    assert main(arguments(dense, output, *flags)) == 2, "and not the other"


def test_the_same_weights_computed_with_otherwise_are_another_model(
    finished: Path, dense: Path, tmp_path: Path
) -> None:
    other, output = tmp_path / "other", tmp_path / "run"
    shutil.copytree(dense, other)
    shutil.copytree(finished, output)
    settings = json.loads((other / "config.json").read_text())
    settings["rms_norm_eps"] = 0.5
    (other / "config.json").write_text(json.dumps(settings))
    assert main(arguments(other, output)) == 2
    settings["rms_norm_eps"] = json.loads((dense / "config.json").read_text())["rms_norm_eps"]
    settings["_name_or_path"], settings["transformers_version"] = "elsewhere", "4.0"
    (other / "config.json").write_text(json.dumps(settings))
    assert main(arguments(other, output)) == 0, "where it came from does not matter"
    one, two = tiny_model("llama"), tiny_model("llama", dtype=torch.float16)
    two.config._name_or_path = "elsewhere"
    assert configuration(one) == configuration(two)


def test_a_linked_folder_stays_a_link(finished: Path, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for more in ((), ("--align", "8", "--overwrite")):
        assert main(arguments(dense, tmp_path / "link", "--rounds", "0", *more)) == 0
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "plan.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_too_little_text_for_moments_is_said(dense: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(dense, tmp_path / "run", "--moments-sequences", "5000", "--rounds", "0")) == 0
    assert "not of 5000" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 model whose residual stream overflows when the MLP of layer 1 leaves, and only then."""
    folder = tmp_path_factory.mktemp("models") / "overflowing"
    model = tiny_model("llama", layers=4, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for layer, value in zip(model.model.layers, (40000.0, -60000.0, 60000.0, -40000.0), strict=True):
            layer.mlp.down_proj.bias[0] = value
    model.half().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text = " ".join(f"w{4 + (n * n + n // 7) % 93}" for n in range(4000))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.mark.parametrize("flags", [PAPER, ("--repair", "none")], ids=["path", "program"])
def test_a_candidate_that_overflows_is_the_worst_and_no_end(
    flags: tuple[str, ...], overflowing: Path, tmp_path: Path
) -> None:
    command = arguments(overflowing, tmp_path / "run", "--dtype", "float16", *flags)
    assert main(command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert 0 < report["search"]["loss"] < 100


def test_another_model_in_the_folder_inherits_nothing(finished: Path, dense: Path, tmp_path: Path) -> None:
    """Neither what the report showed of the first, nor its tokenizer's files; what somebody put there stays."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    old = {"chat_template.jinja": "old", "report.html": "old", "report_files/structure.png": "old", "vocab.json": "{}"}
    report = json.loads((output / "report.json").read_text())
    report["files"] += ["chat_template.jinja", "vocab.json"]  # the first model's tokenizer had them
    (output / "report.json").write_text(json.dumps(report))
    mine = ("notes.txt", "more/notes.txt", "more/code.py", "more/vocab.json", "report_files/notes.txt")
    for name, text in {**old, **dict.fromkeys(mine, "mine")}.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_text(text)
    (output / "link").symlink_to(output / "more")
    assert main(arguments(dense, output, "--ratio", "0.15")) == 0
    assert (output / "link").is_symlink(), "a link stays one"
    assert [name for name in old if (output / name).exists()] == []
    assert AutoTokenizer.from_pretrained(output).chat_template is None
    assert {(output / name).read_text() for name in mine} == {"mine"} and (output / "link" / "code.py").exists()
    for name in (*mine, "report_files/structure.png"):
        (output / name).write_text("mine")
    (output / "report_files" / "notes.txt").unlink()
    assert main(arguments(dense, output)) == 0
    assert not (output / "report_files").exists(), "nothing was left in it"
