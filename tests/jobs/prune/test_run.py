"""The main job on a tiny model: output folder, resume after a kill at any step, nested ratios, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import multipruner
from multipruner.commands.main import main
from multipruner.core.families import FAMILIES
from multipruner.core.plan import PruningPlan
from tests.support.commands import paper_arguments
from tests.support.tiny import random_ids, tiny_model, tiny_tokenizer

FILES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "plan.json",
    "report.json",
    "tokenizer.json",
    "trajectory.jsonl",
}


@pytest.fixture(scope="module")
def finished(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert main(paper_arguments(dense, output)) == 0
    return output


def test_the_folder_is_complete(finished: Path, dense: Path) -> None:
    assert {path.name for path in finished.iterdir()} >= FILES
    assert not finished.with_name("finished.partial").exists()
    report = json.loads((finished / "report.json").read_text())
    plan = PruningPlan.from_json((finished / "plan.json").read_text())
    model = multipruner.load(finished)
    counted = sum(p.numel() for p in model.parameters())
    assert counted == report["parameters"]["after"]
    assert report["ratio"] == pytest.approx(1 - counted / report["parameters"]["before"])
    assert plan.structure.to_json() == report["structure"]
    assert report["calibration"]["tokens"] == 64
    assert len(report["calibration"]["hash"]) == 64
    stored = load_file(finished / "model.safetensors")
    assert not any(bool((tensor == 0).all()) for tensor in stored.values()), "no zeros left over"


def test_cached_equals_uncached_logits_of_the_written_model(finished: Path) -> None:
    model, ids = multipruner.load(finished), random_ids(2, 9)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = None
        for position in range(ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert torch.allclose(out.logits[:, 0], whole[:, position], atol=1e-4)


def test_a_run_killed_at_any_step_ends_with_the_same_plan(finished: Path, dense: Path, tmp_path: Path) -> None:
    lines = (finished / "trajectory.jsonl").read_text().splitlines(keepends=True)
    plan = (finished / "plan.json").read_bytes()
    for cut in range(len(lines)):
        output = tmp_path / f"cut-{cut}"
        partial = output.with_name(output.name + ".partial")
        partial.mkdir()
        torn = lines[cut][: len(lines[cut]) // 2] if cut % 2 else ""
        (partial / "trajectory.jsonl").write_text("".join(lines[:cut]) + torn)
        assert main(paper_arguments(dense, output)) == 0
        assert (output / "plan.json").read_bytes() == plan, f"cut after line {cut}"


def test_a_run_killed_for_real_goes_on(finished: Path, dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    journal = output.with_name("killed.partial") / "trajectory.jsonl"
    command = [sys.executable, "-m", "multipruner", *paper_arguments(dense, output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    if process.returncode == -signal.SIGKILL:
        assert not output.exists()
    assert main(paper_arguments(dense, output)) == 0
    assert (output / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


def test_a_shortlist_measures_less_and_goes_on_as_it_would_have(dense: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert main([*paper_arguments(dense, whole), "--shortlist", "1"]) == 0
    lines = (whole / "trajectory.jsonl").read_text().splitlines(keepends=True)
    steps = [json.loads(line) for line in lines[1:-1]]
    assert any(len(step["measured"]) < step["candidates"] for step in steps)
    for cut in (2, len(lines) // 2):
        output = tmp_path / f"cut-{cut}"
        partial = output.with_name(output.name + ".partial")
        partial.mkdir()
        (partial / "trajectory.jsonl").write_text("".join(lines[:cut]))
        assert main([*paper_arguments(dense, output), "--shortlist", "1"]) == 0
        assert (output / "plan.json").read_bytes() == (whole / "plan.json").read_bytes(), f"cut after line {cut}"


def test_a_smaller_ratio_costs_no_search(finished: Path, dense: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "nested"
    shutil.copytree(finished, output)
    assert main([*paper_arguments(dense, output), "--ratio", "0.15"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "covers this ratio" in said and "its shares are of that ratio" in said
    report = json.loads((output / "report.json").read_text())
    assert report["ratio"] == pytest.approx(0.15, abs=0.05)
    assert report["search"]["work_of_this_process"] == {}
    assert report["search"]["searched_to"] == 0.3
    assert (output / "trajectory.jsonl").read_bytes() == (finished / "trajectory.jsonl").read_bytes()
    assert main(paper_arguments(dense, output)) == 0, "and back again"
    assert (output / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


def test_an_interrupted_overwrite_goes_on(finished: Path, dense: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "over"
    shutil.copytree(finished, output)
    (output / "notes.txt").write_text("mine")
    again = [*paper_arguments(dense, output), "--shares", "30:60:10", "--overwrite"]
    partial = output.with_name("over.partial")
    reference = tmp_path / "reference"
    assert main([*paper_arguments(dense, reference), "--shares", "30:60:10"]) == 0
    lines = (reference / "trajectory.jsonl").read_text().splitlines(keepends=True)
    partial.mkdir()
    (partial / "trajectory.jsonl").write_text("".join(lines[:4]))
    capsys.readouterr()
    assert main(again) == 0
    assert "going on after step 3" in capsys.readouterr().out
    assert (output / "plan.json").read_bytes() == (reference / "plan.json").read_bytes()
    assert (output / "notes.txt").read_text() == "mine", "a file of the user's own survives"


def test_a_typed_model_wins_over_a_recipe_file(dense: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model: no/where\nshares: 0:1:0\nratio: 0.1\n")
    flags = paper_arguments(dense, tmp_path / "out")
    del flags[flags.index("--ratio") : flags.index("--ratio") + 2]
    assert main([*flags, "--recipe", str(recipe)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["recipe"]["model"] == str(dense)
    assert (report["recipe"]["ratio"], report["recipe"]["shares"]["mlp"]) == (0.1, 1.0)


def test_other_settings_do_not_touch_a_finished_folder(finished: Path, dense: Path, capsys) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert main([*paper_arguments(dense, finished), "--shares", "1:1:1"]) == 2
    assert main([*paper_arguments(dense, finished), "--ratio", "0.5"]) == 2
    errors = capsys.readouterr().err
    assert "shares: 44:52:4 -> 1:1:1" in errors
    assert "to a ratio of 0.3, not 0.5" in errors
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before


def test_ready_token_ids(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "ids"
    more = ["--calibration", str(dense / "tokens.safetensors"), "--ratio", "0.2"]
    assert main([*paper_arguments(dense, output), *more]) == 0
    assert json.loads((output / "report.json").read_text())["calibration"]["tokens"] == 96


@pytest.mark.parametrize("order", ["heads,mlp,blocks", "mlp,blocks,heads"])
def test_any_order_and_shares(dense: Path, tmp_path: Path, order: str) -> None:
    output = tmp_path / "order"
    assert main([*paper_arguments(dense, output), "--stages", order, "--shares", "20:50:30", "--ratio", "0.2"]) == 0
    lines = (output / "trajectory.jsonl").read_text().splitlines()[1:-1]
    stages = list(dict.fromkeys(json.loads(line)["stage"] for line in lines))
    assert stages == [stage for stage in order.split(",") if stage in stages]


BAD = {
    "unknown recipe": (["--model", "lama"], "did you mean 'llama'"),
    "ratio of nothing": (["--ratio", "0"], "ratio"),
    "ratio of all": (["--ratio", "1"], "ratio"),
    "unreachable ratio": (["--ratio", "0.9", "--shares", "0:1:0"], "maximum is about"),
    "shares that do not parse": (["--shares", "44:52"], "44:52:4"),
    "stages that do not parse": (["--stages", "blocks,mlp"], "blocks,mlp,heads"),
    "group that does not divide": (["--channel-group", "7"], "these do: 1, 2, 4, 5, 8, 10, 20, 40"),
    "text that is not there": (["--calibration", "nowhere.txt"], "nowhere.txt"),
    "too little text": (["--sequences", "4000"], "tokens"),
    "column that is not there": (["--calibration", "{dense}/rows.jsonl", "--text-column", "txt"], "txt"),
    "empty text": (["--calibration", "{dense}/empty.txt"], "empty"),
    "folder with something else": (["--output", "{dense}"], "no multipruner run"),
    "unknown family": (["--model", "{other}"], f"supported: {', '.join(sorted(FAMILIES))}"),
    "NaN weights": (["--model", "{nan}"], "layers.1.mlp.down_proj.weight"),
    "less than a step": (["--ratio", "0.0001"], "smallest step"),
    "number that is none": (["--ratio", "a fifth"], "--ratio"),
    "unknown flag": (["--ratoi", "0.2"], "--ratoi"),
    "unknown task": (["--eval", "piqqa"], "did you mean 'piqa'"),
    "evaluation text that is not there": (["--eval-text", "nowhere.txt"], "nowhere.txt"),
    "the current folder as output": (["--output", "."], "cannot be replaced"),
    "unknown device": (["--device", "cudda"], "cudda"),
    "no model in folder": (["--model", "{empty}"], "config.json"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case: str, dense: Path, tmp_path: Path, capsys) -> None:
    places = {"dense": dense, "other": tmp_path / "gpt", "nan": tmp_path / "nan", "empty": tmp_path / "empty"}
    (dense / "empty.txt").write_text(" \n")
    (dense / "rows.jsonl").write_text('{"text": "w5 w6"}\n')
    places["empty"].mkdir()
    if case == "unknown family":
        shutil.copytree(dense, places["other"])
        config = json.loads((dense / "config.json").read_text()) | {"model_type": "nobody"}
        (places["other"] / "config.json").write_text(json.dumps(config))
    if case == "NaN weights":
        model = tiny_model("llama", layers=4)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 3] = float("nan")
        model.save_pretrained(places["nan"])
        tiny_tokenizer().save_pretrained(places["nan"])
    flags, expected = BAD[case]
    output = tmp_path / "out"
    code = main(paper_arguments(dense, output, *(flag.format(**places) for flag in flags)))
    printed = capsys.readouterr().err
    assert code not in (0, None)
    assert expected in printed
    assert printed.count("\n") == 1, printed
    assert "Traceback" not in printed
    assert not output.exists()
    assert not output.with_name("out.partial").exists()


def test_no_space_left_is_said(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    output = tmp_path / "full"
    assert main(paper_arguments(dense, output)) == 2
    assert "free" in capsys.readouterr().err
    assert not output.exists()
    monkeypatch.undo()
    assert main(paper_arguments(dense, output)) == 0, "the search was kept"


def test_ctrl_c_says_how_to_go_on(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "stopped"
    command = [sys.executable, "-m", "multipruner", *paper_arguments(dense, output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not output.with_name("stopped.partial").exists():
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=120)
    assert process.returncode == 130
    assert printed == "multipruner: stopped; the same command goes on from here\n"
    assert not output.exists()


def test_two_runs_do_not_share_a_folder(dense: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "shared"
    output.with_name("shared.partial").mkdir()
    command = [sys.executable, "-m", "multipruner", *paper_arguments(dense, output)]
    held = FileLock(output.with_name("shared.partial") / ".lock")
    with held:
        second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "another process is writing" in second.stderr


def test_eval_command(finished: Path, dense: Path, tmp_path: Path, capsys) -> None:
    result = tmp_path / "result.json"
    code = main(["eval", str(finished), "--eval-text", str(dense / "text.txt"), "--output", str(result)])
    assert code == 0
    assert "dense" in capsys.readouterr().out
    assert str(finished) in json.loads(result.read_text())
    assert json.loads((finished / "report.json").read_text())["evaluations"]


def test_eval_says_what_is_wrong_before_it_evaluates(
    finished: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("multipruner.jobs.evaluate.evaluate", lambda *given, **more: pytest.fail("evaluated"))
    text = str(dense / "text.txt")
    for command in ([str(finished), "nosuch"], [str(finished), "--output", str(tmp_path / "no" / "dir" / "x.json")]):
        assert main(["eval", *command, "--eval-text", text]) == 2
    said = capsys.readouterr().err
    assert "nosuch" in said and "there is no folder" in said


def test_help_and_catalogue(capsys) -> None:
    for command in (["--help"], ["eval", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(command)
        assert stop.value.code == 0
    assert main(["--model", "list"]) == 0
    assert "llama" in capsys.readouterr().out
