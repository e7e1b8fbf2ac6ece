"""``multipruner apply``: a plan from anywhere, a dense checkpoint, and a folder as a run writes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import multipruner
from multipruner.checkpoint.run_folder import read_run
from multipruner.commands.main import main
from multipruner.core.families import anatomy_of
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Structure
from tests.support import tiny
from tests.support.fake_hub import Blob, Repo, fake_hub
from tests.support.inputs import copied, edit_tensors

if TYPE_CHECKING:
    from multipruner import Run

FILE = "model.safetensors"


def apply(plan: Path | str, dense: Path, output: Path, *more: str) -> int:
    return main(["apply", str(plan), "--model", str(dense), "--output", str(output), *more])


@pytest.fixture(scope="module")
def applied(run: Run, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("applied") / "small"
    assert apply(run.folder, dense, output) == 0
    return output


def test_the_folder_is_that_of_a_run(applied: Path, run: Run, dense: Path) -> None:
    """The same model as the run's but for its repaired output projections, and whatever reads runs reads it."""
    found = read_run(applied)
    assert not found.foreign and found.plan == run.plan
    ours, theirs = load_file(applied / FILE), load_file(run.folder / FILE)
    differ = {name for name in theirs if not torch.equal(ours[name], theirs[name])}
    assert ours.keys() == theirs.keys()
    assert differ and all(re.search(r"o_proj|down_proj|model\.norm", name) for name in differ)
    for name in ("config.json", "generation_config.json", "tokenizer.json", "plan.json"):
        assert (applied / name).read_bytes() == (run.folder / name).read_bytes(), name
    assert found.report["parameters"] == run.report["parameters"] and found.report["ratio"] == run.report["ratio"]
    assert found.report["model"]["fingerprint"] == run.plan.fingerprint
    assert (applied / found.report["model"]["path_from_here"]).resolve() == dense
    model = multipruner.load(applied)
    assert torch.isfinite(model(tiny.random_ids()).logits).all()
    assert "holds no repair" in (applied / "README.md").read_text()


