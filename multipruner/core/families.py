"""Model families as rows of data: where the parts of a decoder layer are, how they lie over its axes, and how the
configuration names them.

A new family is a new row of :data:`FAMILIES` (and a tiny-model fixture in the contract tests), never a branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .axes import BLOCK_KINDS
from .blocks import BlockSpec, linear
from .errors import ConfigError, UnsupportedModelError, did_you_mean
from .layout import Layout
from .structure import Anatomy, Size

_HEADS, _GROUPS = "kv_groups * queries * head_dim", "kv_groups * head_dim"
_ATTENDING: dict[str, Any] = {
    "arguments": True,
    "cached": (Layout(_GROUPS), Layout(_GROUPS)),
    "scores": (Layout(_HEADS), Layout(_HEADS)),
    "cache": "layer_idx",
}
"""What all softmax attention has in common: keys and values are kept, queries are multiplied with both."""
_SPLIT_ATTENTION = BlockSpec(
    kind="attention",
    path="self_attn",
    norms=("input_layernorm",),
    tensors=(
        *linear("q_proj", _HEADS, "hidden"),
        *linear("k_proj", _GROUPS, "hidden"),
        *linear("v_proj", _GROUPS, "hidden"),
        *linear("o_proj", "hidden", _HEADS),
    ),
    output="o_proj",
    attributes=(("num_key_value_groups", Layout("queries")),),
    **_ATTENDING,
)
_GATED_MLP = BlockSpec(
    kind="mlp",
    path="mlp",
    norms=("post_attention_layernorm",),
    tensors=(
        *linear("gate_proj", "channels", "hidden"),
        *linear("up_proj", "channels", "hidden"),
        *linear("down_proj", "hidden", "channels"),
    ),
    output="down_proj",
    attributes=(("intermediate_size", Layout("channels")),),
)
GROUPED_HEADS: dict[str, str] = {
    "hidden_size": "hidden",
    "head_dim": "head_dim",
    "num_attention_heads": "kv_groups * queries",
    "num_key_value_heads": "kv_groups",
    "intermediate_size": "channels",
}
"""How most configurations name sizes: key -> layout."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Attributes:
        model_type: ``config.model_type`` of the family.
        prefix: the stock classes are ``{prefix}Config``, ``{prefix}Model``, ``{prefix}ForCausalLM`` ...
        blocks: the residual blocks of a layer, in the order in which they run; Llama's where nothing is said.
        config: keys of the configuration that say sizes -> what they are the size of.
        depth: the key that says how many decoder layers there are.
        decoder: the stack of layers, within the causal language model.
        layers, embeddings, final_norm: within the decoder.
        head: the output projection to the vocabulary, within the causal language model.
        layer_arguments: what a decoder layer is built from: ``config``, ``number``, in the constructor's order.
        remote_code: whether the family's code travels with the checkpoint (``trust_remote_code``).
        layer_output: ``"tensor"`` or ``"tuple"``: what a decoder layer returns.
    """

    model_type: str
    prefix: str
    blocks: tuple[BlockSpec, ...] = (_SPLIT_ATTENTION, _GATED_MLP)
    config: Mapping[str, str] = field(default_factory=lambda: GROUPED_HEADS, hash=False)
    depth: str = "num_hidden_layers"
    decoder: str = "model"
    layers: str = "layers"
    embeddings: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    layer_arguments: str = "config, number"
    remote_code: bool = False
    layer_output: str = "tensor"

    def block(self, kind: str) -> BlockSpec:
        """The row's block of a kind.

        Raises:
            KeyError: when it has none.
        """
        return {block.kind: block for block in self.blocks}[kind]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its blocks, in the order in which they run."""
        return tuple(block.kind for block in self.blocks)

    def key(self, name: str) -> str | None:
        """The configuration's key for a constant or an axis, where it has one of its own."""
        return next((key for key, text in self.config.items() if text == name), None)

    def counts(self, values: Mapping[str, Any]) -> dict[str, int]:
        """Read sizes from a configuration's values: of one layer, and what is the same in all of them.

        An axis within another one that no key says holds one unit; a head is as wide as the heads share the hidden
        size where no key says it.

        Raises:
            ConfigError: when a size is missing, or sizes contradict each other.
        """
        said = [(key, Layout(text), values[key]) for key, text in self.config.items() if values.get(key) is not None]
        known: dict[str, int] = {}
        for key, layout, value in sorted(said, key=lambda row: len(row[1].names)):
            unknown = [name for name in layout.names if name not in known]
            known |= dict.fromkeys(unknown, 1)
            if unknown:
                known[unknown[0]] = value // layout.size(known)
            if layout.size(known) != value:
                raise ConfigError(f"{key} = {value} is no multiple of the rest of {layout.text} ({known})")
        axes = [axis for kind in self.kinds for axis in BLOCK_KINDS[kind].axes]
        known = {**{axis.name: 1 for axis in axes if axis.within}, **known}
        missing = {"hidden", *(axis.name for axis in axes)} - set(known)
        if missing:
            raise ConfigError(f"the configuration of a {self.model_type} model says nothing of {sorted(missing)}")
        if "head_dim" not in known and {"kv_groups", "queries"} <= set(known):
            known["head_dim"] = known["hidden"] // max(known["kv_groups"] * known["queries"], 1)
        return known

    def reading(self, config: str) -> dict[str, str]:
        """The Python expression of every size that :meth:`counts` reads, of a configuration object of this name."""
        said = sorted(((key, Layout(text)) for key, text in self.config.items()), key=lambda row: len(row[1].names))
        known: dict[str, str] = {}
        for key, layout in said:
            unknown = [name for name in layout.names if name not in known]
            rest = [name for name in layout.names if name in known]
            for name in unknown:
                known[name] = " // ".join([f"{config}.{key}", *rest]) if name == unknown[0] else "1"
        return {**{axis.name: "1" for kind in self.kinds for axis in BLOCK_KINDS[kind].axes if axis.within}, **known}

    @property
    def heads_keys(self) -> tuple[str, str]:
        """The configuration's keys for query heads and KV heads: the same where it has one for both."""
        heads = self.key("kv_groups * queries") or self.key("kv_groups") or ""
        return heads, self.key("kv_groups") or heads

    def sizes(self, values: Mapping[str, Any]) -> dict[str, Size]:
        """The sizes of a whole layer's blocks by their kinds, from a configuration's values; see :meth:`counts`."""
        counts = self.counts(values)
        return {kind: tuple(counts[name] for name in BLOCK_KINDS[kind].names) for kind in self.kinds}


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The numbers of a dense model that a structure does not change."""

    hidden_size: int
    head_dim: int
    vocab_size: int
    tied_embeddings: bool

    @property
    def constants(self) -> dict[str, int]:
        """By their names in layouts."""
        return {"hidden": self.hidden_size, "head_dim": self.head_dim}


_STACKED_ATTENTION = BlockSpec(
    kind="attention",
    path="self_attn",
    norms=("input_layernorm",),
    tensors=(*linear("W_pack", f"{_HEADS} + {_GROUPS} + {_GROUPS}", "hidden"), *linear("o_proj", "hidden", _HEADS)),
    output="o_proj",
    attributes=(("num_heads", Layout("kv_groups * queries")), ("hidden_size", Layout(_HEADS))),
    resized=True,
    **_ATTENDING,
)

FAMILIES: dict[str, Family] = {
    row.model_type: row
    for row in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3"),
        Family(
            "baichuan",
            "Baichuan",
            (_STACKED_ATTENTION, _GATED_MLP),
            config={key: text for key, text in GROUPED_HEADS.items() if key != "num_key_value_heads"},
            layer_arguments="config",
            remote_code=True,
            layer_output="tuple",
        ),
    )
}
"""The families that can be pruned, by ``config.model_type``."""


def spec_for(config: Any) -> Family:
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
    """Read a dense model's configuration for what no structure changes."""
    counts = spec_for(config).counts(_values(config))
    tied = bool(getattr(config, "tie_word_embeddings", False))
    return Dimensions(counts["hidden"], counts["head_dim"], config.vocab_size, tied)


def anatomy_of(config: Any) -> Anatomy:
    """The residual blocks of a dense model, from its configuration."""
    family, constants = spec_for(config), dimensions(config).constants
    return Anatomy.uniform(getattr(config, family.depth), family.sizes(_values(config)), constants)


def _values(config: Any) -> dict[str, Any]:
    return {key: getattr(config, key, None) for key in spec_for(config).config}
