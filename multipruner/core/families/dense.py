"""The rows of dense families: softmax attention and an MLP, one after the other or side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multipruner.core.blocks import BlockSpec, TensorSpec, conv1d
from multipruner.core.layout import Layout

from .family import GROUPED_HEADS, Family
from .parts import GROUPS, HEADS, INTERLEAVED, NEIGHBOURS, SINKS, STACKED, TOGETHER, attention, mlp
from .patterns import Wording

_GROUPS_UNSAID = {key: text for key, text in GROUPED_HEADS.items() if key != "num_key_value_heads"}
_HEADS_TOGETHER = {**GROUPED_HEADS, "num_attention_heads": "heads", "num_key_value_heads": "groups"}
_POST: tuple[dict[str, Any], dict[str, Any]] = (
    {"before": "", "after": "post_attention_layernorm"},
    {"before": "", "after": "post_feedforward_layernorm"},
)
_AS_ONE = attention(*TOGETHER, attributes=(), **_POST[0])
_NORMED: dict[str, Any] = {"rotated": ""}
"""A norm between the projections of queries and keys and their rotation."""
_BESIDE_EACH_OTHER: dict[str, Any] = {"rotated": NEIGHBOURS}
_MLP_OF_FOUR = mlp(before="pre_feedforward_layernorm", after="post_feedforward_layernorm")
_FOUR_NORMS = (attention(after="post_attention_layernorm"), _MLP_OF_FOUR)
_BESIDE: dict[str, Any] = {"before": "input_layernorm", "parallel": True}
_NORM_BY_HEAD = tuple(
    TensorSpec(f"{name}.weight", (Layout(heads), Layout("head_dim")))
    for name, heads in (("q_norm", "kv_groups * queries"), ("k_norm", "kv_groups"))
)
_PHI_MLP = mlp("fc1", output="fc2", **_BESIDE)
_STABLELM = attention(resized=True, attributes=(
    ("num_heads", Layout("kv_groups * queries")), ("num_key_value_heads", Layout("kv_groups")),
    ("num_key_value_groups", Layout("queries"))))  # fmt: skip
_GPT2_NAMES: dict[str, Any] = {
    "config": {"n_embd": "hidden", "n_head": "kv_groups", "n_inner": "channels"},
    "unsaid": {"channels": "4 * hidden"}, "depth": "n_layer", "decoder": "transformer", "layers": "h",
    "embeddings": "wte", "final_norm": "ln_f", "layer": "Block",
}  # fmt: skip
_NEOX_NAMES: dict[str, Any] = {
    "config": {"hidden_size": "hidden", "num_attention_heads": "kv_groups", "intermediate_size": "channels"},
    "decoder": "gpt_neox", "embeddings": "embed_in", "final_norm": "final_layer_norm", "layer": "Layer",
}  # fmt: skip
_FALCON_NAMES: dict[str, Any] = {
    "decoder": "transformer", "layers": "h", "embeddings": "word_embeddings", "final_norm": "ln_f",
    "layer_output": "tuple", "unsaid": {"channels": "4 * hidden"},
}  # fmt: skip
_FALCON_HEADS = {"hidden_size": "hidden", "num_attention_heads": "queries", "ffn_hidden_size": "channels"}
_FALCON_GROUPED = {**_FALCON_HEADS, "num_attention_heads": "kv_groups * queries", "num_kv_heads": "kv_groups"}
_FALCON = {"alibi": (False,), "parallel_attn": (True,)}
_ALL_HEADS = "heads * head_dim"
_QUARTERS = f"4 * {GROUPS}"
_RESIDUAL: dict[str, Any] = {"gain": "residual_multiplier"}
_AROUND_ONE: dict[str, Any] = {"norm_offset": 1.0, "embeddings_scaled": True}
_BART = (
    attention(HEADS, GROUPS, output="out_proj", before="self_attn_layer_norm", resized=True,
              attributes=(("num_heads", Layout("kv_groups")), ("embed_dim", Layout(GROUPS)))),
    mlp("fc1", output="fc2", before="final_layer_norm", steps=("fc1", "activation_fn", "fc2")),
)  # fmt: skip
_BART_SIZES = {"hidden_size": "hidden", "num_attention_heads": "kv_groups"}


def _neox(*, parallel: bool) -> tuple[BlockSpec, BlockSpec]:
    return (
        attention(path="attention", inputs=("query_key_value",), fused=INTERLEAVED, output="dense", attributes=(),
                  resized=True),
        mlp("dense_h_to_4h", output="dense_4h_to_h", parallel=parallel),
    )  # fmt: skip


def _one_by_one(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return layer by layer what a configuration says in repeats: which attend to all and which locally."""
    layers = values.get("attention_layers")
    return {"attention_types": [[[word], 1] for word in layers]} if layers else {}


