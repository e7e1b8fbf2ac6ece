"""What is on disk: loads everywhere with the same logits, is written whole or not at all, and says what it is."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

from multipruner.checkpoint import save as checkpoint
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save, weight_bytes
from multipruner.core.errors import ConfigError, OutputError, UnknownModelError, UnsupportedModelError
from multipruner.core.plan import PruningPlan
from multipruner.report.card import model_card
from multipruner.storage import files
from tests.support import tiny

variants = pytest.mark.parametrize("variant", tiny.VARIANTS)
LOAD_ELSEWHERE = """
import sys, json
from pathlib import Path

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "multipruner":
            raise ImportError(name + " must not be needed")

sys.meta_path.insert(0, Block())
import torch
from transformers import AutoModel, AutoModelForCausalLM

for folder in map(Path, sys.argv[1:]):
    ids, logits = torch.load(folder.with_suffix(".pt"))
    again = folder.with_name(folder.name + "-again")
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
    for source in (folder, again):
        model, info = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        with torch.no_grad():
            assert torch.equal(model(ids).logits, logits), source
            hidden = AutoModel.from_pretrained(source, trust_remote_code=True)(ids).last_hidden_state
            assert torch.equal(model.get_output_embeddings()(hidden), logits), source
    assert (folder / "config.json").read_text() == (again / "config.json").read_text()
    print(folder.name)
