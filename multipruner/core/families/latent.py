"""The rows of multi-head latent attention, before an MLP or experts (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from multipruner.core.blocks import BlockSpec, linear
from multipruner.core.layout import Layout

from .experts import AFTER_FIRST, AHEAD, CORRECTED, SHARED, SPARSE, experts, with_groups
from .family import Family
from .parts import HEADS, mlp

_SIZES: dict[str, str] = {
    "hidden_size": "hidden",
    "num_attention_heads": "kv_groups * queries",
    "num_key_value_heads": "kv_groups",
    "v_head_dim": "head_dim",
    "qk_nope_head_dim": "nope_dim",
    "qk_rope_head_dim": "rope_dim",
    "kv_lora_rank": "latent",
}
"""How configurations name sizes; ``head_dim`` is the width of a value."""


def latent_attention(*, queries_too: bool = True, **rest: Any) -> BlockSpec:
    """Return multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): heads can leave, as rows of the
    matrices that make them of the low-rank states; those states, and the key for positions that all heads share, stay
    whole and are all that is kept.

    Args:
        queries_too: whether queries are made of low-rank states as well.
        **rest: see :class:`~multipruner.core.blocks.BlockSpec`.
    """
    queries = "kv_groups * queries * (nope_dim + rope_dim)"
    return BlockSpec(
        kind="attention",
        tensors=(
            *(linear("q_a_proj", "query_latent", "hidden") if queries_too else ()),
            *(linear("q_b_proj", queries, "query_latent") if queries_too else linear("q_proj", queries, "hidden")),
            *linear("kv_a_proj_with_mqa", "latent + rope_dim", "hidden"),
            *linear("kv_b_proj", "kv_groups * queries * (nope_dim + head_dim)", "latent"),
            *linear("o_proj", "hidden", HEADS),
        ),
        output="o_proj",
        attributes=(("num_heads", Layout("kv_groups * queries")),),
        arguments=True,
        cached=(Layout("latent"), Layout("rope_dim")),
        scores=(Layout(queries), Layout(HEADS)),
        cache="layer_idx",
        **{"path": "self_attn", "before": "input_layernorm", **rest},
    )


def _rows(model_type: str, prefix: str, *blocks: BlockSpec, config: dict[str, str], **rest: Any) -> list[Family]:
    """Return the rows of latent attention before other blocks, whose queries are made of the states or of low-rank
    ones.
    """
    narrow, wide = ((latent_attention(queries_too=too), *blocks) for too in (True, False))
    config = {**_SIZES, **config}
    both = Family(model_type, prefix, narrow, config={**config, "q_lora_rank": "query_latent"}, **rest)
    return [Family(model_type, prefix, wide, config=config, needs={"q_lora_rank": (None,)}, **rest), both]


_YOUTU, _YOUTU_NARROW = _rows("youtu", "Youtu", mlp(), config={"intermediate_size": "channels"})
_V2 = _rows("deepseek_v2", "DeepseekV2", mlp(), experts(), config=SHARED, pattern=AFTER_FIRST)

LATENT: tuple[Family, ...] = (
    replace(_YOUTU, others=(_YOUTU_NARROW,)),
    with_groups(*_V2, alone={"topk_method": ("greedy", None)}, compared=1),
    with_groups(*_rows("deepseek_v3", "DeepseekV3", mlp(), CORRECTED, config=SHARED, pattern=AFTER_FIRST, ahead=AHEAD)),
    with_groups(*_rows("glm4_moe_lite", "Glm4MoeLite", mlp(), CORRECTED, config=SHARED, pattern=SPARSE, ahead=AHEAD)),
)
"""Every family with latent attention."""
