"""Older transformers, in the interpreter that MULTIPRUNER_READER names: the same logits, or a clear refusal.

``nox -s readers`` makes such environments and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save, with_older_words
from multipruner.core.structure import Structure
from tests.support import tiny
from tests.support.layers import structure_of

READER = os.environ.get("MULTIPRUNER_READER")
needs_reader = pytest.mark.skipif(READER is None, reason="MULTIPRUNER_READER names no other interpreter")
ROTARY: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "llama3": {
        "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32
    },
}  # fmt: skip
UNIFORM = structure_of(*[(4, 2, 24)] * 3)
MIXED = structure_of((0, 0, 24), (4, 2, 0), (2, 1, 40))
LENGTH = 200
"""Longer than the context, where dynamic scaling begins."""
OPEN = """
import sys, torch, transformers
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            torch.save(model(ids).logits, folder + ".pt")
    except Exception as error:
        torch.save(f"{type(error).__name__}: {error}", folder + ".pt")
"""


def written(folder: Path, family: str, rotary: str, structure: Structure) -> torch.Tensor:
    """Write a cut model without a tokenizer; logits of what is in memory."""
    rope = {"rope_type": rotary, "rope_theta": 20000.0, **ROTARY[rotary]}
    model = tiny.tiny_model(family, layers=3, rope_parameters=rope)
    plan = tiny.plan_for(model, structure)
    small = apply_plan(model, plan).eval()
    save(folder, small, None, plan=plan, report={"format": "multipruner-report", "version": 1}, card="")
    with torch.no_grad():
        return small(tiny.random_ids(length=LENGTH)).logits


def opened(folders: list[Path], work: Path) -> dict[str, Any]:
    """What the other interpreter computes for each folder, or what it says where it fails."""
    torch.save(tiny.random_ids(length=LENGTH), work / "ids")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [str(READER), "-I", "-c", OPEN, str(work / "ids"), *map(str, folders)], check=True,
        env={**environment, "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    return {folder.name: torch.load(f"{folder}.pt") for folder in folders}


@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("family", tiny.STOCK)
def test_rotary_embeddings_are_said_in_older_words_too(family: str, rotary: str, tmp_path: Path) -> None:
    written(tmp_path / "out", family, rotary, UNIFORM)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 20000.0
    assert config.get("rope_scaling") == ({"rope_type": rotary, **ROTARY[rotary]} if ROTARY[rotary] else None)
    assert config["rope_parameters"] == {"rope_type": rotary, "rope_theta": 20000.0, **ROTARY[rotary]}


def test_what_has_no_rotary_embeddings_stays_as_it_is() -> None:
    record = {"model_type": "x", "rope_parameters": None}
    assert with_older_words(record) == record


@needs_reader
@pytest.mark.slow
def test_equal_layers_give_the_same_logits_elsewhere(tmp_path: Path) -> None:
    cases = {f"{family}-{rotary}": (family, rotary) for family in tiny.STOCK for rotary in ROTARY}
    expected = {name: written(tmp_path / name, *case, UNIFORM) for name, case in cases.items()}
    found = opened([tmp_path / name for name in cases], tmp_path)
    for name, logits in expected.items():
        assert isinstance(found[name], torch.Tensor), (name, found[name])
        assert torch.allclose(found[name], logits, atol=1e-4), (name, (found[name] - logits).abs().max())


@needs_reader
@pytest.mark.slow
def test_layers_that_differ_open_or_say_what_they_need(tmp_path: Path) -> None:
    expected = {family: written(tmp_path / family, family, "default", MIXED) for family in tiny.STOCK}
    found = opened([tmp_path / family for family in expected], tmp_path)
    for family, logits in expected.items():
        if isinstance(found[family], str):
            assert found[family].startswith("ImportError: this model needs transformers>=5.14"), found[family]
        else:
            assert torch.allclose(found[family], logits, atol=1e-4), family