def test_what_follows_a_run_follows_it(applied: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = applied.parent / "for later"
    shutil.copytree(applied, copy)
    assert main(["report", str(copy)]) == 0
    assert main(["push", str(copy), "me/small", "--dry-run"]) == 0
    assert main(["eval", str(copy), "--eval-text", str(dense / "text.txt"), "--tasks", "ppl"]) == 0
    assert "ppl" in capsys.readouterr().out.lower()


def test_it_is_said_that_nothing_is_repaired(
    run: Run, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(run.folder / "plan.json", dense, tmp_path / "small") == 0
    assert "holds no repair" in capsys.readouterr().out
    assert (tmp_path / "small" / FILE).exists()


def _fails(capsys: pytest.CaptureFixture[str], plan: Path | str, dense: Path, output: Path, *more: str) -> str:
    """What is said of a call that fails and leaves nothing behind."""
    before = sorted(path.name for path in output.parent.iterdir())
    assert apply(plan, dense, output, *more) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and sorted(path.name for path in output.parent.iterdir()) == before
    return said


def test_weights_of_another_model_are_refused_unless_they_are_meant(
    run: Run, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = copied(dense, tmp_path / "tuned")
    edit_tensors(other, lambda weights: {**weights, "model.norm.weight": weights["model.norm.weight"] + 1})
    said = _fails(capsys, run.folder, other, tmp_path / "small")
    assert f"the plan was made for {run.plan.model}" in said and "--any-weights" in said
    assert apply(run.folder, other, tmp_path / "small", "--any-weights") == 0
    plan = PruningPlan.from_json((tmp_path / "small" / "plan.json").read_text())
    assert (plan.model, plan.fingerprint, plan.blocks) == ("tuned", None, run.plan.blocks)
    assert torch.equal(
        load_file(tmp_path / "small" / FILE)["model.norm.weight"], load_file(other / FILE)["model.norm.weight"]
    )


def test_other_faults_are_one_line(
    run: Run, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "small"
    deeper = tmp_path / "deeper"
    tiny.tiny_model("llama", layers=5).save_pretrained(deeper)
    tiny.tiny_tokenizer().save_pretrained(deeper)
    assert "the plan was made for a model of 4 layers" in _fails(capsys, run.folder, deeper, output)
    assert "start from the dense model" in _fails(capsys, run.folder, run.folder, output)
    assert "holds no plan.json" in _fails(capsys, dense, dense, output)
    assert "give a plan's file, a folder with one, or a Hub id" in _fails(capsys, "no/such/plan.json", dense, output)
    assert "cannot reach the Hub for the plan of no/such (HF_HUB_OFFLINE" in _fails(capsys, "no/such@v1", dense, output)
    assert "config.json: plan format None" in _fails(capsys, dense / "config.json", dense, output)
    assert "name one, then make the file" in _fails(capsys, run.folder, dense, tmp_path / "small.gguf")
    lacking = copied(dense, tmp_path / "lacking")
    edit_tensors(lacking, lambda weights: {name: each for name, each in weights.items() if "3.mlp.up" not in name})
    assert "lacks weights: model.layers.3.mlp.up_proj.weight" in _fails(capsys, run.folder, lacking, output)
    taken = copied(dense, tmp_path / "taken")
    assert "not a folder that multipruner wrote" in _fails(capsys, run.folder, dense, taken, "--overwrite")
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "needs 0.00 GB" in _fails(capsys, run.folder, dense, output)


def test_an_earlier_folder_is_replaced_when_asked(
    applied: Path, run: Run, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copied(applied, tmp_path / "small")
    (output / "notes.txt").write_text("mine")
    assert "exists already" in _fails(capsys, run.folder, dense, output)
    assert apply(run.folder, dense, output, "--overwrite") == 0
    assert (output / "notes.txt").read_text() == "mine"


def test_types_that_differ_become_one_and_it_is_said(
    run: Run, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = copied(dense, tmp_path / "mixed")
    edit_tensors(mixed, lambda weights: {name: t.bfloat16() if "mlp" in name else t for name, t in weights.items()})
    assert apply(run.folder, mixed, tmp_path / "small", "--any-weights") == 0
    assert "weights are stored as BF16, F32; all become torch.float32" in capsys.readouterr().out
    assert {tensor.dtype for tensor in load_file(tmp_path / "small" / FILE).values()} == {torch.float32}


def test_plan_and_model_from_the_hub(
    run: Run, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the plan's repository its plan alone is fetched."""
    with fake_hub({}) as hub:
        for name, folder in {"me/dense": dense, "me/small": Path(run.folder)}.items():
            files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
            hub.repos[name] = Repo(False)
            hub.repos[name].add("all", {file: Blob(data, file == FILE) for file, data in files.items()})
            hub.objects.update({Blob(data, True).oid: data for data in files.values()})
        hub.repos["me/small"].tags["v1"] = hub.repos["me/small"].head
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False,
                    "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "hub")}  # fmt: skip
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        assert main(["apply", "me/small@v1", "--model", "me/dense", "--output", str(tmp_path / "out")]) == 0
        fetched = {line.rpartition("/")[2] for line, _ in hub.requests if "me/small" in line and "/resolve/" in line}
        assert fetched == {"plan.json"}
        assert "me/dense has no plan.json" in _fails(capsys, "me/dense", dense, tmp_path / "none")
        assert "me/small has no revision 'v2'" in _fails(capsys, "me/small@v2", dense, tmp_path / "none")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["model"]["name"], report["model"]["revision"]) == ("me/dense", hub.repos["me/dense"].head)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["apply", "me/small@v1", "--model", str(dense), "--output", str(tmp_path / "cached")]) == 0


MEASURED = """
import resource, sys
from multipruner.commands.main import main
if main(sys.argv[1:]):
    raise SystemExit(1)
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print("peak", int(peak.split()[1]) // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A model twelve times as deep takes hardly more: its tensors are as large."""
    peaks: dict[int, int] = {}
    for layers in (2, 24):
        shape: dict[str, Any] = {**tiny.SIZES, "hidden_size": 1024, "intermediate_size": 6144, "head_dim": 64,
                                 "num_attention_heads": 16, "num_key_value_heads": 4}  # fmt: skip
        config = LlamaConfig(**shape, num_hidden_layers=layers, tie_word_embeddings=True, dtype="bfloat16")
        model: Any = LlamaForCausalLM(config)
        model = model.to(torch.bfloat16)
        folder = tmp_path / f"dense-{layers}"
        model.save_pretrained(folder, max_shard_size="200MB")
        tiny.tiny_tokenizer().save_pretrained(folder)
        sizes = [(3, 4) if place.kind == "attention" else (5000,) for place in anatomy_of(config)]
        plan = tiny.plan_for(model, Structure(tuple(sizes)))
        (tmp_path / "plan.json").write_text(plan.to_json())
        del model
        command = [sys.executable, "-c", MEASURED, "apply", str(tmp_path / "plan.json"), "--model", str(folder),
                   "--output", str(tmp_path / f"small-{layers}"), "--no-reopen"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks[layers] = int(done.stdout.split("peak ")[-1])
    print(peaks)
    assert peaks[24] - peaks[2] < 64
