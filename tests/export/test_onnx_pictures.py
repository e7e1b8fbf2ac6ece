"""ONNX files of image classifiers compute the logits that transformers do, for any number of pictures."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save
from multipruner.commands.main import main
from multipruner.core.errors import OutputError
from multipruner.core.families import anatomy_of
from multipruner.core.structure import GONE
from multipruner.export import onnx as module
from multipruner.export.onnx import export_onnx
from tests.support import pictures
from tests.support.tiny import plan_for

onnxruntime = import_module("onnxruntime")


def _save(folder: Path, family: str) -> Path:
    """Two heads in the first layer, no attention in the second, no MLP in the third."""
    model = pictures.tiny_classifier(family)
    anatomy = anatomy_of(model.config)
    cut = anatomy.dense.replace(anatomy.at(0, "attention"), (2, 1)).replace(anatomy.at(1, "attention"), GONE)
    plan = plan_for(model, cut.replace(anatomy.at(2, "mlp"), GONE), seed=3)
    return save(folder, apply_plan(model, plan), pictures.processor(), plan=plan, report={}, card="")


def _run(path: Path, pixels: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["pixel_values"]
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    return torch.from_numpy(session.run(None, {"pixel_values": pixels.numpy()})[0])


@pytest.mark.parametrize("family", ["dinov2", *(
    pytest.param(name, marks=pytest.mark.slow) for name in pictures.VARIANTS if name != "dinov2")])  # fmt: skip
def test_logits_are_those_of_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _save(tmp_path / "run", family)
    done = export_onnx(folder)
    assert done.path == tmp_path / "run-f32.onnx" and done.nodes > 20
    model: Any = load(folder)
    for count in (1, 2, 7):
        rows = pictures.pixels(count, seed=count)
        with torch.no_grad():
            assert (_run(done.path, rows) - model(pixel_values=rows).logits).abs().max() < 5e-5
    found = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    assert module._traced(model, folder).error(done.path) < 1e-4, "by onnx's own reference"


def test_a_file_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _save(tmp_path / "run", "vit")
    monkeypatch.setattr(module, "_computed", lambda path, given: torch.zeros(len(given["pixel_values"]), 5))
    with pytest.raises(OutputError, match="off by"):
        export_onnx(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_the_command_and_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, target = _save(tmp_path / "run", "siglip"), tmp_path / "m.onnx"
    assert main(["export", str(folder), "--format", "onnx", "--outtype", "f16", "--output", str(target)]) == 0
    assert f"{target}: " in capsys.readouterr().out
    rows = pictures.pixels(3)
    with torch.no_grad():
        right = load(folder)(pixel_values=rows).logits
    assert (_run(target, rows.half()).float() - right).abs().max() < 0.05 * right.std()
