"""What is particular to hybrids: caches of mixed kinds, mixers that are gone, padding that a state would remember."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import save
from multipruner.core.families import FAMILIES, anatomy_of
from multipruner.core.structure import GONE, Anatomy, Structure
from tests.support import tiny

TOLERANCE = 1e-4
VARIANTS = [name for name, options in tiny.MORE.items() if FAMILIES[options["family"]].mixing is not None]
variants = pytest.mark.parametrize("variant", VARIANTS)
ATTEND = (1, 3, 4)
"""Layers that attend, of six; the others mix tokens in another way."""
REMOVED = {
    "first mixer": {"mixer": (0,)},
    "first attention": {"attention": (1,)},
    "last of both": {"attention": (4,), "mixer": (5,)},
    "first of both": {"attention": (1,), "mixer": (0,)},
    "all mixers": {"mixer": (0, 2, 5)},
    "all attention": {"attention": ATTEND},
    "all but the last": {"attention": (1, 3), "mixer": (0, 2)},
    "whole layers": {"attention": (1,), "mixer": (0,), "mlp": (0, 1), "experts": (0, 1)},
}


def six_layers(variant: str) -> PreTrainedModel:
    """A tiny model whose layers 1, 3 and 4 attend."""
    options = dict(tiny.MORE[variant])
    if "attn_layer_indices" in options:
        options["attn_layer_indices"] = list(ATTEND)
    else:
        mixing = options["layer_types"][0]
        options["layer_types"] = ["full_attention" if layer in ATTEND else mixing for layer in range(6)]
    return tiny.tiny_model(**{**options, "layers": 6})


def _without(anatomy: Anatomy, removed: dict[str, tuple[int, ...]]) -> Structure:
    return Structure(tuple(GONE if place.layer in removed.get(place.kind, ()) else place.dense for place in anatomy))


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def _steps(model: Any, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [sequences, steps] and the logits that they were chosen from [sequences, steps, vocabulary]."""
    state = model.generate(
        ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    return state.sequences[:, ids.shape[1] :], torch.stack(state.logits, dim=1)


@pytest.mark.parametrize("which", REMOVED)
@variants
def test_what_is_left_decodes_as_it_computes(variant: str, which: str, tmp_path: Path) -> None:
    """With either cache, alone and padded on the left, in memory and opened again."""
    model = six_layers(variant)
    plan = tiny.plan_for(model, _without(anatomy_of(model.config), REMOVED[which]))
    cut = apply_plan(model, plan)
    ids = tiny.random_ids(2, 7)
    assert (_logits(cut, ids) - _logits(tiny.masked_model(model, plan), ids)).abs().max() < TOLERANCE
    folder = save(tmp_path / "out", cut, tiny.tiny_tokenizer(), plan=plan, report={}, card="")
    opened: Any = load(folder)
    assert torch.equal(_logits(opened, ids), _logits(cut, ids))
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :3], mask[0, :3] = 0, 0
    for cache in ("dynamic", "static"):
        tokens, logits = _steps(opened, padded, mask, cache_implementation=cache)
        for row, own in enumerate((ids[:1, 3:], ids[1:])):
            whole = _logits(cut, torch.cat([own, tokens[row : row + 1]], dim=1))[0, own.shape[1] - 1 : -1]
            assert (logits[row] - whole).abs().max() < TOLERANCE, (cache, row)
