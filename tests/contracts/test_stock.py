"""Uniform results are ordinary checkpoints: stock classes, no code, nothing to trust, the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save
from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import anatomy_of
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Structure
from tests.support import tiny
from tests.support.layers import changed, layers_of, structure_of

CUT = {
    "fewer layers": lambda dense: changed(dense, 1, (0, 0, 0)),
    "narrower MLPs": lambda dense: structure_of(*(layer._replace(channels=17) for layer in layers_of(dense))),
    "fewer heads": lambda dense: structure_of(*[(2, 1, 40)] * len(layers_of(dense))),
    "all three": lambda dense: structure_of((0, 0, 0), *[(2, 1, 9)] * (len(layers_of(dense)) - 1)),
}
"""Structures whose layers that are left are all alike."""
VARIANTS = [name for name in tiny.VARIANTS if name not in tiny.OWN_CODE]
PLAIN_LOAD = """
import sys
sys.modules["multipruner"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids, logits = torch.load(folder + ".pt")
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits), folder
    print(type(model).__name__)
"""


def _uniform(variant: str, cut: str, **config: Any) -> tuple[PreTrainedModel, PreTrainedModel, PruningPlan]:
    model = tiny.tiny_model(**{**tiny.VARIANTS[variant], **config})
    plan = tiny.plan_for(model, CUT[cut](anatomy_of(model.config).dense), seed=3)
    return model, apply_plan(model, plan), plan


def _save(folder: Path, model: PreTrainedModel, plan: PruningPlan) -> dict[str, Any]:
    save(folder, model, tiny.tiny_tokenizer(), plan=plan, report={}, card="# card\n")
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    return model(tiny.random_ids(length=24)).logits


@pytest.mark.parametrize("cut", CUT)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_uniform_result_is_a_stock_checkpoint(variant: str, cut: str, tmp_path: Path) -> None:
    dense, pruned, plan = _uniform(variant, cut)
    assert type(pruned) is type(dense)
    assert (_logits(pruned) - _logits(tiny.masked_model(dense, plan))).abs().max() < 1e-4
    config = _save(tmp_path / "out", pruned, plan)
    assert config["model_type"] == dense.config.model_type
    assert config["architectures"] == [type(dense).__name__]
    assert not {"auto_map", "per_layer_config"} & set(config)
    assert not list((tmp_path / "out").glob("*.py"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(plain) is type(dense)
    for loaded in (plain, load(tmp_path / "out")):
        assert torch.equal(_logits(loaded), _logits(pruned))


def test_a_process_that_has_no_multipruner_loads_it(tmp_path: Path) -> None:
    folders = []
    for variant in VARIANTS:
        _, pruned, plan = _uniform(variant, "all three")
        folders.append(str(tmp_path / variant))
        _save(tmp_path / variant, pruned, plan)
        torch.save((tiny.random_ids(length=24), _logits(pruned)), f"{folders[-1]}.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", PLAIN_LOAD, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.split()) == len(VARIANTS) and "Pruned" not in done.stdout


def test_rotary_base_is_where_older_readers_look(tmp_path: Path) -> None:
    _, pruned, plan = _uniform("llama", "fewer layers")
    config = _save(tmp_path / "out", pruned, plan)
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters["rope_theta"] == 50000.0


def test_head_width_is_written_only_where_it_cannot_be_derived(tmp_path: Path) -> None:
    square = {"family": "qwen2", "hidden_size": 64}
    model = tiny.tiny_model(**square)
    vars(model.config).pop("head_dim")
    for heads, written in ((4, False), (2, True)):
        plan = tiny.plan_for(model, structure_of(*[(heads, heads // 2, 40)] * 3))
        config = _save(tmp_path / str(heads), apply_plan(model, plan), plan)
        assert ("head_dim" in config) == written
    assert config["head_dim"] == 16


def test_heads_that_do_not_divide_the_hidden_size_keep_our_class(tmp_path: Path) -> None:
    """LlamaConfig refuses 5 heads on a hidden size of 48, though head_dim is given; Mistral's and Qwen2's do not."""
    for family, stock in (("llama", False), ("mistral", True), ("qwen2", True)):
        model = tiny.tiny_model(family, num_attention_heads=6, num_key_value_heads=6)
        plan = tiny.plan_for(model, structure_of(*[(5, 5, 40)] * 3))
        pruned = apply_plan(model, plan)
        assert (type(pruned) is type(model)) == stock
        assert (_logits(pruned) - _logits(tiny.masked_model(model, plan))).abs().max() < 1e-4
        config = _save(tmp_path / family, pruned, plan)
        assert ("auto_map" not in config) == stock
        assert torch.equal(_logits(load(tmp_path / family)), _logits(pruned))


@pytest.mark.parametrize(
    "structure",
    [
        pytest.param(structure_of((4, 2, 40), (4, 2, 39)), id="widths differ"),
        pytest.param(structure_of((4, 2, 0), (4, 2, 0)), id="no MLP anywhere"),
        pytest.param(structure_of((0, 0, 40), (0, 0, 40)), id="no attention anywhere"),
    ],
)
def test_what_no_stock_configuration_can_say_keeps_our_class(structure: Structure) -> None:
    model = tiny.tiny_model("llama", layers=2)
    plan = tiny.plan_for(model, structure)
    pruned = apply_plan(model, plan)
    assert pruned.config.model_type == "multipruner_llama"
    assert (_logits(pruned) - _logits(tiny.masked_model(model, plan))).abs().max() < 1e-4


def test_a_family_with_code_of_its_own_keeps_our_class() -> None:
    model = tiny.tiny_model("baichuan")
    plan = tiny.plan_for(model, changed(anatomy_of(model.config).dense, 0, (0, 0, 0)))
    assert apply_plan(model, plan).config.model_type == "multipruner_baichuan"


def test_the_plan_is_what_tells_a_result_from_a_dense_model(tmp_path: Path) -> None:
    _, pruned, plan = _uniform("llama", "fewer layers")
    _save(tmp_path / "out", pruned, plan)
    (tmp_path / "out" / "plan.json").unlink()
    with pytest.raises(UnsupportedModelError, match="not a pruned model"):
        load(tmp_path / "out")
