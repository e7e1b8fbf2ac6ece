"""The rows of dense families: softmax attention, then an MLP, one after the other."""

from __future__ import annotations

from typing import Any

from multipruner.core.layout import Layout

from .family import GROUPED_HEADS, Family
from .parts import HEADS, TOGETHER, attention, mlp

_GROUPS_UNSAID = {key: text for key, text in GROUPED_HEADS.items() if key != "num_key_value_heads"}
_HEADS_TOGETHER = {**GROUPED_HEADS, "num_attention_heads": "heads", "num_key_value_heads": "groups"}
_POST: tuple[dict[str, Any], dict[str, Any]] = (
    {"before": "", "after": "post_attention_layernorm"},
    {"before": "", "after": "post_feedforward_layernorm"},
)
_AS_ONE = attention(*TOGETHER, attributes=(), **_POST[0])
_FOUR_NORMS = (
    attention(after="post_attention_layernorm"),
    mlp(before="pre_feedforward_layernorm", after="post_feedforward_layernorm"),
)
_RESIDUAL: dict[str, Any] = {"gain": "residual_multiplier"}
_AROUND_ONE: dict[str, Any] = {"norm_offset": 1.0, "embeddings_scaled": True}

DENSE: tuple[Family, ...] = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3"),
    Family(
        "baichuan",
        "Baichuan",
        (
            attention(
                fused="W_pack",
                attributes=(("num_heads", Layout("kv_groups * queries")), ("hidden_size", Layout(HEADS))),
                resized=True,
            ),
            mlp(),
        ),
        config=_GROUPS_UNSAID,
        layer_arguments="config",
        remote_code=True,
        layer_output="tuple",
    ),
    # as Llama: other settings of attention, or none that pruning meets
    Family("ernie4_5", "Ernie4_5"),
    Family("hunyuan_v1_dense", "HunYuanDenseV1"),
    Family("ministral", "Ministral"),
    Family("olmo", "Olmo"),
    Family("seed_oss", "SeedOss"),
    Family("smollm3", "SmolLM3"),
    Family("helium", "Helium", (attention(resized=True), mlp())),
    # an MLP of two matrices, or of other names
    Family("arcee", "Arcee", (attention(), mlp("up_proj"))),
    Family("nemotron", "Nemotron", (attention(), mlp("up_proj")), norm_offset=1.0),
    Family("starcoder2", "Starcoder2", (attention(), mlp("c_fc", output="c_proj"))),
    Family("apertus", "Apertus", (attention(before="attention_layernorm"),
                                  mlp("up_proj", before="feedforward_layernorm"))),
    Family("glm", "Glm", (attention(), mlp("gate_up_proj", rows="channels + channels"))),
    # multipliers
    Family("granite", "Granite", (attention(**_RESIDUAL), mlp(**_RESIDUAL)), head_scale="/ logits_scaling"),
    # norms after the blocks, or on both sides
    Family("exaone4", "Exaone4", (attention(**_POST[0]), mlp(**_POST[1]))),
    Family("glm4", "Glm4", (attention(after="post_self_attn_layernorm"),
                            mlp("gate_up_proj", rows="channels + channels", after="post_mlp_layernorm"))),
    Family("gemma", "Gemma", **_AROUND_ONE),
    Family("gemma2", "Gemma2", _FOUR_NORMS, **_AROUND_ONE, head_cap="final_logit_softcapping"),
    Family("gemma3_text", "Gemma3", _FOUR_NORMS, **_AROUND_ONE, head_cap="final_logit_softcapping", infix="Text"),
    # one norm over the queries of all heads, so that heads go together or not at all
    Family("olmo2", "Olmo2", (_AS_ONE, mlp(**_POST[1])), config=_HEADS_TOGETHER),
    Family("olmo3", "Olmo3", (_AS_ONE, mlp(**_POST[1])), config=_HEADS_TOGETHER),
)  # fmt: skip
"""Every dense family."""
