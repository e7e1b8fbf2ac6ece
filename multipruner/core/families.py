"""Model families as rows of data: where the parts of a decoder layer are, and how the configuration names them.

A new family is a new row of :data:`FAMILIES` (and a tiny-model fixture in the contract tests), never a branch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .errors import UnsupportedModelError, did_you_mean
from .structure import LayerSize, Structure

Part = str
"""One of ``q k v`` (rows of heads) or ``gate up`` (rows of channels)."""


@dataclass(frozen=True, slots=True)
class InputProjection:
    """A linear module that feeds a block, and the parts stacked along its output dimension, in order."""

    path: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One residual block of a decoder layer: ``x + output(f(inputs(norm(x))))``; paths within the layer.

    Attributes:
        path: the block's module within the decoder layer.
        norm: the norm before it, within the decoder layer.
        inputs: its input projections, within the block's module.
        output: its output projection, within the block's module.
        attributes: attributes of the block's module that depend on its size, as (name, quantity), where a
            quantity is one of ``query_heads kv_heads queries_per_kv query_width channels``.
    """

    path: str
    norm: str
    inputs: tuple[InputProjection, ...]
    output: str
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class ArchitectureSpec:
    """One model family.

    Attributes:
        model_type: ``config.model_type`` of the family.
        prefix: the stock classes are ``{prefix}Config``, ``{prefix}Model``, ``{prefix}ForCausalLM`` ...
        attention, mlp: the two residual blocks of a layer, run in this order.
        decoder: the stack of layers, within the causal language model.
        layers, embeddings, final_norm: within the decoder.
        head: the output projection to the vocabulary, within the causal language model.
        remote_code: whether the family's code travels with the checkpoint (``trust_remote_code``).
        layer_output: ``"tensor"`` or ``"tuple"``: what a decoder layer returns.
    """

    model_type: str
    prefix: str
    attention: BlockSpec
    mlp: BlockSpec
    decoder: str = "model"
    layers: str = "layers"
    embeddings: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    remote_code: bool = False
    layer_output: str = "tensor"

    def block(self, kind: str) -> BlockSpec:
        """The row's attention or MLP block."""
        return self.attention if kind == "attention" else self.mlp


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The numbers of a dense model that a structure does not change."""

    hidden_size: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool


_SPLIT_ATTENTION = BlockSpec(
    path="self_attn",
    norm="input_layernorm",
    inputs=(
        InputProjection("q_proj", ("q",)),
        InputProjection("k_proj", ("k",)),
        InputProjection("v_proj", ("v",)),
    ),
    output="o_proj",
    attributes=(("num_key_value_groups", "queries_per_kv"),),
)
_FUSED_ATTENTION = BlockSpec(
    path="self_attn",
    norm="input_layernorm",
    inputs=(InputProjection("W_pack", ("q", "k", "v")),),
    output="o_proj",
    attributes=(("num_heads", "query_heads"), ("hidden_size", "query_width")),
)
_GATED_MLP = BlockSpec(
    path="mlp",
    norm="post_attention_layernorm",
    inputs=(InputProjection("gate_proj", ("gate",)), InputProjection("up_proj", ("up",))),
    output="down_proj",
    attributes=(("intermediate_size", "channels"),),
)

FAMILIES: dict[str, ArchitectureSpec] = {
    row.model_type: row
    for row in (
        ArchitectureSpec("llama", "Llama", _SPLIT_ATTENTION, _GATED_MLP),
        ArchitectureSpec("mistral", "Mistral", _SPLIT_ATTENTION, _GATED_MLP),
        ArchitectureSpec("qwen2", "Qwen2", _SPLIT_ATTENTION, _GATED_MLP),
        ArchitectureSpec("qwen3", "Qwen3", _SPLIT_ATTENTION, _GATED_MLP),
        ArchitectureSpec("baichuan", "Baichuan", _FUSED_ATTENTION, _GATED_MLP, remote_code=True, layer_output="tuple"),
    )
}
"""The families that can be pruned, by ``config.model_type``."""


def spec_for(config: Any) -> ArchitectureSpec:
    """The row for a model's configuration.

    Raises:
        UnsupportedModelError: naming the supported families, when there is none.
    """
    model_type = getattr(config, "model_type", None) or "?"
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UnsupportedModelError(
        f"model family {model_type!r} is not supported{did_you_mean(model_type, FAMILIES)}; "
        f"supported: {', '.join(sorted(FAMILIES))}. A family is one row in multipruner/core/families.py."
    )


def dimensions(config: Any) -> Dimensions:
    """Read a configuration (dense or pruned) for what no structure changes."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Dimensions(config.hidden_size, head_dim, config.vocab_size, tied)


def dense_structure(config: Any) -> Structure:
    """The structure of a dense model, from its configuration."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return Structure.uniform(config.num_hidden_layers, heads, kv_heads, config.intermediate_size)


def rows_per_part(part: Part, size: LayerSize, head_dim: int) -> int:
    """Output rows that one part of an input projection has in a layer of this size."""
    widths = {"q": size.query_heads * head_dim, "k": size.kv_heads * head_dim, "v": size.kv_heads * head_dim}
    return widths.get(part, size.channels)


def quantity(name: str, size: LayerSize, head_dim: int) -> int:
    """The value of one size-dependent module attribute (see :class:`BlockSpec`)."""
    return {
        "query_heads": size.query_heads,
        "kv_heads": size.kv_heads,
        "queries_per_kv": size.query_heads // max(size.kv_heads, 1),
        "query_width": size.query_heads * head_dim,
        "channels": size.channels,
    }[name]
