"""A narrower residual stream, for every family: laws of cutting it, and the checkpoint that comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import FAMILIES, anatomy_of, spec_for
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Structure
from multipruner.engine.cutting import scaled_norm
from multipruner.engine.prunable import Prunable
from tests.support import tiny
from tests.support.elsewhere import logits_elsewhere

AS_WIDE = (
    *(
        "baichuan",
        "biogpt",
        "bloom",
        "codegen",
        "gpt_neo",
        "helium",
        "falcon",
        "gpt2",
        "gpt_bigcode",
        "gptj",
        "gpt_neox",
        "opt",
        "persimmon",
    ),
    *("stablelm", "xglm"),
)
"""Their attention is as wide as the residual stream, whatever the configuration says."""
ASIDE = ("cohere", "cohere2", "phi")
"""Blocks run side by side."""
HYBRID = tuple(row.model_type for row in FAMILIES.values() if "mixer" in row.kinds)
MIXED = tuple(row.model_type for row in FAMILIES.values() if "experts" in row.kinds)
EVERY = {**tiny.VARIANTS, **tiny.MORE}
REFUSED = [name for name, options in EVERY.items() if options["family"] in (*AS_WIDE, *ASIDE, *HYBRID, *MIXED)]
CUT = [name for name in EVERY if name not in REFUSED and not FAMILIES[EVERY[name]["family"]].remote_code]
CENTRED = ("jais2", "nemotron", "olmo", "starcoder2", "nanochat")
"""Their norms take the mean away first: what they make of fewer dimensions is no multiple of what they made of all.
nanochat's has no gain that could be another.
"""
WIDTH = 32
KEPT = (*range(20), *range(28, 40))


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


@pytest.mark.parametrize("variant", [name for name in CUT if EVERY[name]["family"] in CENTRED])
def test_norms_that_take_the_mean_away_are_cut_with_the_rest(variant: str) -> None:
    model = tiny.tiny_model(**EVERY[variant])
    pruned: Any = apply_plan(model, _plan(model))
    assert pruned.config.hidden_size == WIDTH and _logits(pruned).isfinite().all()


@pytest.mark.parametrize("variant", CUT)
def test_what_is_cut_weighs_what_is_counted_and_is_tied_as_before(variant: str) -> None:
    model = tiny.tiny_model(**EVERY[variant])
    anatomy = anatomy_of(model.config)
    structure = tiny.random_structure(anatomy, 1)
    for plan in (_plan(model), _plan(model, structure=structure)):
        pruned: Any = apply_plan(model, plan)
        costs, spec = Prunable.of(model).costs, spec_for(model.config)
        blocks = plan.structure.blocks
        assert sum(weight.numel() for weight in pruned.parameters()) == costs.parameters(plan.structure)
        low_rank = 2 * sum(each.numel() for name, each in pruned.named_parameters() if "_b_proj" in name)
        of_stream = costs.flops_per_token(Structure(blocks)) - low_rank
        assert costs.flops_per_token(plan.structure) == of_stream * WIDTH // 48 + low_rank
        assert costs.kv_bytes_per_token(plan.structure) == costs.kv_bytes_per_token(Structure(blocks))
        embeddings = pruned.get_submodule(f"{spec.decoder}.{spec.embeddings}")
        assert (embeddings.weight is pruned.get_submodule(spec.head).weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "gemma2"])
def test_all_dimensions_are_the_model_itself(variant: str) -> None:
    model = tiny.tiny_model(**EVERY[variant])
    plan = _plan(model, tuple(range(48)))
    assert plan.stream is None and plan == PruningPlan.from_json(plan.to_json()) and '"version": 2' in plan.to_json()
    assert torch.equal(_logits(apply_plan(model, plan)), _logits(model))


@pytest.mark.parametrize("variant", REFUSED)
def test_a_family_whose_stream_cannot_be_narrower_is_refused(variant: str) -> None:
    """Where heads make up the hidden size, where blocks run side by side, and where there are experts or mixers."""
    model = tiny.tiny_model(**EVERY[variant])
    family = EVERY[variant]["family"]
    why = "hidden size is the number of heads" if family in AS_WIDE or variant == "phi-normed" else (
        "through mixers of tokens" if family in HYBRID else
        "through mixtures of experts" if family in MIXED else "through blocks that run side by side")  # fmt: skip
    with pytest.raises(UnsupportedModelError, match=f"{why}.*give no --hidden-size"):
        apply_plan(model, _plan(model))


def test_stock_transformers_open_them(tmp_path: Path) -> None:
    """Without a line of this package; stock classes where all layers are alike."""
    ids, wanted = tiny.random_ids(), {}
    torch.save(ids, tmp_path / "ids.pt")
    for variant in ("llama-tied", "qwen2", "qwen3", "gemma3", "olmo2", "starcoder2"):
        model = tiny.tiny_model(**EVERY[variant])
        for name, structure in (("alike", None), ("mixed", tiny.random_structure(anatomy_of(model.config), 1))):
            plan = _plan(model, structure=structure)
            pruned, folder = apply_plan(model, plan), tmp_path / f"{variant}-{name}"
            save(folder, pruned, tiny.tiny_tokenizer(), plan=plan, report={}, card="")
            record = json.loads((folder / "config.json").read_text())
            assert (record["hidden_size"], record["head_dim"]) == (WIDTH, 16)
            assert ("auto_map" in record) == (name == "mixed")
            wanted[str(folder)] = _logits(pruned)
    for folder, logits in logits_elsewhere(list(wanted), tmp_path / "ids.pt").items():
        assert torch.equal(logits, wanted[folder]), folder
