"""The blocks that rows of families are made of: attention and MLP as most families build them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from multipruner.core.blocks import BlockSpec, Tensors, TensorSpec, linear
from multipruner.core.layout import Layout

HEADS, GROUPS = "kv_groups * queries * head_dim", "kv_groups * head_dim"
VALUES, MIXED = "kv_groups * value_dim", "kv_groups * queries * value_dim"
"""What values are, and what attention makes of them, where nothing but attention lies between their projections."""
HALVES, NEIGHBOURS = "2 * rope_pairs + unrotated", "rope_pairs * 2 + unrotated"
"""How the dimensions of a head lie whose pairs rotary embeddings turn: the one of a pair half of what is turned behind
the other, or next to it; behind them the dimensions that are not turned."""
TOGETHER = ("kv_groups * heads * head_dim", "kv_groups * groups * head_dim")
"""Queries and keys of attention whose heads are one unit."""
INTERLEAVED, STACKED = "kv_groups * 3 * head_dim", f"{GROUPS} + {GROUPS} + {GROUPS}"
"""One matrix of queries, keys and values of as many heads each: head by head, or one after the other."""
SINKS: Tensors = (TensorSpec("sinks", (Layout("kv_groups * queries"),)),)
"""A logit of every query head that no key gives."""
Attributes = tuple[tuple[str, Layout], ...]
_GROUPED: Attributes = (("num_key_value_groups", Layout("queries")),)


def attention(
    heads: str = HEADS,
    groups: str = GROUPS,
    *,
    asked: str = "",
    inputs: tuple[str, ...] = ("q_proj", "k_proj", "v_proj"),
    fused: str = "",
    output: str = "o_proj",
    more: Tensors = (),
    matrix: Callable[[str, str, str], Tensors] = linear,
    attributes: Attributes = _GROUPED,
    turned: bool = True,
    rotated: str = HALVES,
    **rest: Any,
) -> BlockSpec:
    """Return softmax attention with keys and values that are kept, and a norm before it.

    Args:
        heads, groups: the layouts of queries, and of keys and of values.
        asked: the rows of the projection of the queries, where that gives more than them.
        inputs: the projections that give them; one that gives all three does so one after the other.
        fused: the layout of such a projection, where it is another.
        output: its output projection.
        more: further tensors that depend on its size.
        matrix: what the projections are.
        turned: whether values may be turned into another basis: nothing but attention lies between them and what reads
            them.
        rotated: how the dimensions of queries and keys lie, where rotary embeddings alone lie between their projections
            and their products; empty where something else does, such as a norm.
        attributes, **rest: see :class:`~multipruner.core.blocks.BlockSpec`.
    """
    plain = len(inputs) == 3 and (heads, groups, asked) == (HEADS, GROUPS, "") and not rest.get("resized")
    plain = plain and turned and matrix is linear
    values, mixed = (VALUES, MIXED) if plain else (groups, heads)
    queries, keys = asked or heads, groups
    if plain and rotated:
        queries, keys = (f"{kept} * ({rotated})" for kept in ("kv_groups * queries", "kv_groups"))
    layouts = (queries, keys, values) if len(inputs) == 3 else (fused or f"{heads} + {groups} + {groups}",)
    return BlockSpec(
        kind="attention",
        tensors=(*(each for name, rows in zip(inputs, layouts, strict=True) for each in matrix(name, rows, "hidden")),
                 *matrix(output, "hidden", mixed), *more),
        output=output,
        attributes=attributes,
        arguments=True,
        scores=(Layout(heads), Layout(heads)),
        **{"path": "self_attn", "before": "input_layernorm", "cache": "layer_idx",
           "cached": (Layout(groups), Layout(groups)), **rest},
    )  # fmt: skip


def mlp(
    *inputs: str,
    rows: str = "channels",
    output: str = "down_proj",
    matrix: Callable[[str, str, str], Tensors] = linear,
    **rest: Any,
) -> BlockSpec:
    """Return an MLP with a norm before it.

    Args:
        *inputs: its input projections; default: a gate and an up.
        rows: the layout of each.
        output: its output projection.
        matrix: what the projections are.
        **rest: see :class:`~multipruner.core.blocks.BlockSpec`.
    """
    names = inputs or ("gate_proj", "up_proj")
    return BlockSpec(
        kind="mlp",
        tensors=(*(each for name in names for each in matrix(name, rows, "hidden")),
                 *matrix(output, "hidden", "channels")),
        output=output,
        **{
            "path": "" if rest.get("steps") else "mlp",
            "before": "post_attention_layernorm",
            "attributes": (("intermediate_size", Layout("channels")),),
            **rest,
        },
    )  # fmt: skip
