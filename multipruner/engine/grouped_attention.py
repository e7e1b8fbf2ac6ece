"""Attention on a CPU with the query heads of a group side by side: what the engine's own passes over text attend with.

Where text is sampled, a step asks with one position of every sequence and reads all keys and values: the query heads of
a KV group then stand as queries of one head, so that a group is read once, with no mask and no copy, and it may be kept
in the narrower type that the weights are stored in. Over whole texts, PyTorch's kernel for bfloat16 on a CPU is far
slower than batched products of the same size; there queries go in blocks that see no more than the keys before them
(``benchmarks/passes.py`` prints both). It is registered with transformers' own interface and used only between entering
and leaving :func:`grouped_attention`; whatever it does not cover goes to the stock function. Models on disk and stock
forwards (evaluation, timing) never meet it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "multipruner_grouped"
_QUERIES = 64
"""Positions whose scores are in memory together."""
_ROWS = 4
"""Sequences whose scores are in memory together: more do not fit the processor's cache."""


@contextmanager
def grouped_attention(module: nn.Module, model: nn.Module | None = None) -> Iterator[None]:
    """Have a model, or an attention block of one, attend with grouped queries where that pays; undone on leaving.

    That is on a CPU, where the stock choice is SDPA and the family's code leaves it to transformers' interface. In
    every other case nothing changes.

    Args:
        module: has the ``config`` that says how to attend.
        model: the model that it is of; default: itself.
    """
    asks = getattr(module if model is None else model, "_supports_attention_backend", True)
    config = getattr(module, "config", None)
    if not asks or getattr(config, "_attn_implementation", None) != "sdpa" or not _on_cpu(module):
        yield
        return
    assert config is not None
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


def narrow_cache(module: nn.Module) -> torch.dtype | None:
    """Return the type for keys and values of sampled text: the 16 bits that the weights are stored in, computed in
    more.

    A step reads all of them, which takes longer than to compute with them.

    Args:
        module: the model, inside :func:`grouped_attention`.

    Returns:
        The type; ``None`` for the one that is computed in: also where the stock function attends, which knows no other.
    """
    grouped = getattr(getattr(module, "config", None), "_attn_implementation", None) == NAME
    return stored_in(module) if grouped else None


def stored_in(module: nn.Module) -> torch.dtype | None:
    """Return the 16-bit type of a checkpoint that is computed with in another; ``None`` where there is no such
    difference.
    """
    stored = getattr(getattr(module, "config", None), "dtype", None)
    computed = next(module.parameters()).dtype
    return stored if stored in (torch.bfloat16, torch.float16) and computed.itemsize > stored.itemsize else None


def _on_cpu(module: nn.Module) -> bool:
    weight = next(module.parameters(), None)
    return weight is not None and weight.device.type == "cpu"


def _multiplied(dtype: torch.dtype) -> bool:
    """Tell whether batched products of a type are what PyTorch's own kernel is slower than."""
    return (
        dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Return an attention function of transformers: query [sequences, heads, queries, head_dim], key and value
    likewise with KV heads; the result is [sequences, queries, heads, head_dim].
    """
    special = any(settings.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    special = special or settings.get("dropout") or settings.get("output_attentions") or torch.is_grad_enabled()
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = settings.get("scaling") or query.shape[-1] ** -0.5
    if not special and query.shape[2] == 1 and (attention_mask is None or _of_keys(attention_mask)):
        return _one_query(query, key, value, attention_mask, scale), None
    key, value = key.to(query.dtype), value.to(query.dtype)
    whole = causal and attention_mask is None and 1 < query.shape[2] == key.shape[2]
    if not special and whole and _multiplied(query.dtype):
        parts = zip(query.split(_ROWS), key.split(_ROWS), value.split(_ROWS), strict=True)
        return torch.cat([_causal(q, k, v, scale) for q, k, v in parts]), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)


def _of_keys(mask: Tensor) -> bool:
    """Tell whether a mask says which keys to see, the same for every head: bool [sequences, 1, 1, keys]."""
    return mask.dtype is torch.bool and mask.shape[1] == 1


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return one new position per sequence, as when text is sampled; keys and values may be of another type."""
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    asked = query.to(key.dtype).reshape(rows, groups, heads // groups, width)
    found = F.scaled_dot_product_attention(asked, key, value, attn_mask=mask, scale=scale)
    return found.to(query.dtype).reshape(rows, 1, heads, -1)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return every position sees itself and those before it."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    each = heads // groups
    asked = (query * scale).reshape(rows, groups, each, length, width)
    keys = key.reshape(rows * groups, length, width).transpose(1, 2)
    values = value.reshape(rows * groups, length, -1)
    later = torch.ones(_QUERIES, _QUERIES, dtype=torch.bool).triu_(1)
    result = query.new_empty(rows, length, heads, values.shape[-1])
    for begin in range(0, length, _QUERIES):
        end = min(length, begin + _QUERIES)
        now = end - begin
        block = asked[:, :, :, begin:end].reshape(rows * groups, each * now, width)
        scores = torch.bmm(block, keys[:, :, :end]).view(rows, groups, each, now, end)
        scores[..., begin:].masked_fill_(later[:now, :now], -torch.inf)
        shares = scores.softmax(-1).view(rows * groups, each * now, end)
        found = torch.bmm(shares, values[:, :end]).view(rows, groups, each, now, -1)
        result[:, begin:end] = found.permute(0, 3, 1, 2, 4).reshape(rows, now, heads, -1)
    return result


AttentionInterface.register(NAME, _forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
