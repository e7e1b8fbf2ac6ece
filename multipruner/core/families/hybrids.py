"""The rows of hybrids: some layers attend, and others mix tokens by a short convolution or a state of fixed size.

Such a mixer is a block that stays whole or leaves whole. What it keeps between tokens does not grow with the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multipruner.core.blocks import BlockSpec, linear

from .experts import (
    AHEAD,
    BESIDE,
    GRANITE_EXPERTS,
    LISTED,
    LOCAL,
    SHARED,
    after_first,
    experts,
    shared_mlp,
    with_groups,
)
from .family import GROUPED_HEADS, Family
from .parts import attention, mlp
from .patterns import Listed, Pattern, Wording

_KINDS = ("mixer", "attention")
_DELTA = "value_heads * value_width"
_DELTA_KEYS = {"linear_num_value_heads": "value_heads", "linear_value_head_dim": "value_width"}
_MAMBA_2 = "state_heads * state_width"
_MAMBA_2_KEYS = {"mamba_n_heads": "state_heads", "mamba_d_head": "state_width"}
_HEADS = {key: text for key, text in GROUPED_HEADS.items() if key != "intermediate_size"}
_RESIDUAL: dict[str, Any] = {"gain": "residual_multiplier"}


def mixer(path: str, width: str, output: str = "out_proj", **rest: Any) -> BlockSpec:
    """Return a mixer of tokens other than attention, and a norm before it.

    Args:
        path: its module within the decoder layer.
        width: the layout of what its output projection is multiplied with.
        output: that projection.
        **rest: see :class:`~multipruner.core.blocks.BlockSpec`.
    """
    return BlockSpec(
        kind="mixer",
        path=path,
        tensors=linear(output, "hidden", f"mixers * {width}"),
        output=output,
        cache="layer_idx",
        **{"before": "input_layernorm", "recurrent": True, **rest},
    )


def _numbered(key: str) -> Pattern:
    """Return the pattern of a configuration that has the numbers of the layers that attend under a key."""
    return Pattern(
        (key,),
        _KINDS,
        lambda values, layer: layer not in (values[key] or ()),
        lambda mixers: {key: [layer for layer, mixes in enumerate(mixers) if not mixes]},
    )


def _two_thirds(values: Mapping[str, Any]) -> dict[str, Any]:
    """Say the width of LFM2's MLP as it is built: two thirds of what is said, rounded up."""
    if not values.get("block_auto_adjust_ff_dim"):
        return {}
    width = int(2 * values["intermediate_size"] / 3)
    if (factor := values.get("block_ffn_dim_multiplier")) is not None:
        step = values["block_multiple_of"]
        width = step * ((int(factor * width) + step - 1) // step)
    return {"intermediate_size": width, "block_auto_adjust_ff_dim": False}


_ADJUSTED = Wording(
    ("block_auto_adjust_ff_dim", "block_ffn_dim_multiplier", "block_multiple_of", "intermediate_size"), _two_thirds
)
_LINEAR = Listed("layer_types", {"linear_attention": "mixer", "full_attention": "attention"})
_GATED = attention(asked="kv_groups * queries * 2 * head_dim")
"""Every query head comes with a gate of its width."""
_EXPERT_KEYS = {"moe_intermediate_size": "expert_width", "num_experts": "experts", "num_experts_per_tok": "active"}
_CONV = Listed("layer_types", {"conv": "mixer", "full_attention": "attention"})
_SHORT_CONV = (
    mixer("conv", "hidden", before="operator_norm", recurrent=False),
    attention(output="out_proj", before="operator_norm", rotated=""),
)
_GRANITE_MIXES = (mixer("mamba", _MAMBA_2, **_RESIDUAL), attention(**_RESIDUAL))
_GRANITE_KEYS = {**_HEADS, **_MAMBA_2_KEYS, "shared_intermediate_size": "channels"}
_MAMBA: dict[str, Any] = {
    "blocks": (mixer("mixer", "width", before="norm"),),
    "config": {"hidden_size": "hidden", "intermediate_size": "width"},
    "decoder": "backbone", "embeddings": "embeddings", "final_norm": "norm_f", "layer": "Block",
}  # fmt: skip


def _nemotron_h(read: str, more: Mapping[str, str] | None = None, **rest: Any) -> Family:
    """Return Nemotron-H: one block in every layer, so that layers leave whole; experts read hidden states as they are,
    or made narrower.
    """
    words = {"linear_attention": "mixer", "full_attention": "attention", "mlp": "mlp", "moe": "experts"}
    bias = "gate.e_score_correction_bias"
    return Family(
        "nemotron_h",
        "NemotronH",
        (
            mixer("mixer", _MAMBA_2, before="norm"),
            attention(path="mixer", before="norm", rotated=""),  # which turns nothing
            mlp("up_proj", path="mixer", before="norm"),
            experts("mixer", bias=bias, gated=False, read=read, before="norm"),
        ),
        config={
            **GROUPED_HEADS, **SHARED, "mamba_num_heads": "state_heads", "mamba_head_dim": "state_width", **(more or {})
        },
        mixing=Listed("layers_block_type", words),
        embeddings="embeddings",
        final_norm="norm_f",
        layer="Block",
        ahead=AHEAD,
        beside=BESIDE,
        **rest,
    )  # fmt: skip


HYBRIDS: tuple[Family, ...] = (
    Family(
        "lfm2",
        "Lfm2",
        (*_SHORT_CONV, mlp("w1", "w3", output="w2", path="feed_forward", before="ffn_norm", attributes=())),
        mixing=_CONV,
        wording=_ADJUSTED,
        final_norm="embedding_norm",
    ),
    Family(
        "lfm2_moe",
        "Lfm2Moe",
        (
            *_SHORT_CONV,
            mlp("w1", "w3", output="w2", path="feed_forward", before="ffn_norm"),
            experts("feed_forward", bias="expert_bias", before="ffn_norm"),
        ),
        config={**GROUPED_HEADS, **_EXPERT_KEYS},
        mixing=_CONV,
        pattern=after_first("num_dense_layers"),
        final_norm="embedding_norm",
    ),
    Family(
        "qwen3_next",
        "Qwen3Next",
        (mixer("linear_attn", _DELTA), _GATED, mlp(), experts()),
        config={**GROUPED_HEADS, **_DELTA_KEYS, **_EXPERT_KEYS},
        mixing=_LINEAR,
        pattern=LISTED,
        norm_offset=1.0,
        beside=BESIDE,
    ),
    Family(
        "qwen3_5_moe_text",
        "Qwen3_5Moe",
        (mixer("linear_attn", _DELTA), _GATED, experts()),
        config={**_HEADS, **_DELTA_KEYS, **_EXPERT_KEYS},
        mixing=_LINEAR,
        norm_offset=1.0,
        beside=BESIDE,
        infix="Text",
    ),
    Family(
        "qwen3_5_text",
        "Qwen3_5",
        (mixer("linear_attn", _DELTA), _GATED, mlp()),
        config={**GROUPED_HEADS, **_DELTA_KEYS},
        mixing=_LINEAR,
        norm_offset=1.0,
        beside=BESIDE,
        infix="Text",
    ),
    Family(
        "bamba",
        "Bamba",
        (mixer("mamba", _MAMBA_2), attention(), mlp(path="feed_forward", before="pre_ff_layernorm")),
        config={**GROUPED_HEADS, **_MAMBA_2_KEYS},
        mixing=_numbered("attn_layer_indices"),
        final_norm="final_layernorm",
        layer_arguments="config, number, config.layers_block_type[number]",
        layer_output="pair",
    ),
    Family(
        "granitemoehybrid",
        "GraniteMoeHybrid",
        (*_GRANITE_MIXES, shared_mlp()),
        config=_GRANITE_KEYS,
        needs={"num_local_experts": (0,)},
        others=(
            Family(
                "granitemoehybrid",
                "GraniteMoeHybrid",
                (*_GRANITE_MIXES, GRANITE_EXPERTS, shared_mlp(parallel=True)),
                config={**_GRANITE_KEYS, **LOCAL},
                mixing=_LINEAR,
                head_scale="/ logits_scaling",
            ),
        ),
        mixing=_LINEAR,
        head_scale="/ logits_scaling",
    ),
    with_groups(
        _nemotron_h("hidden", needs={"moe_latent_size": (None,)}),
        _nemotron_h("expert_latent", {"moe_latent_size": "expert_latent"}),
    ),
    # a mixer in every layer and nothing else
    Family("mamba", "Mamba", **_MAMBA),
    Family("mamba2", "Mamba2", **{
        **_MAMBA, "blocks": (mixer("mixer", _MAMBA_2, before="norm"),),
        "config": {"hidden_size": "hidden", "num_heads": "state_heads", "head_dim": "state_width"}}),
    Family("falcon_mamba", "FalconMamba", **_MAMBA),
)  # fmt: skip
"""Every family with mixers."""
REFUSED: dict[str, str] = {
    "falcon_h1": "the model fills in numbers of its mixers when all layers are built, and its MLPs multiply behind "
    "their output projection (mlp_multipliers), where a repair does not look",
    "jamba": "their layers are told apart by periods (attn_layer_period, expert_layer_period), which cannot say what "
    "is left of them",
    "recurrent_gemma": "their recurrent blocks keep what they remember in the model itself and not in a cache",
    "rwkv": "their weights are divided by powers of two while they run (rescale_every), by the number of the layer",
    **dict.fromkeys(("zamba", "zamba2"), "several of their layers share the weights of one block"),
}
"""Model types that no row can describe, and why."""
