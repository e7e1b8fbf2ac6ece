"""Grouped attention on a CPU gives what the stock function gives, and leaves no trace."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from multipruner.engine import grouped_attention as attention
from multipruner.engine.grouped_attention import NAME, grouped_attention
from multipruner.engine.moments import Moments, gather, products_of
from multipruner.engine.prunable import Prunable
from tests.support.tiny import tiny_model

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bfloat16"
)


def model(dtype: torch.dtype = torch.bfloat16) -> Any:
    return tiny_model("llama", layers=2, dtype=dtype)


class Attending(nn.Module):
    """What a stock attention module tells its attention function about itself."""

    def __init__(self, groups: int, causal: bool = True) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, causal


def tensors(rows: int, groups: int, each: int, queries: int, keys: int, width: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, groups * each, queries, width), (rows, groups, keys, width), (rows, groups, keys, width)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@given(
    rows=st.integers(1, 6), groups=st.integers(1, 3), each=st.integers(1, 3), length=st.integers(2, 150),
    width=st.sampled_from([8, 16]), scale=st.sampled_from([None, 0.3]), seed=st.integers(0, 99),
)  # fmt: skip
@torch.inference_mode()
def test_causal_passes_are_the_stock_ones(rows, groups, each, length, width, scale, seed):
    q, k, v = tensors(rows, groups, each, length, length, width, seed)
    ours, _ = attention._forward(Attending(each), q, k, v, None, scaling=scale)
    theirs, _ = sdpa_attention_forward(Attending(each), q, k, v, None, scaling=scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@given(
    rows=st.integers(1, 4), groups=st.integers(1, 3), each=st.integers(1, 3), keys=st.integers(1, 90),
    masked=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@torch.inference_mode()
def test_single_queries_are_the_stock_ones(rows, groups, each, keys, masked, seed):
    q, k, v = tensors(rows, groups, each, 1, keys, 8, seed)
    mask = None
    if masked:
        mask = torch.rand(rows, 1, 1, keys, generator=torch.Generator().manual_seed(seed)) < 0.7
        mask[..., 0] = True
    ours, _ = attention._forward(Attending(each), q, k, v, mask)
    theirs, _ = sdpa_attention_forward(Attending(each), q, k, v, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "keys", "mask", "settings"),
    [
        (5, 5, torch.ones(2, 1, 5, 5, dtype=torch.bool).tril(), {}),
        (5, 5, torch.zeros(2, 1, 5, 5), {}),
        (5, 5, None, {"is_causal": False}),
        (5, 9, None, {"is_causal": False}),
        (1, 5, torch.zeros(2, 1, 1, 5), {}),
        (1, 5, torch.rand(2, 4, 1, 5) < 0.5, {}),
        (5, 5, None, {"position_bias": torch.randn(2, 4, 5, 5)}),
    ],
)
@torch.inference_mode()
def test_the_rest_goes_to_the_stock_function(queries, keys, mask, settings):
    q, k, v = tensors(2, 2, 2, queries, keys, 8, 0)
    ours, _ = attention._forward(Attending(2), q, k, v, mask, **settings)
    theirs, _ = sdpa_attention_forward(Attending(2), q, k, v, mask, **settings)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_gradients_go_through_the_stock_function():
    q, k, v = (tensor.requires_grad_() for tensor in tensors(1, 2, 2, 5, 5, 8, 0))
    ours, _ = attention._forward(Attending(2), q, k, v, None)
    ours.sum().backward()
    assert all(tensor.grad is not None for tensor in (q, k, v))


@needs_bfloat16
@torch.inference_mode()
def test_bfloat16_models_compute_the_same_up_to_rounding():
    ids = torch.randint(0, 97, (3, 100), generator=torch.Generator().manual_seed(1))
    for cached in (False, True):
        for cache in (lambda llm: StaticCache(llm.config, max_cache_len=8), lambda llm: DynamicCache()):
            llm, exact = model(), model().float()

            def steps(llm: Any, of: Any = cache, cached: bool = cached) -> torch.Tensor:
                if not cached:
                    return llm(ids).logits.float()
                kept = of(llm)
                return torch.cat([llm(ids[:, i : i + 1], past_key_values=kept).logits.float() for i in range(8)], 1)

            with grouped_attention(llm):
                assert llm.config._attn_implementation == NAME
                ours: torch.Tensor = steps(llm)
            wanted: torch.Tensor = steps(exact)
            stock: torch.Tensor = steps(llm)
            assert cached or not torch.equal(ours, stock), "it was another computation"
            assert (ours - wanted).square().mean() < 1.5 * (stock - wanted).square().mean()


@needs_bfloat16
def test_it_leaves_no_trace(tmp_path: Path):
    llm = model()
    with pytest.raises(KeyError), grouped_attention(llm):
        raise KeyError
    assert llm.config._attn_implementation == "sdpa"
    with grouped_attention(llm):
        llm.save_pretrained(tmp_path / "saved")
    assert NAME not in (tmp_path / "saved" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config._attn_implementation == "sdpa"


@pytest.mark.parametrize("change", ["eager", "no config", "elsewhere"])
def test_where_it_does_not_pay_nothing_changes(change):
    llm = model().to("meta" if change == "elsewhere" else "cpu")
    if change == "eager":
        llm.set_attn_implementation("eager")
    before = llm.config._attn_implementation
    with grouped_attention(llm.lm_head if change == "no config" else llm):
        assert llm.config._attn_implementation == before


@torch.inference_mode()
def test_whole_texts_in_float32_attend_as_they_do_in_the_stock_model():
    llm, ids = model(torch.float32), torch.randint(0, 97, (2, 70))
    with grouped_attention(llm):
        ours = llm(ids).logits
    assert torch.equal(ours, llm(ids).logits)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_keys_and_values_may_be_narrower_than_the_query(narrow):
    q, k, v = tensors(3, 2, 2, 1, 40, 16, 0)
    ours, _ = attention._forward(Attending(2), q, k.to(narrow), v.to(narrow), None)
    theirs, _ = sdpa_attention_forward(Attending(2), q, k.to(narrow).float(), v.to(narrow).float(), None)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    # what the fast path does not cover gets what it knows
    q, k, v = tensors(3, 2, 2, 5, 40, 16, 0)
    mask = torch.ones(3, 1, 5, 40, dtype=torch.bool)
    ours, _ = attention._forward(Attending(2), q, k.to(narrow), v.to(narrow), mask)
    theirs, _ = sdpa_attention_forward(Attending(2), q, k.to(narrow).float(), v.to(narrow).float(), mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@needs_bfloat16
@torch.inference_mode()
def test_blocks_of_the_engine_use_it(monkeypatch):
    used = []
    real = attention._causal
    monkeypatch.setattr(attention, "_causal", lambda *parts: used.append(1) or real(*parts))
    llm = model()
    prunable = Prunable.of(llm)
    inputs = prunable.inputs(torch.randint(0, 97, (2, 70)))
    prunable.block(inputs.hidden, inputs, 0, prunable.dense[0])
    assert used
    used.clear()
    llm(torch.randint(0, 97, (2, 70)))
    assert not used, "a stock forward is stock"


@needs_bfloat16
def test_products_of_bfloat16_numbers_are_exact():
    rows = torch.randn(500, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    linear = nn.Linear(40, 3, bias=False, dtype=torch.bfloat16)
    with torch.inference_mode(), Moments(linear) as moments:
        linear(rows)
    exact = rows.double().T @ rows.double() / len(rows)
    torch.testing.assert_close(moments.second().double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moments.first().double(), rows.double().mean(0), rtol=1e-5, atol=1e-6)


def test_the_precision_of_products_is_as_before():
    assert torch.get_float32_matmul_precision() == "highest"
    with products_of(torch.float32):
        assert torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(KeyError), products_of(torch.bfloat16):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


@needs_bfloat16
def test_statistics_agree_with_a_stock_pass():
    llm = model()
    ids = torch.randint(0, 97, (4, 100), generator=torch.Generator().manual_seed(2))
    found = gather(Prunable.of(llm), ids)
    output = llm.model.layers[1].mlp.down_proj
    with torch.inference_mode(), Moments(output) as moments:
        llm(ids)
    difference = (found.grams[3] - moments.second()).norm() / moments.second().norm()
    assert float(difference) < 0.02


@needs_bfloat16
@torch.inference_mode()
def test_the_benchmark_runs_both_sides(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    bench = import_module("passes")
    monkeypatch.setattr(bench, "SAMPLED", 3)
    used = []
    for name in ("_causal", "_one_query"):
        real = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *parts, real=real: used.append(1) or real(*parts))
    rows = bench.passes(model(), torch.randint(0, 97, (2, 20)))
    attending = ("an attention block", "one more token of 3 sequences", "all moments")
    for name, work in rows.items():
        used.clear()
        with bench.stock():
            assert bench.best(1, work) > 0
        assert not used, name
        assert bench.best(1, work) > 0
        assert bool(used) == (name in attending), name


@torch.inference_mode()
def test_the_benchmark_compares_what_comes_to_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    bench = import_module("passes")
    monkeypatch.setattr(bench, "SAMPLED", 3)
    work = bench.passes(model(torch.float32), torch.randint(0, 97, (4, 20)))["the order of one MLP's channels"]
    with bench.stock():
        plain = work()
    assert work() == plain and sorted(plain) == list(range(40))
