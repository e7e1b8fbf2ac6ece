"""The rows of mixtures of experts: softmax attention, then experts of which every token takes some.

transformers hold the experts of a layer as stacks of matrices, [experts, rows, columns]. They read and write the layout
of the published checkpoints, one matrix per expert, where there is one.
"""

from __future__ import annotations

from typing import Any

from multipruner.core.blocks import BlockSpec, TensorSpec
from multipruner.core.layout import Layout

from .family import GROUPED_HEADS, Family
from .parts import attention

_ACTIVE = {"num_experts_per_tok": "active"}
_HEADS = {key: text for key, text in GROUPED_HEADS.items() if key != "intermediate_size"}


def experts(path: str = "mlp", router: str = "gate", **rest: Any) -> BlockSpec:
    """Return experts and the router before them, and a norm before that.

    Args:
        path: its module within the decoder layer.
        router: the module whose weight has a row for every expert.
        **rest: see :class:`~multipruner.core.blocks.BlockSpec`.
    """
    count, width = Layout("experts"), "expert_width"
    return BlockSpec(
        kind="experts",
        path=path,
        tensors=(
            TensorSpec(f"{router}.weight", (count, Layout("hidden"))),
            TensorSpec("experts.gate_up_proj", (count, Layout(f"{width} + {width}"), Layout("hidden"))),
            TensorSpec("experts.down_proj", (count, Layout("hidden"), Layout(width))),
        ),
        output="",
        routed="experts",
        attributes=((f"{router}.num_experts", count), ("experts.num_experts", count)),
        **{"before": "post_attention_layernorm", **rest},
    )


EXPERTS: tuple[Family, ...] = (
    Family(
        "mixtral",
        "Mixtral",
        (attention(), experts()),
        config={**_HEADS, **_ACTIVE, "num_local_experts": "experts", "intermediate_size": "expert_width"},
    ),
)
"""Every family with experts."""