def _four_times(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the width of an MLP for which a configuration has no word."""
    return {} if values.get("intermediate_size") else {"intermediate_size": 4 * values["hidden_size"]}


def _stablelm(parallel: bool) -> dict[str, tuple[Any, ...]]:
    return {"qk_layernorm": (False,), "use_parallel_residual": (parallel,)}


def _falcon(first: str, second: str = "", *, grouped: bool = True) -> tuple[BlockSpec, BlockSpec]:
    """Return blocks side by side on one norm or two; all queries share one key and value unless they are grouped."""
    counts = [("num_heads", Layout("kv_groups * queries")), ("num_kv_heads", Layout("kv_groups"))]
    kept = Layout(HEADS if grouped else GROUPS)  # keys and values of groups are repeated before they are kept
    return (
        attention(path="self_attention", inputs=("query_key_value",), fused="kv_groups * (queries + 2) * head_dim",
                  output="dense", before=first, attributes=tuple(counts), cached=(kept, kept), resized=True),
        mlp("dense_h_to_4h", output="dense_4h_to_h", before=second or first, parallel=True, added_to=True),
    )  # fmt: skip


DENSE: tuple[Family, ...] = (
    Family("llama", "Llama"),
    Family("mistral", "Mistral"),
    Family("qwen2", "Qwen2"),
    Family("qwen3", "Qwen3", (attention(**_NORMED), mlp())),
    Family(
        "baichuan",
        "Baichuan",
        (
            attention(
                inputs=("W_pack",),
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
    Family("ernie4_5", "Ernie4_5", (attention(**_BESIDE_EACH_OTHER), mlp())),
    Family("hunyuan_v1_dense", "HunYuanDenseV1", (attention(**_NORMED), mlp())),
    Family("ministral", "Ministral"),
    Family("ministral3", "Ministral3"),
    Family("olmo", "Olmo", (attention(turned=False), mlp())),  # its values may be clipped
    Family("seed_oss", "SeedOss"),
    Family("smollm3", "SmolLM3"),
    Family("helium", "Helium", (attention(resized=True), mlp())),
    # an MLP of two matrices, or of other names
    Family("arcee", "Arcee", (attention(), mlp("up_proj"))),
    Family("nemotron", "Nemotron", (attention(), mlp("up_proj")), norm_offset=1.0),
    Family("jais2", "Jais2", (attention(), mlp("up_proj"))),
    Family("nanochat", "NanoChat", (attention(**_NORMED), mlp("fc1", output="fc2")),
           head_cap="final_logit_softcapping"),
    Family("starcoder2", "Starcoder2", (attention(), mlp("c_fc", output="c_proj"))),
    Family("apertus", "Apertus", (attention(before="attention_layernorm", **_NORMED),
                                  mlp("up_proj", before="feedforward_layernorm"))),
    Family("glm", "Glm", (attention(**_BESIDE_EACH_OTHER), mlp("gate_up_proj", rows="channels + channels"))),
    # multipliers
    Family("granite", "Granite", (attention(**_RESIDUAL), mlp(**_RESIDUAL)), head_scale="/ logits_scaling"),
    Family("granite_swa", "GraniteSWA", (attention(more=SINKS, **_RESIDUAL), mlp(**_RESIDUAL)),
           head_scale="/ logits_scaling"),
    Family("hyperclovax", "HyperCLOVAX", (attention(after="post_norm1", **_RESIDUAL),
                                          mlp(after="post_norm2", **_RESIDUAL)), head_scale="* logits_scaling"),
    # norms after the blocks, or on both sides
    Family("exaone4", "Exaone4", (attention(**_POST[0], **_NORMED), mlp(**_POST[1]))),
    Family("glm4", "Glm4", (attention(after="post_self_attn_layernorm", **_BESIDE_EACH_OTHER),
                            mlp("gate_up_proj", rows="channels + channels", after="post_mlp_layernorm"))),
    Family("gemma", "Gemma", **_AROUND_ONE),
    Family("vaultgemma", "VaultGemma", (attention(), mlp(before="pre_feedforward_layernorm")), **_AROUND_ONE,
           head_cap="final_logit_softcapping"),
    Family("gemma2", "Gemma2", _FOUR_NORMS, **_AROUND_ONE, head_cap="final_logit_softcapping"),
    Family("gemma3_text", "Gemma3", (attention(after="post_attention_layernorm", **_NORMED), _MLP_OF_FOUR),
           **_AROUND_ONE, head_cap="final_logit_softcapping", infix="Text"),
    # one norm over the queries of all heads, so that heads go together or not at all
    Family("olmo2", "Olmo2", (_AS_ONE, mlp(**_POST[1])), config=_HEADS_TOGETHER),
    Family("olmo3", "Olmo3", (_AS_ONE, mlp(**_POST[1])), config=_HEADS_TOGETHER),
    # queries, keys and values in one matrix; the code asks the configuration how many heads there are
    Family("phi3", "Phi3", (
        attention(inputs=("qkv_proj",), attributes=(
            ("num_key_value_groups", Layout("queries")), ("num_key_value_heads", Layout("kv_groups")),
            ("config.num_attention_heads", Layout("kv_groups * queries")))),
        mlp("gate_up_proj", rows="channels + channels"),
    )),
    Family("persimmon", "Persimmon", (
        attention(inputs=("query_key_value",), fused=INTERLEAVED, output="dense", resized=True,
                  attributes=(("num_heads", Layout("kv_groups")),)),
        mlp("dense_h_to_4h", output="dense_4h_to_h"),
    ), config=_NEOX_NAMES["config"], final_norm="final_layernorm"),
    # side by side, most on one norm
    Family("cohere", "Cohere", (attention(more=_NORM_BY_HEAD, **_NORMED), mlp(**_BESIDE)), head_scale="* logit_scale"),
    Family("cohere2", "Cohere2", (attention(**_BESIDE_EACH_OTHER), mlp(**_BESIDE)), head_scale="* logit_scale"),
    Family("phi", "Phi", (attention(output="dense"), _PHI_MLP), needs={"qk_layernorm": (False,)}, others=(
        Family("phi", "Phi", (attention(output="dense", resized=True), _PHI_MLP), final_norm="final_layernorm"),),
        final_norm="final_layernorm"),
    Family("gptj", "GPTJ", (
        attention(path="attn", before="ln_1", output="out_proj", resized=True,
                  attributes=(("num_attention_heads", Layout("kv_groups")),)),
        mlp("fc_in", output="fc_out", before="ln_1", parallel=True),
    ), layer_output="tuple", **_GPT2_NAMES),
    Family("codegen", "CodeGen", (  # heads lie in four parts of one matrix, so that one of each leaves
        attention(_QUARTERS, _QUARTERS, path="attn", before="ln_1", inputs=("qkv_proj",), fused=f"4 * ({STACKED})",
                  output="out_proj", resized=True, attributes=(("num_attention_heads", Layout("4 * kv_groups")),)),
        mlp("fc_in", output="fc_out", before="ln_1", parallel=True),
    ), layer_output="pair", **{**_GPT2_NAMES, "config": {**_GPT2_NAMES["config"], "n_head": "4 * kv_groups"}}),
    Family("gpt_neox", "GPTNeoX", _neox(parallel=True), needs={"use_parallel_residual": (True,)}, others=(
        Family("gpt_neox", "GPTNeoX", _neox(parallel=False), needs={"use_parallel_residual": (False,)}, **_NEOX_NAMES),
    ), **_NEOX_NAMES),
    Family("stablelm", "StableLm", (_STABLELM, mlp()), needs=_stablelm(False), others=(
        Family("stablelm", "StableLm", (_STABLELM, mlp(**_BESIDE)), needs=_stablelm(True)),)),
    Family("falcon", "Falcon", _falcon("input_layernorm", grouped=False), others=(
        Family("falcon", "Falcon", _falcon("ln_attn", "ln_mlp"), **_FALCON_NAMES, config=_FALCON_GROUPED, needs={
            **_FALCON, "new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (2, None)}),
        Family("falcon", "Falcon", _falcon("input_layernorm"), **_FALCON_NAMES, config=_FALCON_GROUPED, needs={
            **_FALCON, "new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (1,)}),
    ), **_FALCON_NAMES, config=_FALCON_HEADS, needs={
        **_FALCON, "new_decoder_architecture": (False,), "multi_query": (True,)}),
    # an MLP that is no module, learned positions
    Family("opt", "OPT", _BART, config={**_BART_SIZES, "ffn_dim": "channels"}, decoder="model.decoder", model="Decoder",
           final_norm="final_layer_norm", needs={
               "do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,)}),
    Family("biogpt", "BioGpt", _BART, config={**_BART_SIZES, "intermediate_size": "channels"}, decoder="biogpt",
           final_norm="layer_norm", head="output_projection"),
    Family("xglm", "XGLM", _BART, config={"d_model": "hidden", "attention_heads": "kv_groups", "ffn_dim": "channels"},
           depth="num_layers", final_norm="layer_norm", needs={"add_cross_attention": (False,)}),
    Family("gpt_neo", "GPTNeo", (
        attention(path="attn.attention", before="ln_1", output="out_proj", cache="layer_id", resized=True,
                  attributes=(("num_heads", Layout("kv_groups")),)),
        mlp("c_fc", output="c_proj", before="ln_2"),
    ), layer_output="pair", wording=Wording(("attention_layers",), _one_by_one), **{
        **_GPT2_NAMES, "depth": "num_layers",
        "config": {"hidden_size": "hidden", "num_heads": "kv_groups", "intermediate_size": "channels"}}),
    # heads together, as slopes of positions follow from their number (ALiBi); blocks that add to the stream themselves
    Family("bloom", "Bloom", (
        attention(*(f"kv_groups * {_ALL_HEADS}",) * 2, path="self_attention", inputs=("query_key_value",),
                  fused=f"kv_groups * 3 * {_ALL_HEADS}", output="dense", attributes=(), handed=True),
        mlp("dense_h_to_4h", output="dense_4h_to_h", handed=True, resized=True),
    ), config={"hidden_size": "hidden", "n_head": "heads", "intermediate_size": "channels"}, depth="n_layer",
        decoder="transformer", layers="h", embeddings="word_embeddings", final_norm="ln_f", layer="Block",
        layer_output="pair", wording=Wording(("intermediate_size", "hidden_size"), _four_times), needs={
            "apply_residual_connection_post_layernorm": (False,), "slow_but_exact": (False,)}),
    # transposed matrices, learned positions
    Family("gpt2", "GPT2", (
        attention(path="attn", before="ln_1", inputs=("c_attn",), fused=STACKED, output="c_proj", matrix=conv1d,
                  resized=True,
                  attributes=(("num_heads", Layout("kv_groups")), ("split_size", Layout("kv_groups * head_dim")))),
        mlp("c_fc", output="c_proj", before="ln_2", matrix=conv1d),
    ), causal_lm="LMHeadModel", needs={
        "add_cross_attention": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),  # layers that stay get other numbers
    }, **_GPT2_NAMES),
    Family("gpt_bigcode", "GPTBigCode", (
        attention(path="attn", before="ln_1", inputs=("c_attn",), output="c_proj", resized=True, attributes=(
            ("num_heads", Layout("queries")), ("embed_dim", Layout("queries * head_dim")),
            ("num_key_value_groups", Layout("queries")))),
        mlp("c_fc", output="c_proj", before="ln_2"),
    ), needs={"multi_query": (True,)}, **{**_GPT2_NAMES, "config": {**_GPT2_NAMES["config"], "n_head": "queries"}}),
)  # fmt: skip
"""Every dense family."""
_PER_LAYER = (
    "their layers read the keys and values of earlier layers (num_kv_shared_layers) and an input of their own each "
    "(hidden_size_per_layer_input), so that no block can leave without others"
)
_SLOPES = (
    "their attention itself works out the slopes of positions from how many heads there are (ALiBi), so that those "
    "that stay would get other slopes"
)
REFUSED: dict[str, str] = {
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), _PER_LAYER),
    "mpt": _SLOPES,
}  # fmt: skip
"""Model types that no row can describe, and why."""
