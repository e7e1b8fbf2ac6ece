"""The benchmarks of finished models where they are served: what they record is what they measured, and of what."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from shutil import copytree
from typing import Any
from unittest.mock import patch

import pytest

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.families import anatomy_of
from multipruner.core.latency_table import Entry, LatencyTable, Workload, WorkloadTable
from multipruner.core.structure import GONE
from multipruner.latency.bench import shapes_of
from tests.support import tiny
from tests.support.gguf_cases import VOCABULARY, byte_level
from tests.support.layers import structure_of
from tests.support.served import HERE, SERVED

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _module(name: str) -> Any:
    with patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        return import_module(name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model, and one that was pruned out of it, beside each other."""
    place = tmp_path_factory.mktemp("models")
    model = tiny.tiny_model("llama", layers=3, vocab_size=VOCABULARY, hidden_size=64)
    pruned = apply_plan(model, tiny.plan_for(model, structure_of((4, 2, 7), (0, 0, 40), (2, 1, 0))))
    for name, one in {"dense": model, "pruned": pruned}.items():
        one.save_pretrained(place / name)
        byte_level().save_pretrained(place / name)
    return place


def test_dense_and_pruned_are_set_side_by_side(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving, path = _module("serving"), tmp_path / "serving.json"
    given = ["serving.py", "--work", str(tmp_path / "work"), "--model", str(folder / "dense"), "--ratio", "0.2",
             "--batches", "1,2", "--prompt", "12", "--tokens", "14", "--repeats", "1", "--threads", "1", "--exact",
             "--runtimes", ",".join(["transformers", *HERE, "vllm"]), "--record", str(path)]  # fmt: skip
    with patch.object(sys, "argv", given):
        assert serving.main(given[1:]) == 0
    said = capsys.readouterr().out
    assert "left out: vllm (no --vllm PYTHON was given)" in said
    found = _module("results").read(path)
    assert list(found["left_out"]) == ["vllm"], found["left_out"]
    assert found["setting"]["pruned"] == "random, 0.2"
    names = ["prefill-b1-t12", "prefill-b2-t12", "decode-b1-t14", "decode-b2-t14"]
    assert [row[:3:2] for row in found["rows"]] == [[one, name] for one in ["transformers", *HERE] for name in names]
    for row in found["rows"]:
        assert row[3][0] > 0 and row[4][0] > 0 and row[5] > 0
        assert (row[6], row[7] is None) == ([1.0, 1.0], False) if row[2] == names[0] else (None, True), row
        assert row[7] is None or max(row[7]) < 2e-2, "keys and values of 16 bits"
    assert _module("results").markdown(serving.COLUMNS, found["rows"]) in said


def test_a_runtime_that_is_not_here_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    serving = _module("serving")
    monkeypatch.setattr("multipruner.runtimes.served.find_spec", lambda name: None if "openvino" in name else name)
    line = ["--work", str(tmp_path), "--runtimes", "transformers,openvino,llama.cpp:q8_0,llama.cpp:q9"]
    there, missing = serving.asked_for(serving.parsed(line))
    assert there == [("transformers", "f32"), ("llama.cpp", "q8_0")]
    assert "pip install" in missing["openvino"] and "not q9" in missing["llama.cpp"]


def _table(model: Any, runtime: str) -> LatencyTable:
    """Of a machine on which every block that is there takes a millisecond."""
    one, sizes = Entry(1.0, 0.0, 1), {"attention": ((1, 2), (2, 2)), "mlp": ((8,), (40,))}
    blocks = {kind: {GONE: Entry(1e-6, 0.0, 1), **dict.fromkeys(each, one)} for kind, each in sizes.items()}
    row = WorkloadTable(Workload("prefill", 1, 12), blocks, one)
    return LatencyTable(shapes_of(model), {"runtime": runtime, "dtype": "f32"}, "", {row.workload.name: row})


@pytest.mark.parametrize("runtime", SERVED[-1:])
def test_predictions_are_held_against_the_runtime_of_the_table(
    runtime: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.tiny_model("llama", layers=3, vocab_size=VOCABULARY, hidden_size=64)
    table, record = _table(model, runtime), tmp_path / "found.json"
    (tmp_path / "table.json").write_text(table.to_json())
    benchmark, rest = _module("latency"), ["--rounds", "2", "--record", str(record)]
    given = ["latency.py", "--model", str(folder / "dense"), "--table", str(tmp_path / "table.json"),
             "--structures", "1", "--width-step", "8", *rest]  # fmt: skip
    with patch.object(sys, "argv", given):
        assert benchmark.main() == 0
    said = capsys.readouterr().out
    assert f"runtime {runtime}, device cpu" in said and "measured elsewhere" in said
    ((name, structures, *errors),) = _module("results").read(record)["rows"]
    assert (name, structures) == ("prefill-b1-t12", 1) and all(low <= high for low, high in errors)
    run = tmp_path / "run"
    copytree(folder / "pruned", run)
    dense = table.milliseconds(anatomy_of(model.config).dense, anatomy_of(model.config), name)
    row = {"predicted_ms": dense - 2, "predicted_dense_ms": dense}
    report = {"latency": {"runtime": runtime, "outtype": "f32", "phases": {name: row}}, "recipe": {"budgets": {}}}
    (run / "report.json").write_text(json.dumps(report))
    given = ["latency.py", "--check", str(run), "--dense", str(folder / "dense"), "--repeats", "1", *rest]
    with patch.object(sys, "argv", given):
        assert benchmark.main() == 0
    assert f"both folders opened by {runtime}" in capsys.readouterr().out
    ((_, *times, predicted, _),) = _module("results").read(record)["rows"]
    assert min(times) > 0 and predicted == pytest.approx(1 - 2 / dense)
