"""OpenVINO folders compute the logits that transformers do, step by step and by openvino-genai."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino")
pytest.importorskip("openvino_tokenizers")

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save
from multipruner.commands import export as command
from multipruner.core.errors import ConfigError, OutputError, UnknownModelError, UnsupportedModelError
from multipruner.export import openvino as module
from multipruner.export.openvino import BOUNDS, ENTER, LEAVE, MODEL, export_openvino, uneven_groups
from tests.support import tiny
from tests.support.gguf_cases import TEXT, byte_level, pruned_folder
from tests.support.layers import structure_of

EVERY = {
    name: settings for name, settings in {**tiny.VARIANTS, **tiny.MORE}.items()
    if not tiny.mixes(settings["family"]) and name != "bloom"
}  # fmt: skip
"""Of mixers of tokens no graph is made (``tests/contracts/test_hybrids.py``), and of BLOOM's slopes none either."""
QUICK = ("qwen2-mixed",)
VARIANTS = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_transformers(variant: str, tmp_path: Path) -> None:
    dense = tiny.tiny_model(**EVERY[variant])
    plan = tiny.random_plan(dense, 3, drop=0.4)
    save(tmp_path / "run", apply_plan(dense, plan), None, plan=plan, report={}, card="")
    done = export_openvino(tmp_path / "run", outtype="f32", trust_remote_code=True)
    assert done.path == tmp_path / "run-f32.openvino" and done.error < 1e-5
    kinds = [place.kind for place, size in zip(plan.anatomy, plan.structure, strict=True) if size]
    assert done.attentions == kinds.count("attention") > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-f32.openvino"]
    assert done.nbytes == sum(path.stat().st_size for path in done.path.iterdir())


@pytest.mark.slow
def test_slopes_that_cannot_be_traced_are_refused(tmp_path: Path) -> None:
    dense = tiny.tiny_model(**tiny.MORE["bloom"])
    plan = tiny.random_plan(dense, 3)
    save(tmp_path / "run", apply_plan(dense, plan), None, plan=plan, report={}, card="")
    with pytest.raises(UnsupportedModelError, match="cannot be traced for OpenVINO"):
        export_openvino(tmp_path / "run", outtype="f32", trust_remote_code=True)


def test_tokenizer_and_smaller_weights(tmp_path: Path) -> None:
    model = pruned_folder(tmp_path / "run", tokenizer=byte_level(bos=True))
    done = export_openvino(tmp_path / "run", outtype="int8")
    names = {path.name for path in done.path.iterdir()}
    assert names >= {MODEL, ENTER, LEAVE, "config.json", "generation_config.json", "tokenizer.json"}
    assert not done.tokenizer and 1e-4 < done.error < BOUNDS["int8"]
    assert not list(done.path.glob("*.py"))
    assert (done.path / "openvino_model.bin").stat().st_size < 1.5 * sum(p.numel() for p in model.parameters())


_GENAI = """
import json, sys
sys.modules["openvino_telemetry"] = None
import numpy, openvino, openvino_genai as genai
folder, text, exact = json.load(sys.stdin)
pipe = genai.LLMPipeline(folder, "CPU", ATTENTION_BACKEND="SDPA", **exact)
ids = pipe.get_tokenizer().encode(text).input_ids.data.astype("int64")
given = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
written = pipe.generate(given, genai.GenerationConfig(max_new_tokens=16, ignore_eos=True)).tokens[0]
print(json.dumps([ids.tolist(), list(written)]))
"""
"""In a process of its own: its threads are not for those who fork theirs."""


def test_genai_writes_what_transformers_write(tmp_path: Path) -> None:
    if find_spec("openvino_genai") is None:
        pytest.skip("openvino_genai is not here")
    pruned_folder(tmp_path / "run", tokenizer=byte_level())
    done = export_openvino(tmp_path / "run", outtype="f32")
    exact = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
    task = json.dumps([str(done.path), TEXT[:40], exact])
    said = subprocess.run([sys.executable, "-c", _GENAI], input=task, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-2000:]
    encoded, written = json.loads(said.stdout.splitlines()[-1])
    ids = byte_level()(TEXT[:40], return_tensors="pt").input_ids
    assert encoded == ids.tolist()
    model: Any = load(tmp_path / "run")
    greedy = model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, eos_token_id=None)
    assert written == greedy[0, ids.shape[1] :].tolist()


@pytest.mark.slow
def test_nobody_is_told_of_an_export(tmp_path: Path) -> None:
    """OpenVINO and nncf send statistics of use, and keep who sends them in the home folder, unless they cannot."""
    pytest.importorskip("nncf")
    pruned_folder(tmp_path / "run", tokenizer=byte_level())
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-m", "multipruner", "export", str(tmp_path / "run"), "--format", "openvino"]
    clean = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    where = {**clean, "HOME": str(tmp_path / "home"), "USERPROFILE": str(tmp_path / "home")}
    done = subprocess.run([*command, "--outtype", "int8"], env=where, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "home" / "intel").exists()


def test_what_the_default_attention_backend_gets_wrong_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pruned_folder(tmp_path / "whole", structure=structure_of((4, 2, 8), (2, 1, 8), (2, 2, 8)))
    assert uneven_groups(whole.config) == {}
    uneven: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2}
    model = pruned_folder(tmp_path / "run", structure=structure_of((6, 2, 8), (4, 2, 8), (2, 2, 8)), **uneven)
    assert uneven_groups(model.config) == {2: [2, 3]}
    line = [str(tmp_path / "run"), "--format", "openvino", "--output", str(tmp_path / "small")]
    with pytest.raises(ConfigError, match="--base-gguf"):
        command.run([*line, "--base-gguf", "base.gguf"])
    assert command.run(line) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("export, ")]
    assert told[0].startswith(f"{tmp_path / 'small'}: 3 attentions, f16, ")
    assert "2 KV heads with 2 and 3 query heads each" in told[-1] and "ATTENTION_BACKEND='SDPA'" in told[-1]


def test_faults_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pruned_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match="f32, f16, int8"):
        export_openvino(tmp_path / "run", outtype="q8_0")
    with pytest.raises(UnknownModelError):
        export_openvino(tmp_path / "none")
    mine = tmp_path / "run-f16.openvino"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="exists already"):
            export_openvino(tmp_path / "run", overwrite=overwrite)
    assert [path.name for path in mine.iterdir()] == ["thesis.tex"]
    monkeypatch.setitem(module.BOUNDS, "f16", 0.0)
    with pytest.raises(OutputError, match=r"logits are off by .* of their spread"):
        export_openvino(tmp_path / "run", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-f16.openvino"]
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ConfigError, match=r"multipruner\[openvino\]"):
        export_openvino(tmp_path / "run", tmp_path / "other")


def test_rotary_embeddings_that_grow_are_refused(tmp_path: Path) -> None:
    pruned_folder(tmp_path / "run", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(UnsupportedModelError, match="'dynamic' depend on the text's length"):
        export_openvino(tmp_path / "run")
