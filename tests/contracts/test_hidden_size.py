"""A narrower residual stream, for every family: laws of cutting it, and the checkpoint that comes out."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Structure
from multipruner.engine.cutting import scaled_norm
from multipruner.engine.prunable import Prunable
from tests.support import tiny

REFUSED = ("baichuan", "helium")
"""Their attention is as wide as the residual stream, whatever the configuration says."""
EVERY = {**tiny.VARIANTS, **tiny.MORE}
CUT = [name for name, options in EVERY.items() if options["family"] not in REFUSED]
CENTRED = ("nemotron", "olmo", "starcoder2")
"""Their norms take the mean away first: what they make of fewer dimensions is no multiple of what they made of all."""
WIDTH = 32
KEPT = (*range(0, 20), *range(28, 40))


def _plan(model: Any, stream: tuple[int, ...] = KEPT, structure: Structure | None = None) -> PruningPlan:
    anatomy = anatomy_of(model.config)
    hidden = anatomy.constants["hidden"]
    rest = tuple(number for number in range(hidden) if number not in stream)
    ranking = Ranking(tiny.random_ranking(anatomy, 0).blocks, (*stream, *rest))
    structure = Structure((structure or anatomy.dense).blocks, len(stream))
    return PruningPlan.from_structure(
        structure, ranking, anatomy, model="tiny", model_type=spec_for(model.config).model_type
    )


@torch.no_grad()
def _silence(model: Any, kept: tuple[int, ...]) -> None:
    """Let a model write nothing into the other dimensions of its residual stream, and read nothing there."""
    spec, anatomy = spec_for(model.config), anatomy_of(model.config)
    gone = [number for number in range(anatomy.constants["hidden"]) if number not in kept]
    model.get_submodule(spec.decoder).get_submodule(spec.embeddings).weight[:, gone] = 0
    for place in anatomy:
        block, layer = spec.block(place.kind), model.get_submodule(f"{spec.decoder}.{spec.layers}.{place.layer}")
        output = layer.get_submodule(f"{block.path}.{block.output}")
        output.weight[gone] = 0
        if output.bias is not None:
            output.bias[gone] = 0


def _scale(norm: Any, gain: torch.Tensor, offset: float) -> None:
    norm.load_state_dict(scaled_norm(norm, gain, offset).state_dict())


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(tiny.random_ids()).logits


@pytest.mark.parametrize("variant", [name for name in CUT if EVERY[name]["family"] not in CENTRED])
def test_dimensions_that_hold_nothing_leave_without_a_trace(variant: str) -> None:
    """With the gains of all norms smaller by what the mean of squares grows."""
    model = tiny.tiny_model(**EVERY[variant])
    _silence(model, KEPT)
    pruned: Any = apply_plan(model, _plan(model))
    spec, gain = spec_for(model.config), torch.full((WIDTH,), (48 / WIDTH) ** 0.5)
    decoder = pruned.get_submodule(spec.decoder)
    for layer in decoder.get_submodule(spec.layers):
        for block in spec.blocks:
            for norm in block.norms:
                _scale(layer.get_submodule(norm), gain, spec.norm_offset)
    _scale(decoder.get_submodule(spec.final_norm), gain, spec.norm_offset)
    assert (_logits(pruned) - _logits(model)).abs().max() < 5e-4  # norms add an epsilon to the mean
