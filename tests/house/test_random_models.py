"""The benchmarks on models of random weights, in small: scale.py and gpu.py from a checkpoint to their tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from multipruner.commands.main import main
from multipruner.latency import bench

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--channel-group", "32", "--sequences", "4", "--length", "16", "--moments-sequences", "8",
         "--width-sequences", "2"]  # fmt: skip


def _module(name: str) -> Any:
    with patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        return import_module(name)


def _gpu(work: Path, *more: str) -> list[str]:
    return [
        "--shape", "llama-tiny", "--device", "cpu", "--dtype", "float32", "--short", "--words", "4096", "--work",
        str(work), "--prompt", "8", "--cached", "8", "--batches", "2", "--record", str(work / "gpu.json"), *SMALL,
        "--set", "evaluation.length=16", "--set", "evaluation.max_tokens=64", *more,
    ]  # fmt: skip


class _Here:
    """Runs commands in this process; what they had of memory is made up."""

    def __init__(self) -> None:
        self.commands: list[str] = []

    def run(self, arguments: Sequence[str], marks: Path, limit: float | None = None) -> dict[str, int | None]:
        assert main(list(arguments)) == 0
        self.commands.append(" ".join(arguments))
        return {"own": 1 << 30, "all": 2 << 30, "allocated": None, "reserved": None}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Here:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    made, few = _Here(), {"probes": 1, "placements": 1, "repeats": 2, "warmup": 1, "tries": 1}
    monkeypatch.setattr(bench, "Effort", partial(bench.Effort, **few))
    monkeypatch.setattr("multipruner.jobs.prepare.Rehearsal", lambda *of, **more: nullcontext())  # tested elsewhere
    monkeypatch.setattr(_module("alone"), "run", made.run)
    return made


def test_gpu_measures_both_methods_and_goes_on_where_it_was(
    here: _Here, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, work = _module("gpu"), tmp_path / "work"
    monkeypatch.setattr(gpu, "product_rate", partial(gpu.product_rate, products=1, repeats=1))
    monkeypatch.setattr(gpu, "_ROUNDS", {True: 1})
    assert gpu.main(_gpu(work, "--methods", "program")) == 0
    first = list(here.commands)
    assert [command.split()[0] for command in first] == ["--recipe", "latency"]
    assert gpu.main(_gpu(work, "--drop")) == 0
    (paper,) = here.commands[len(first) :]
    assert "--method paper" in paper, "all else was there"
    found, said = _module("results").read(work / "gpu.json"), capsys.readouterr().out
    for columns, rows in ((found["columns"], found["rows"]), (found["run_columns"], found["runs"]),
                          (found["speed_columns"], found["speeds"])):  # fmt: skip
        assert _module("results").markdown(columns, rows) in said
        assert {row[0] for row in rows} == {"llama-tiny, program", "llama-tiny, paper"}
    stages = {(row[0].split()[1], row[1]): row for row in found["rows"]}
    for method in ("program", "paper"):
        search = stages[method, "search"]
        assert all(value > 0 for value in (search[3], search[5], search[6])), search
    assert [row[8] for row in found["runs"]] == [pytest.approx(20, abs=5)] * 2
    assert {row[1] for row in found["speeds"]} == {"prefill-b2-t8", "decode-b2-t8"}
    (table,) = (work / "llama-tiny").glob("table-b2-*.json")
    widths = [row["size"] for row in json.loads(table.read_text())["workloads"][0]["blocks"]["mlp"]]
    assert widths[:2] == [[], [32]] and len(widths) > 5, "as fine as the shape is small"
    assert all(row[4] == pytest.approx(row[2] / row[3]) and row[5] > 0 for row in found["speeds"])
    assert not list((work / "llama-tiny").glob("p*/*.safetensors")), "--drop"
    assert (work / "llama-tiny" / "dense" / "model.safetensors.index.json").exists()


def test_the_recipe_is_the_published_one_on_local_files(tmp_path: Path) -> None:
    gpu = _module("gpu")
    asked, more = gpu._arguments(_gpu(tmp_path))
    recipe = gpu.Bench("llama-tiny", asked, more).recipe()
    published = _module("gpu").read(gpu.PUBLISHED)
    assert {key for key, value in recipe.items() if published.get(key) != value} == {
        "model", "ratio", "dtype", "device", "calibration", "evaluation",
    }  # fmt: skip
    given = {"source": recipe["evaluation"]["text"]}
    assert recipe["calibration"] == {**published["calibration"], **gpu.SHORT["calibration"], **given}
    assert recipe["ratio"] == 0.2
    asked.short = False
    assert gpu.Bench("llama-tiny", asked, more).recipe()["calibration"] == {**published["calibration"], **given}


def test_the_shapes_are_as_large_as_they_are_called() -> None:
    models, torch = _module("random_models"), import_module("torch")
    from transformers import AutoModelForCausalLM

    sizes = {}
    for name, shape in models.SHAPES.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(models._config(shape))
        sizes[name] = round(sum(weight.numel() for weight in model.parameters()) / 1e9, 3)
    assert sizes["llama-2-7b"] == 6.738 and sizes["llama-3.1-8b"] == 8.03
    assert {name: sizes[name] for name in ("0.1b", "0.5b", "1.5b", "7b")} == {
        "0.1b": 0.135, "0.5b": 0.494, "1.5b": 1.544, "7b": 7.616,
    }  # fmt: skip


def test_gpu_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = _module("gpu")
    with pytest.raises(SystemExit):
        gpu.main(["--shape", "llama-9"])
    assert "--shape llama-9 is unknown; choose from" in capsys.readouterr().err
    with patch("torch.cuda.is_available", lambda: False), pytest.raises(SystemExit):
        gpu.main(["--shape", "llama-tiny", "--device", "cuda"])
    assert "torch finds no GPU here" in capsys.readouterr().err


def test_scale_measures_both_ways(here: _Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scale, path = _module("scale"), tmp_path / "scale.json"
    monkeypatch.setattr(scale, "text", lambda folder: _module("random_models").text(folder, 4096))
    monkeypatch.setattr(scale, "timed_pass", lambda model, asked, *, ahead: 2.0 - ahead)
    scale.main(["--shapes", "llama-tiny", "--work", str(tmp_path / "work"), "--record", str(path), *SMALL])
    found = _module("results").read(path)
    assert [row[0] for row in found["rows"]] == ["llama-tiny, none", "llama-tiny, disk"]
    none, disk = found["rows"]
    assert none[7] is None and disk[7] > 5, "walks over the layers"
    assert none[1] == disk[1] and none[6] == 2.0
    assert found["setting"]["passes_without_and_with_read_ahead"] == {"llama-tiny": [2.0, 1.0]}


@pytest.mark.slow
def test_processes_of_their_own_tell_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    gpu, work = _module("gpu"), tmp_path / "work"
    assert gpu.main(_gpu(work, "--methods", "program", "--batches", "1,8")) == 0
    found = json.loads((work / "gpu.json").read_text())
    (run,) = found["runs"]
    assert 0.1 < run[6] < run[7], "its own memory, and all of it"
    assert {row[1] for row in found["speeds"]} == {f"{phase}-b{batch}-t8" for phase in ("prefill", "decode")
                                                   for batch in (1, 8)}  # fmt: skip
    with pytest.raises(SystemExit, match="the run ended with 2"):
        _module("alone").run(["--model", str(tmp_path / "nothing")], tmp_path / "marks.json")


@pytest.mark.slow
def test_scale_keeps_processes_to_their_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As 7 billion parameters would, in small: layers on disk, a limit that suffices and one that does not."""
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    scale, path = _module("scale"), tmp_path / "scale.json"
    monkeypatch.setattr(scale, "text", lambda folder: _module("random_models").text(folder, 4096))
    asked = ["--shapes", "0.01b", "--offload", "disk", "--work", str(tmp_path / "work"), "--record", str(path), *SMALL]
    scale.main([*asked, "--limit", "4"])
    found = _module("results").read(path)
    (row,) = found["rows"]
    (passes,) = found["setting"]["passes_without_and_with_read_ahead"].values()
    assert 0 < row[5] < 4 and len(passes) == 2 and min(passes) > 0
    with pytest.raises(SystemExit, match="the run ended with 3"):
        scale.main([*asked, "--limit", "0.1"])