"""


def _pruned(variant: str = "llama", seed: int = 1) -> tuple[PreTrainedModel, PruningPlan]:
    model = tiny.tiny_model(**tiny.VARIANTS[variant])
    plan = tiny.random_plan(model, seed, drop=0.4)
    return apply_plan(model, plan), plan


def _save(folder: Path, variant: str = "llama", **options: Any) -> PreTrainedModel:
    model, plan = _pruned(variant)
    save(folder, model, tiny.tiny_tokenizer(), plan=plan, report={"model": "tiny"}, card="# card\n", **options)
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(tiny.random_ids()).logits


@variants
def test_load_gives_the_same_bits_also_when_saved_again(variant: str, tmp_path: Path) -> None:
    model = _save(tmp_path / "one", variant)
    loaded = load(tmp_path / "one", trust_remote_code=True)
    assert torch.equal(_logits(loaded), _logits(model))
    loaded.save_pretrained(tmp_path / "two")
    assert torch.equal(_logits(load(tmp_path / "two", trust_remote_code=True)), _logits(model))
    code = [path.name for path in (tmp_path / "one").glob("*.py")]
    assert code and all((tmp_path / "two" / n).read_bytes() == (tmp_path / "one" / n).read_bytes() for n in code)


def test_plain_transformers_load_and_save_without_multipruner(tmp_path: Path) -> None:
    for variant in tiny.VARIANTS:
        model = _save(tmp_path / variant, variant)
        torch.save((tiny.random_ids(), _logits(model)), tmp_path / f"{variant}.pt")
    folders = [str(tmp_path / variant) for variant in tiny.VARIANTS]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", LOAD_ELSEWHERE, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(tiny.VARIANTS)


def test_folder_is_complete(tmp_path: Path) -> None:
    steps = tmp_path / "trajectory.jsonl"
    steps.write_text("{}\n")
    model, plan = _pruned()
    folder = save(
        tmp_path / "out", model, tiny.tiny_tokenizer(), plan=plan, report={"a": 1}, trajectory=steps, card="# c"
    )
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.json", "model.safetensors", "generation_config.json", "modeling_multipruner_llama.py"}
    assert names >= {"plan.json", "report.json", "README.md", "trajectory.jsonl", "tokenizer.json"}
    assert not [name for name in names if name.endswith(".bin")]
    assert PruningPlan.from_json((folder / "plan.json").read_text()) == plan
    report = json.loads((folder / "report.json").read_text())
    assert report["a"] == 1 and set(report["files"]) == names
    assert AutoTokenizer.from_pretrained(folder)("w7 w9").input_ids == [7, 9]
    size = (folder / "model.safetensors").stat().st_size
    assert weight_bytes(model) < size < weight_bytes(model) * 1.1


def test_large_weights_are_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "50KB")
    model = _save(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert torch.equal(_logits(load(tmp_path / "out")), _logits(model))


def test_loading_never_allocates_the_dense_size(tmp_path: Path) -> None:
    model = _save(tmp_path / "out")
    with torch.device("meta"):
        empty = type(model)(model.config)
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in empty.named_parameters()} == shapes
    assert load(tmp_path / "out", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_settings_that_transformers_refuse_to_save_are_written_as_they_are(tmp_path: Path) -> None:
    model, plan = _pruned()
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    save(tmp_path / "out", model, None, plan=plan, report={}, card="")
    for settings in (load(tmp_path / "out").generation_config, model.generation_config):
        assert settings is not None
        assert (settings.do_sample, settings.temperature) == (False, 0.6), "greedy stays greedy"


def test_forgetting_to_trust_the_code_fails_loudly(tmp_path: Path) -> None:
    _save(tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        LlamaForCausalLM.from_pretrained(tmp_path / "out")
    _save(tmp_path / "remote", "baichuan")
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        load(tmp_path / "remote")


def test_load_refuses_what_is_not_ours(tmp_path: Path) -> None:
    tiny.tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*transformers\.AutoModelForCausalLM"):
        load(tmp_path / "dense")
    with pytest.raises(UnknownModelError):
        load(tmp_path / "nothing")


def test_load_runs_no_code_from_the_folder_and_reads_no_pickle(tmp_path: Path) -> None:
    model = _save(tmp_path / "out")
    (tmp_path / "out" / "modeling_multipruner_llama.py").write_text("raise SystemExit('ran')\n")
    assert torch.equal(_logits(load(tmp_path / "out")), _logits(model))
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load(tmp_path / "out")


@pytest.mark.parametrize(
    ("failure", "seen", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), OutputError, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), OutputError, "Permission denied"),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing_behind(
    failure: BaseException,
    seen: Any,
    message: str | None,
    existing: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = _save(tmp_path / "out") if existing else None

    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr(files, "flush", fail)
    with pytest.raises(seen, match=message):
        _save(tmp_path / "out", replace=existing)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])
    if old is not None:
        assert torch.equal(_logits(load(tmp_path / "out")), _logits(old))


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _save(tmp_path / "out")
    with pytest.raises(OutputError, match="exists already"):
        _save(tmp_path / "out")
    (tmp_path / "out" / "leftover").write_text("")
    model = _save(tmp_path / "out", "qwen2", replace=True)
    assert (tmp_path / "out" / "leftover").exists(), "somebody's own file survives"
    assert not (tmp_path / "out" / "modeling_multipruner_llama.py").exists(), "ours does not"
    assert torch.equal(_logits(load(tmp_path / "out")), _logits(model))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _save(tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_a_swap_that_fails_brings_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rename = _save(tmp_path / "out"), Path.rename

    def fail(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="Input/output error"):
        _save(tmp_path / "out", "qwen2", replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(_logits(load(tmp_path / "out")), _logits(model))


def test_only_a_model_folder_is_ever_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a folder that multipruner wrote"):
        _save(tmp_path, replace=True)
    with pytest.raises(OutputError, match="not a folder that multipruner wrote"):
        _save(tmp_path / "thesis.tex", replace=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_too_little_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # pyright: ignore
    with pytest.raises(OutputError, match=r"needs .* GB, .* has 0\.00 GB free"):
        _save(tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def _metadata(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_of_a_full_report() -> None:
    plan = replace(_pruned()[1], model="HuggingFaceTB/SmolLM2-135M")
    report = {
        "recipe": {"ratio": 0.2},
        "parameters": {"before": 134_515_008, "after": 107_612_006},
        "ratio": 0.2,
        "backbone_ratio": 0.253,
        "calibration": {"name": "alpaca", "hash": "abc", "tokens": 4096},
        "perplexity": {"wikitext": {"dense": 16.1, "pruned": 21.25}, "c4": {"dense": 20.0}},
        "tasks_markdown": "| task | acc |\n|---|---|\n| piqa | 0.61 |",
        "command": "multipruner prune HuggingFaceTB/SmolLM2-135M",
        "versions": {"torch": "2.13"},
        "picture": "0 ####\n1 ##",
    }
    card = model_card(report, plan, license="apache-2.0", languages=("en",), name="me/small")
    metadata = _metadata(card)
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert metadata["license"] == "apache-2.0" and metadata["language"] == ["en"]
    assert {"pruned", "multipruner"} <= set(metadata["tags"])
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    for text in ("107.6 of 134.5 million", "20.0% of all", "25.3% of the decoder", "| wikitext | 16.100 | 21.250 |"):
        assert text in card
    for text in ("| c4 | 20.000 | – |", "0 ####", "4,096 tokens", 'multipruner.load("me/small")', "piqa", "ratio: 0.2"):
        assert text in card


def test_card_names_the_model_that_a_fallback_stood_in_for() -> None:
    _, plan = _pruned()
    recipe = {"model": "HuggingFaceTB/SmolLM2-135M", "fallback": {"name": "wheel"}}
    assert _metadata(model_card({"recipe": recipe}, plan))["base_model"] == "HuggingFaceTB/SmolLM2-135M"


@pytest.mark.parametrize("repair", ["none", "lstsq"])
@pytest.mark.parametrize("refitted", [True, False])
def test_card_says_what_was_repaired(repair: str, refitted: bool) -> None:
    _, plan = _pruned()
    report = {"recipe": {"model": "m", "repair": repair}, "search": {"last_norm_refitted": refitted}}
    card = model_card(report, plan)
    assert ("output projections of what stays were then refitted" in card) == (repair == "lstsq")
    assert ("gain of the last norm" in card) == (repair == "lstsq" and refitted)
    assert ("these weights again, bit for bit" in card) == (repair == "none")


def test_card_of_an_empty_report() -> None:
    _, plan = _pruned("baichuan")
    card = model_card({}, plan)
    assert "base_model" not in _metadata(card) and "license" not in _metadata(card)
    assert "None" not in card and "## Numbers" not in card
    assert "tiny stand-in" in card and 'multipruner.load("path/to/this/folder", trust_remote_code=True)' in card
