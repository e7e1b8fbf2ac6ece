"""A cache whose memory is taken once gives the logits of a forward without any, and keeps what it is told to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, StaticCache

from multipruner.engine.grouped_attention import grouped_attention, narrow_cache, stored_in
from multipruner.engine.precision import cast
from multipruner.sources import sampled_text as sampling
from multipruner.sources.filled_cache import FilledLayer, cache_for
from multipruner.sources.sampled_text import sample, self_text
from tests.support.tiny import VARIANTS, tiny_model, tiny_tokenizer

IDS = torch.randint(0, 97, (3, 14), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def _step_by_step(model: Any, cache: Cache, beginning: int) -> torch.Tensor:
    parts = [IDS[:, :beginning], *IDS[:, beginning:].split(1, dim=1)]
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("beginning", [1, 5])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_logits_are_those_of_a_whole_forward(family: str, beginning: int, grouped: bool) -> None:
    model = tiny_model(family)
    cache = cache_for(model, IDS.shape[1])
    assert cache is not None and all(type(layer) is FilledLayer for layer in cache.layers)
    with torch.inference_mode():
        expected = model(IDS).logits
    if grouped:
        with grouped_attention(model):
            found = _step_by_step(model, cache, beginning)
    else:
        found = _step_by_step(model, cache, beginning)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == IDS.shape[1] == cache.layers[0].get_max_length()


def test_memory_is_taken_once() -> None:
    model = tiny_model("llama")
    cache = cache_for(model, 14)
    assert cache is not None
    _step_by_step(model, cache, 1)
    first = cache.layers[0]
    assert isinstance(first, FilledLayer) and first.keys is not None and first.keys.shape[2] == 14
    seen, _ = FilledLayer.update(layer := FilledLayer(9), *torch.ones(2, 1, 2, 3, 4))
    more, _ = layer.update(*torch.ones(2, 1, 2, 1, 4))
    assert seen.shape[2] == 3 and more.shape[2] == 4 and seen.data_ptr() == more.data_ptr()


def test_who_gets_which_cache() -> None:
    sliding = tiny_model(**VARIANTS["mistral-sliding"])
    window = sliding.config.sliding_window
    assert type(cache_for(sliding, window)) is StaticCache, "it is shorter than what the text attends to"
    roomy = cache_for(sliding, window - 1)
    assert roomy is not None and type(roomy.layers[0]) is FilledLayer
    assert cache_for(tiny_model("baichuan"), 9) is None, "code that is not transformers' own makes its own"


def _held(stored: torch.dtype) -> Any:
    """A model that is stored in one type and computed with in float32."""
    model = tiny_model("llama", dtype=stored)
    model.config.dtype = stored
    cast(model, torch.float32)
    return model


def test_keys_and_values_are_kept_as_the_weights_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    model, caches, original = _held(torch.bfloat16), [], sampling.cache_for

    def remembered(*arguments: Any) -> Cache | None:
        caches.append(original(*arguments))
        return caches[-1]

    monkeypatch.setattr(sampling, "cache_for", remembered)
    ids = sample(model, tiny_tokenizer(), 6, 14, seed=3)
    assert caches[0].layers[0].keys.dtype is torch.bfloat16
    generator = torch.Generator().manual_seed(3)
    torch.randint(93, (6,), generator=generator)
    draws = torch.rand(6, 14, generator=generator)
    with torch.inference_mode():
        probabilities = model(input_ids=ids).logits.double().softmax(-1)
    upper = probabilities.cumsum(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    lower = upper - probabilities[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert bool(((draws[:, 1:] > lower - 5e-3) & (draws[:, 1:] < upper + 5e-3)).all())


def test_the_stock_function_gets_what_it_knows() -> None:
    model = _held(torch.bfloat16)
    assert stored_in(model) is torch.bfloat16 and narrow_cache(model) is None
    with grouped_attention(model):
        assert narrow_cache(model) is torch.bfloat16
    cast(model, torch.bfloat16)
    assert stored_in(model) is None, "computed with as it is stored"


def test_text_of_a_model_that_is_stored_otherwise_is_other_text(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path))
    model, sampled, original = _held(torch.bfloat16), [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *given: sampled.append(1) or original(*given))
    for stored in (torch.bfloat16, torch.float32, torch.bfloat16):
        model.config.dtype = stored
        self_text(model, tiny_tokenizer(), 2, 8, 0)
    assert len(sampled) == 2
