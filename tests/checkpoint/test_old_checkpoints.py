"""Checkpoints that an earlier version wrote still open, by their own code and by ours, with the logits they had then.

``tests/fixtures/checkpoints-1`` was written by the version whose modelling code named Llama's modules in every family:
layers without attention, without MLP, and one that is gone altogether, biases, sliding windows, code of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from multipruner.checkpoint.config import sizes_in
from multipruner.checkpoint.load import load
from multipruner.core.families import FAMILIES
from multipruner.core.plan import PruningPlan

FOLDERS = sorted(path for path in (Path(__file__).parents[1] / "fixtures" / "checkpoints-1").iterdir())


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_old_checkpoint_gives_the_logits_that_it_gave(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    ours = load(folder, trust_remote_code=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    for model in (ours, plain):
        with torch.no_grad():
            assert torch.allclose(model(expected["input_ids"]).logits, expected["logits"], atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_old_checkpoint_can_be_saved_anew(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    load(folder, trust_remote_code=True).save_pretrained(tmp_path / folder.name)
    with torch.no_grad():
        again = load(tmp_path / folder.name, trust_remote_code=True)(expected["input_ids"]).logits
    assert torch.allclose(again, expected["logits"], atol=1e-5)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_sizes_of_an_old_configuration_are_those_of_its_plan(folder: Path) -> None:
    plan = PruningPlan.from_json((folder / "plan.json").read_text())
    anatomy, structure = sizes_in(json.loads((folder / "config.json").read_text()), FAMILIES[folder.name])
    left = [number for number, place in enumerate(plan.anatomy) if place.layer in plan.layers]
    assert list(structure) == [plan.structure[number] for number in left]
    assert anatomy.layers == len(plan.layers) < plan.anatomy.layers
    assert [place.kind for place in anatomy] == [plan.anatomy[number].kind for number in left]
