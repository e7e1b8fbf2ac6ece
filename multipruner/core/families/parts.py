"""The blocks that rows of families are made of: attention and MLP as most families build them."""

from __future__ import annotations

from typing import Any

from multipruner.core.blocks import BlockSpec, linear
from multipruner.core.layout import Layout

HEADS, GROUPS = "kv_groups * queries * head_dim", "kv_groups * head_dim"
TOGETHER = ("kv_groups * heads * head_dim", "kv_groups * groups * head_dim")
"""Queries and keys of attention whose heads are one unit."""
Attributes = tuple[tuple[str, Layout], ...]
_GROUPED: Attributes = (("num_key_value_groups", Layout("queries")),)


def attention(
    heads: str = HEADS, groups: str = GROUPS, *, fused: str = "", attributes: Attributes = _GROUPED, **rest: Any
) -> BlockSpec:
    """Return softmax attention with keys and values that are kept, and a norm before it.

    Args:
        heads, groups: the layouts of queries, and of keys and of values.
        fused: the projection that gives all three, one after the other; by default there are three.
        attributes, **rest: see :class:`~multipruner.core.blocks.BlockSpec`.
    """
    split = (("q_proj", heads), ("k_proj", groups), ("v_proj", groups))
    inputs = ((fused, f"{heads} + {groups} + {groups}"),) if fused else split
    return BlockSpec(
        kind="attention",
        path="self_attn",
        tensors=(*(each for name, rows in inputs for each in linear(name, rows, "hidden")),
                 *linear("o_proj", "hidden", heads)),
        output="o_proj",
        attributes=attributes,
        arguments=True,
        cached=(Layout(groups), Layout(groups)),
        scores=(Layout(heads), Layout(heads)),
        cache="layer_idx",
        **{"before": "input_layernorm", **rest},
    )  # fmt: skip


def mlp(*inputs: str, rows: str = "channels", output: str = "down_proj", **rest: Any) -> BlockSpec:
    """Return an MLP with a norm before it.

    Args:
        *inputs: its input projections; default: a gate and an up.
        rows: the layout of each.
        output: its output projection.
        **rest: see :class:`~multipruner.core.blocks.BlockSpec`.
    """
    names = inputs or ("gate_proj", "up_proj")
    return BlockSpec(
        kind="mlp",
        path="mlp",
        tensors=(*(each for name in names for each in linear(name, rows, "hidden")),
                 *linear(output, "hidden", "channels")),
        output=output,
        **{"before": "post_attention_layernorm", "attributes": (("intermediate_size", Layout("channels")),), **rest},
    )  # fmt: skip
