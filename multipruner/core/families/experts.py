"""The rows of mixtures of experts: softmax attention, then experts of which every token takes some.

transformers hold the experts of a layer as stacks of matrices, [experts, rows, columns]. They read and write the layout
of the published checkpoints, one matrix per expert, where there is one. Experts that every token takes (shared ones)
are no units: they stay as long as their block does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from multipruner.core.blocks import BlockSpec, TensorSpec
from multipruner.core.layout import Layout

from .family import GROUPED_HEADS, Family
from .parts import NEIGHBOURS, SINKS, TOGETHER, attention, mlp
from .patterns import Pattern

_ACTIVE = {"num_experts_per_tok": "active"}
_HEADS = {key: text for key, text in GROUPED_HEADS.items() if key != "intermediate_size"}
_ONE_UNIT = {"num_attention_heads": "heads", "num_key_value_heads": "groups"}
"""Of attention with one norm over the queries of all heads: they go together or not at all."""
LOCAL = {"num_local_experts": "experts", "intermediate_size": "expert_width", **_ACTIVE}
_BESIDE_MLP = {"intermediate_size": "channels", "moe_intermediate_size": "expert_width"}
_RESIDUAL: dict[str, Any] = {"gain": "residual_multiplier"}


def experts(
    path: str = "mlp",
    router: str = "gate",
    *,
    bias: str = "",
    rows: str = "",
    biases: bool = False,
    gated: bool = True,
    read: str = "hidden",
    **rest: Any,
) -> BlockSpec:
    """Return experts and the router before them, and a norm before that.

    Args:
        path: its module within the decoder layer.
        router: the module whose weight has a row for every expert.
        bias: what is added to the router's scores when it chooses, within the block; empty where nothing is.
        rows: the layout of the dimension that this has before that of the experts; empty where it has none.
        biases: whether the router and the experts have biases, and the stacks' matrices lie transposed.
        gated: whether an expert has a gate, whose matrix lies before that of what it is for.
        read: the layout of what an expert reads and returns.
        **rest: see :class:`~multipruner.core.blocks.BlockSpec`.
    """
    count, width = Layout("experts"), "expert_width"
    added = (Layout(rows), count) if rows else (count,)
    states, one = Layout(read), Layout(width)
    name, rows_of = ("gate_up_proj", Layout(f"{width} + {width}")) if gated else ("up_proj", one)
    stacks = ((f"experts.{name}", rows_of, states), ("experts.down_proj", states, one))
    return BlockSpec(
        kind="experts",
        path=path,
        tensors=(
            TensorSpec(f"{router}.weight", (count, Layout("hidden"))),
            *(TensorSpec(name, (count, *((to, by)[:: -1 if biases else 1]))) for name, to, by in stacks),
            *((TensorSpec(bias, added),) if bias else ()),
            *((TensorSpec(f"{router}.bias", (count,)),) if biases else ()),
            *(TensorSpec(f"{name}_bias", (count, to)) for name, to, _ in stacks if biases),
        ),
        output="",
        routed="experts",
        attributes=tuple((name, count) for name in (f"{router}.num_experts", "experts.num_experts", "num_experts")),
        **{"before": "post_attention_layernorm", **rest},
    )


def _sparse(values: Mapping[str, Any], layer: int) -> bool:
    own = layer not in (values["mlp_only_layers"] or ())
    return own and (layer + 1) % (values["decoder_sparse_step"] or 1) == 0


def _dense_ones(experts: Sequence[bool]) -> dict[str, Any]:
    return {"mlp_only_layers": [layer for layer, has in enumerate(experts) if not has], "decoder_sparse_step": 1}


def _between(experts: Sequence[bool]) -> dict[str, Any]:
    """Say which layers have experts where these stand side by side, as with an interval of 1 they always do."""
    layers = [layer for layer, has in enumerate(experts) if has] or [len(experts)]
    return {"moe_layer_start_index": layers[0], "moe_layer_end_index": layers[-1]}


KINDS = ("experts", "mlp")
LISTED = Pattern(("mlp_only_layers", "decoder_sparse_step"), KINDS, _sparse, _dense_ones)


def after_first(key: str) -> Pattern:
    """Return the pattern of a configuration that says how many layers, the first ones, have an MLP."""
    return Pattern(
        (key,),
        KINDS,
        lambda values, layer: layer >= (values[key] or 0),
        lambda experts: {key: list(experts).index(True) if any(experts) else len(experts)},
    )


AFTER_FIRST = after_first("first_k_dense_replace")
_BETWEEN = Pattern(
    ("moe_layer_start_index", "moe_layer_end_index"),
    KINDS,
    lambda values, layer: values["moe_layer_start_index"] <= layer <= values["moe_layer_end_index"],
    _between,
)
SPARSE = Pattern(
    ("mlp_layer_types",),
    KINDS,
    lambda values, layer: values["mlp_layer_types"][layer] == "sparse",
    lambda experts: {"mlp_layer_types": ["sparse" if has else "dense" for has in experts]},
)
_EITHER = (attention(), mlp(), experts())
_NORMED = attention(rotated="")
"""A norm between the projections of queries and keys and their rotation, or one in some models of the family."""
CORRECTED = experts(bias="gate.e_score_correction_bias")
SHARED = {**_BESIDE_MLP, "n_routed_experts": "experts", **_ACTIVE}
AHEAD = "num_nextn_predict_layers"
BESIDE = "mtp."
"""What the tensors begin with of layers that predict further tokens and stand beside the decoder."""
_ALONE: Mapping[str, tuple[Any, ...]] = {"n_group": (1, None)}
_GROUPED = "expert_groups * group_experts"


def in_groups(row: Family, compared: int) -> Family:
    """Return the row of the same models with routers that choose groups of experts first, which lie side by side.

    As many experts stay of every group, so that the groups are what they were.

    Args:
        row: of models with one group.
        compared: how many experts of a group say what the group is worth.
    """
    own, count = {"experts": "grouped_experts"}, Layout("experts")

    def grouped(layouts: tuple[Layout, ...]) -> tuple[Layout, ...]:
        return tuple(Layout(_GROUPED) if layout == count else layout for layout in layouts)

    blocks = tuple(
        replace(
            block,
            kind=own[block.kind],
            tensors=tuple(TensorSpec(tensor.path, grouped(tensor.dims)) for tensor in block.tensors),
            attributes=(
                *((name, *grouped((layout,))) for name, layout in block.attributes),
                (f"{block.tensors[0].path.rpartition('.')[0]}.num_group", Layout("expert_groups")),
            ),
        )
        if block.routed
        else block
        for block in row.blocks
    )
    config = {key: _GROUPED if text == count.text else text for key, text in row.config.items()}
    return replace(
        row,
        blocks=blocks,
        config={**config, "n_group": "expert_groups", "topk_group": "active_groups"},
        unsaid={**row.unsaid, "compared": str(compared)},
        pattern=row.pattern and row.pattern.renamed(own),
        mixing=row.mixing and row.mixing.renamed(own),
    )


def with_groups(*rows: Family, alone: Mapping[str, tuple[Any, ...]] = _ALONE, compared: int = 2) -> Family:
    """Return the rows of a family, and behind them those of its models that choose among groups of experts.

    Args:
        *rows: of models that do not.
        alone: the settings of those.
        compared: see :func:`in_groups`.
    """
    first, *others = (replace(row, needs={**row.needs, **alone}) for row in rows)
    return replace(first, others=(*others, *(in_groups(row, compared) for row in rows)))


def _shared(model_type: str, prefix: str) -> Family:
    """Return a family of experts beside shared ones, after layers with an MLP."""
    blocks = (_NORMED, mlp(), CORRECTED)
    config = {**_HEADS, **SHARED}
    return with_groups(Family(model_type, prefix, blocks, config=config, pattern=AFTER_FIRST, ahead=AHEAD))


GRANITE_EXPERTS = experts("block_sparse_moe", "router", **_RESIDUAL)
_GRANITE: dict[str, Any] = {
    "blocks": (attention(**_RESIDUAL), GRANITE_EXPERTS),
    "config": {**_HEADS, **LOCAL},
    "head_scale": "/ logits_scaling",
}


def shared_mlp(**rest: Any) -> BlockSpec:
    """Return the MLP of Granite's hybrids, which may run beside experts."""
    more = {**_RESIDUAL, **rest}
    return mlp("input_linear", rows="channels + channels", output="output_linear", path="shared_mlp", **more)


