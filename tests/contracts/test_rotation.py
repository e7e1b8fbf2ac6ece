"""A residual stream in another basis, for every family: the same logits, or the reason why it stays as it lies."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.core.families import FAMILIES
from multipruner.engine.prunable import Prunable, Wider
from multipruner.repair.rotation import hindrance, write_turned
from tests.support import tiny

UNTIED = {name: {**options, "tied": False} for name, options in {**tiny.VARIANTS, **tiny.MORE}.items()}
CENTRED = (
    *("biogpt", "bloom", "codegen", "cohere", "cohere2", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox"),
    *("gptj", "jais2", "nemotron", "olmo", "opt", "persimmon", "phi", "stablelm", "starcoder2", "xglm"),
)
"""Their norms take the mean away."""
UNTOLD = (
    *("deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "qwen2_moe"),
    "solar_open",
    "olmoe",  # its tiny model is as wide as a norm of queries
)
"""Rows that say nothing of some matrices on the stream: those of experts that every token takes."""


@cache
def _model(variant: str) -> Any:
    return tiny.tiny_model(**UNTIED[variant])


def _rotation(width: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))[0]


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def _turned(model: Any, basis: torch.Tensor) -> Any:
    dense, own = Prunable.of(model), copy.deepcopy(model)
    write_turned(Prunable.narrower(own, Wider(dense, torch.arange(len(basis)), basis)))
    return own


def _reason(variant: str) -> str:
    """What stands in the way of a family, as its row and its code say."""
    family = UNTIED[variant]["family"]
    row = FAMILIES[family]
    if any(block.after for block in row.blocks):
        return "a norm behind"
    if family in CENTRED or any(isinstance(module, torch.nn.LayerNorm) for module in _model(variant).modules()):
        return "take the mean away"
    return "may lie along the stream" if family in UNTOLD or tiny.mixes(family) else ""


@pytest.mark.parametrize("variant", UNTIED)
def test_it_is_the_same_model_or_there_is_a_reason(variant: str) -> None:
    model, reason = _model(variant), _reason(variant)
    found = hindrance(Prunable.of(model))
    assert (reason in (found or "")) and bool(found) == bool(reason)
    if not reason:
        ids, basis = tiny.random_ids(), _rotation(Prunable.of(model).anatomy.constants["hidden"], 1)
        turned = _turned(model, basis)
        assert (_logits(turned, ids) - _logits(model, ids)).abs().max() < 3e-4
        embeddings = Prunable.of(model).decoder.get_submodule(FAMILIES[UNTIED[variant]["family"]].embeddings)
        assert (turned.get_input_embeddings().weight - embeddings.weight).abs().max() > 0.1


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(["llama-biased", "qwen2", "mixtral", "gemma"]), st.integers(0, 10**6), st.integers(0, 10**6))
def test_no_rotation_changes_logits(variant: str, seed: int, text: int) -> None:
    model, ids = _model(variant), tiny.random_ids(2, 9, text)
    assert (_logits(_turned(model, _rotation(48, seed)), ids) - _logits(model, ids)).abs().max() < 3e-4


@pytest.mark.parametrize("variant", ["llama-tied", "qwen3-tied"])
def test_a_tied_head_stays_tied(variant: str) -> None:
    prunable = Prunable.of(tiny.tiny_model(**tiny.VARIANTS[variant]))
    assert "its head is its embeddings" in (hindrance(prunable) or "")


def test_a_gain_of_every_dimension_stands_in_the_way() -> None:
    """What only scales is told by what it does, not by its name."""
    model = copy.deepcopy(_model("llama"))
    model.model.layers[1].input_layernorm = torch.nn.LayerNorm(48, bias=False)
    assert "input_layernorm does more than scale" in (hindrance(Prunable.of(model)) or "")
    model.model.layers[1].input_layernorm = torch.nn.RMSNorm(48)
    assert hindrance(Prunable.of(model)) is None
    model.model.shift = torch.nn.Parameter(torch.zeros(48))
    assert hindrance(Prunable.of(model)) == "model.shift may lie along the stream"
