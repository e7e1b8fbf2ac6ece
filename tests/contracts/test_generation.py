"""Pruned models decode as they compute: logits compared step by step, never generated text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.families import dense_structure
from multipruner.core.structure import Structure
from tests.support import tiny

TOLERANCE = 5e-5
variants = pytest.mark.parametrize("variant", tiny.VARIANTS)
GONE = {"first": (0,), "last": (-1,), "all-but-last": range(-1), "all-but-first": range(1, 99), "all": range(99)}
"""Layers that lose their attention; ``range(-1)`` stands for all before the last."""


def _without_attention(variant: str, which: str) -> PreTrainedModel:
    model = tiny.tiny_model(**tiny.VARIANTS[variant])
    structure = dense_structure(model.config)
    layers = len(structure)
    gone = {"last": [layers - 1], "all-but-last": range(layers - 1)}.get(which, GONE[which])
    sizes = [size.without("attention") if n in gone else size for n, size in enumerate(structure)]
    return apply_plan(model, tiny.plan_for(model, Structure(tuple(sizes))))


@torch.no_grad()
def _generate(model: PreTrainedModel, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """Logits of every step of a greedy generation, [sequences, steps, vocabulary]."""
    ids = tiny.random_ids()
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **options}
    output: Any = model.generate(  # pyright: ignore[reportCallIssue]
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings
    )
    return torch.stack(output.logits, 1)


def _check(model: PreTrainedModel) -> None:
    """Cached equals uncached: token by token, through ``generate`` with both caches, and padded on the left."""
    ids = tiny.random_ids()
    with torch.no_grad():
        whole = model(ids).logits
        state = model(ids[:, :4], use_cache=True).past_key_values
        for step in range(4, ids.shape[1]):
            output = model(ids[:, step : step + 1], past_key_values=state, use_cache=True)
            assert (output.logits[:, 0] - whole[:, step]).abs().max() < TOLERANCE, f"step {step}"
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for padding in (None, mask):
        reference = _generate(model, padding, use_cache=False)
        for cache in ("dynamic", "static"):
            difference = (_generate(model, padding, cache_implementation=cache) - reference).abs().max()
            assert difference < TOLERANCE, (cache, padding is not None)


@variants
@pytest.mark.parametrize("which", GONE)
def test_decoding_without_attention_blocks(variant: str, which: str) -> None:
    _check(_without_attention(variant, which))


@variants
@pytest.mark.parametrize("seed", range(3))
def test_decoding_of_random_plans(variant: str, seed: int) -> None:
    model = tiny.tiny_model(**tiny.VARIANTS[variant])
    _check(apply_plan(model, tiny.random_plan(model, seed, drop=0.4)))


@variants
def test_left_padding_equals_no_padding(variant: str) -> None:
    model = _without_attention(variant, "first")
    ids = tiny.random_ids(1, 8)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
        assert (output - model(ids).logits).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", ["llama", "qwen2-mixed"])
def test_beam_search_with_cache(variant: str) -> None:
    model = _without_attention(variant, "first")
    scores = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {"num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
        output: Any = model.generate(tiny.random_ids(), max_new_tokens=5, use_cache=use_cache, **options)  # pyright: ignore[reportCallIssue]
        scores.append(output.sequences_scores)
    assert (scores[0] - scores[1]).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", ["llama", "mistral-sliding", "qwen2-mixed"])
def test_prefill_in_chunks_with_a_static_cache(variant: str) -> None:
    model = _without_attention(variant, "first")
    reference = _generate(model, use_cache=False)
    model.generation_config.disable_compile = True
    chunked = _generate(model, cache_implementation="static", prefill_chunk_size=5)
    assert (chunked - reference).abs().max() < TOLERANCE


@pytest.mark.parametrize("variant", [name for name in tiny.VARIANTS if name not in tiny.OWN_CODE])
def test_attention_implementations_agree(variant: str) -> None:
    model = tiny.tiny_model(**tiny.VARIANTS[variant])
    pruned = apply_plan(model, tiny.random_plan(model, 1))
    ids = tiny.random_ids()
    with torch.no_grad():
        sdpa = pruned(ids).logits
        pruned.set_attn_implementation("eager")
        eager = pruned(ids, output_attentions=True)
    assert (sdpa - eager.logits).abs().max() < TOLERANCE
    assert len(eager.attentions) == sum("attention" not in layer.skip for layer in pruned.config.per_layer_config)


@pytest.mark.parametrize("variant", [name for name in tiny.VARIANTS if name not in tiny.OWN_CODE])
def test_compiles_in_one_graph(variant: str) -> None:
    model = _without_attention(variant, "first")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = tiny.random_ids()
    with torch.no_grad():
        assert torch.equal(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


@pytest.mark.parametrize("variant", [name for name in tiny.VARIANTS if name not in tiny.OWN_CODE])
def test_one_training_step_with_gradient_checkpointing(variant: str) -> None:
    model = _without_attention(variant, "first").train()
    ids = tiny.random_ids()
    model(ids, labels=ids).loss.backward()
    plain = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    before = model(ids, labels=ids).loss
    before.backward()
    for one, parameter in zip(plain, model.parameters(), strict=True):
        assert one is not None and parameter.grad is not None
        assert torch.allclose(one, parameter.grad, atol=1e-5)
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert model(ids, labels=ids).loss < before


def _drafts(model: PreTrainedModel, variant: str) -> dict[str, dict[str, Any]]:
    """Ways to propose several tokens at once, of which wrong ones are taken out of the cache again."""
    dense = tiny.tiny_model(**tiny.VARIANTS[variant])
    return {"look-up": {"prompt_lookup_num_tokens": 2}, "itself": {"assistant_model": model},
            "dense": {"assistant_model": dense}}  # fmt: skip


@pytest.mark.parametrize("which", ["first", "last", "all-but-last", "all-but-first"])
@pytest.mark.parametrize("variant", ["llama", "mistral-sliding", "qwen2-mixed", "qwen3"])
def test_a_cache_has_as_many_slots_as_there_are_attentions(variant: str, which: str) -> None:
    model: Any = _without_attention(variant, which)
    ids = tiny.random_ids(1)
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    state: Any = model(ids, use_cache=True).past_key_values
    layers = model.get_submodule("model.layers")
    slots = {number for number, slot in enumerate(state.layers) if getattr(slot, "keys", None) is not None}
    assert slots == set(range(sum(hasattr(layer.self_attn, "q_proj") for layer in layers)))
    reference: Any = model.generate(ids, **settings)
    for name, options in _drafts(model, variant).items():
        found: Any = model.generate(ids, **settings, **options)
        assert torch.equal(found, reference), name
        assert torch.equal(_dense_with(model, variant, ids, settings), _dense_with(None, variant, ids, settings)), (
            "as a draft of the dense model"
        )


def _dense_with(draft: PreTrainedModel | None, variant: str, ids: torch.Tensor, settings: dict[str, Any]) -> Any:
    """What the dense model writes, with and without a draft."""
    dense: Any = tiny.tiny_model(**tiny.VARIANTS[variant])
    return dense.generate(ids, assistant_model=draft, **settings)