EXPERTS: tuple[Family, ...] = (
    Family("mixtral", "Mixtral", (attention(), experts()), config={**_HEADS, **LOCAL}),
    Family(
        "qwen3_moe",
        "Qwen3Moe",
        (_NORMED, mlp(), experts()),
        config={**_HEADS, **_BESIDE_MLP, "num_local_experts": "experts", **_ACTIVE},
        pattern=LISTED,
    ),
    Family(
        "olmoe",
        "Olmoe",
        (attention(*TOGETHER, attributes=()), experts()),
        config={**_HEADS, **_ONE_UNIT, "num_experts": "experts", "intermediate_size": "expert_width", **_ACTIVE},
    ),
    Family(
        "qwen2_moe",
        "Qwen2Moe",
        _EITHER,
        config={**_HEADS, **_BESIDE_MLP, "num_experts": "experts", **_ACTIVE},
        pattern=LISTED,
    ),
    Family("granitemoe", "GraniteMoe", **_GRANITE),
    Family("granitemoeshared", "GraniteMoeShared", **_GRANITE, needs={"shared_intermediate_size": (0,)}, others=(
        Family("granitemoeshared", "GraniteMoeShared", **{
            **_GRANITE, "blocks": (*_GRANITE["blocks"], shared_mlp(parallel=True)),
            "config": {**_GRANITE["config"], "shared_intermediate_size": "channels"}}),
    )),
    _shared("glm4_moe", "Glm4Moe"),
    _shared("dots1", "Dots1"),
    Family(
        "ernie4_5_moe",
        "Ernie4_5_Moe",
        (attention(rotated=NEIGHBOURS), mlp(), experts(bias="gate.moe_statics.e_score_correction_bias", rows="1")),
        config={**_HEADS, **_BESIDE_MLP, "moe_num_experts": "experts", "moe_k": "active", "moe_layer_interval": "1"},
        pattern=_BETWEEN,
    ),
    with_groups(Family(
        "solar_open", "SolarOpen", (attention(), CORRECTED),
        config={**_HEADS, "moe_intermediate_size": "expert_width", "n_routed_experts": "experts", **_ACTIVE},
    )),
    with_groups(Family(
        "exaone_moe", "ExaoneMoe", (_NORMED, mlp(), CORRECTED), pattern=SPARSE, beside=BESIDE,
        config={**_HEADS, **_BESIDE_MLP, "num_experts": "experts", **_ACTIVE},
    )),
    Family(
        "mellum", "Mellum", (_NORMED, mlp(), experts()), pattern=SPARSE, ahead=AHEAD, beside=BESIDE,
        config={**_HEADS, **_BESIDE_MLP, "num_local_experts": "experts", **_ACTIVE},
    ),
    Family(
        "flex_olmo",
        "FlexOlmo",
        (
            attention(*TOGETHER, attributes=(), before="", after="post_attention_layernorm"),
            experts(before="", after="post_feedforward_layernorm"),
        ),
        config={**_HEADS, **_ONE_UNIT, "num_experts": "experts", "intermediate_size": "expert_width", **_ACTIVE},
    ),
    Family(
        "gpt_oss",
        "GptOss",
        (attention(more=SINKS), experts(router="router", biases=True, paired=True)),
        config={**_HEADS, **LOCAL},
    ),
    Family(
        "minimax_m2",
        "MiniMaxM2",
        (attention(*TOGETHER, attributes=()), experts(bias="e_score_correction_bias")),
        config={**_HEADS, **_ONE_UNIT, **LOCAL},
    ),
)  # fmt: skip
"""Every family with experts."""
