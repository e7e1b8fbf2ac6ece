"""ONNX files compute the logits that transformers do, in onnxruntime, for any batch, length and mask.

Every export takes seconds: one family is exported each time, the rest with ``-m slow``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save
from multipruner.commands import export as command
from multipruner.core.errors import ConfigError, OutputError, UnknownModelError
from multipruner.core.families import FAMILIES, anatomy_of
from multipruner.export import onnx as module
from multipruner.export.onnx import export_onnx
from tests.support import tiny
from tests.support.layers import layers_of, structure_of

onnx, onnxruntime = import_module("onnx"), import_module("onnxruntime")
VARIANTS = ("llama-tied", "mistral-sliding", "qwen2-mixed", "qwen3", "baichuan")
SHAPES = ((2, 9), (1, 1), (3, 5), (1, 40))


def _save(folder: Path, variant: str) -> Path:
    """No attention in the first layer, half the heads in the second, no MLP in the third."""
    model = tiny.tiny_model(**{**tiny.VARIANTS, **tiny.MORE}[variant])
    first, second, third, *rest = layers_of(anatomy_of(model.config).dense)
    half = (second.query_heads // 2, second.kv_heads // 2, 17)
    cut = structure_of((0, 0, first.channels), half, third._replace(channels=0), *rest)
    plan = tiny.plan_for(model, cut, seed=3)
    return save(folder, apply_plan(model, plan), tiny.tiny_tokenizer(), plan=plan, report={}, card="")


def _run(path: Path, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [entry.name for entry in session.get_outputs()] == ["logits"]
    return torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])


def _check(path: Path, model: Any, shape: tuple[int, int], tolerance: float) -> None:
    ids = tiny.random_ids(*shape, seed=shape[1])
    mask = torch.ones_like(ids)
    mask[0, : shape[1] // 3] = 0
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # what a padding token sees is nobody's business
    assert (_run(path, ids, mask) - logits)[mask.bool()].abs().max() < tolerance, shape


def test_every_family_is_here() -> None:
    here = {tiny.VARIANTS[variant]["family"] for variant in VARIANTS}
    assert here | {options["family"] for options in tiny.MORE.values()} == set(FAMILIES)


@pytest.mark.parametrize(
    "variant", [VARIANTS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS[1:])]
)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    folder = _save(tmp_path / "run", variant)
    done = export_onnx(folder, trust_remote_code=True)
    assert done.path == tmp_path / "run-f32.onnx" and done.weights is None
    assert done.nbytes == done.path.stat().st_size and done.nodes > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-f32.onnx"]
    onnx.checker.check_model(done.path, full_check=True)
    assert b"site-packages" not in done.path.read_bytes(), "where it was made is nobody's business"
    model = load(folder, trust_remote_code=True)
    for shape in SHAPES:
        _check(done.path, model, shape, 5e-5)
    ids = tiny.random_ids(1, 9)
    padded, mask = torch.cat([torch.zeros(1, 4).long(), ids], 1), torch.tensor([[0] * 4 + [1] * 9])
    alone = _run(done.path, ids, torch.ones_like(ids))
    assert (_run(done.path, padded, mask)[:, 4:] - alone).abs().max() < 5e-5, "padding on the left"


@pytest.mark.slow
def test_a_uniform_result_and_half_precision(tmp_path: Path) -> None:
    dense = tiny.tiny_model("llama")
    plan = tiny.plan_for(dense, structure_of(*[(2, 1, 17)] * 3))
    save(tmp_path / "run", apply_plan(dense, plan), None, plan=plan, report={}, card="")
    model = load(tmp_path / "run")
    _check(export_onnx(tmp_path / "run").path, model, (2, 9), 5e-5)
    done = export_onnx(tmp_path / "run", outtype="f16")
    weights = [tensor.data_type for tensor in onnx.load(done.path).graph.initializer if len(tensor.dims) == 2]
    assert weights and set(weights) == {onnx.TensorProto.FLOAT16}
    _check(done.path, model, (2, 9), 0.05)


@pytest.mark.slow
def test_weights_that_do_not_fit_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LIMIT", 1000)
    folder, target = _save(tmp_path / "run", "llama-tied"), tmp_path / "deep" / "model.onnx"
    done = export_onnx(folder, target)
    assert done.weights == target.with_name("model.onnx.data")
    assert {path.name for path in target.parent.iterdir()} == {"model.onnx", "model.onnx.data"}
    assert done.weights is not None and done.weights.stat().st_size > target.stat().st_size
    _check(target, load(folder), (2, 9), 5e-5)
    monkeypatch.setattr(module, "_LIMIT", 1 << 30)
    export_onnx(folder, target, overwrite=True)
    assert [path.name for path in target.parent.iterdir()] == ["model.onnx"]
    _check(target, load(folder), (2, 9), 5e-5)


def test_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _save(tmp_path / "run", "llama-tied")
    (tmp_path / "run-f32.onnx").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        export_onnx(folder)
    assert (tmp_path / "run-f32.onnx").read_text() == "mine"
    with pytest.raises(ConfigError, match="f32 or f16"):
        export_onnx(folder, outtype="q8_0")
    with pytest.raises(UnknownModelError):
        export_onnx(tmp_path / "none")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"multipruner\[onnx\]"):
        export_onnx(folder, tmp_path / "other.onnx")


@pytest.mark.slow
def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _save(tmp_path / "run", "qwen2-mixed")
    assert command.run([str(folder), "--format", "onnx", "--output", str(tmp_path / "m.onnx")]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'm.onnx'}: " in shown and "MB" in shown  # behind the minutes that a slow machine tells
    assert np.isfinite(_run(tmp_path / "m.onnx", tiny.random_ids(), torch.ones_like(tiny.random_ids()))).all()
    with pytest.raises(ConfigError, match="--base-gguf"):
        command.run([str(folder), "--format", "onnx", "--base-gguf", "base.gguf"])
