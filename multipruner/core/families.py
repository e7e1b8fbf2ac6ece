"""Model families as rows of data: where the parts of a decoder layer are, how they lie over its axes, and how the
configuration names them.

A new family is a new row of :data:`FAMILIES` (and a tiny-model fixture in the contract tests), never a branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .axes import AXES, BLOCK_KINDS
from .blocks import BlockSpec, linear
from .errors import ConfigError, UnsupportedModelError, did_you_mean
from .layout import Layout
from .structure import Anatomy, Size

_HEADS, _GROUPS = "kv_groups * queries * head_dim", "kv_groups * head_dim"
_TOGETHER = ("kv_groups * heads * head_dim", "kv_groups * groups * head_dim")
"""Queries and keys of attention whose heads are one unit."""
Attributes = tuple[tuple[str, Layout], ...]
_GROUPED: Attributes = (("num_key_value_groups", Layout("queries")),)


def attention(
    heads: str = _HEADS, groups: str = _GROUPS, *, fused: str = "", attributes: Attributes = _GROUPED, **rest: Any
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
        infix: what stands between the prefix and ``Config`` and ``Model``.
        blocks: the residual blocks of a layer, in the order in which they run; Llama's where nothing is said.
        config: keys of the configuration that say sizes -> what they are the size of.
        depth: the key that says how many decoder layers there are.
        decoder: the stack of layers, within the causal language model.
        layers, embeddings, final_norm: within the decoder.
        head: the output projection to the vocabulary, within the causal language model.
        head_scale: the key of the configuration that its logits are multiplied by (``"* key"``) or divided by
            (``"/ key"``); empty where neither.
        head_cap: the key of the configuration within whose value a tanh keeps the logits; empty where none does.
        norm_offset: what a norm's parameter is added to before it multiplies: 1 where the parameter of a norm that
            does nothing is 0.
        layer_arguments: what a decoder layer is built from: ``config``, ``number``, in the constructor's order.
        remote_code: whether the family's code travels with the checkpoint (``trust_remote_code``).
        layer_output: ``"tensor"`` or ``"tuple"``: what a decoder layer returns.
    """

    model_type: str
    prefix: str
    blocks: tuple[BlockSpec, ...] = (attention(), mlp())
    config: Mapping[str, str] = field(default_factory=lambda: GROUPED_HEADS, hash=False)
    depth: str = "num_hidden_layers"
    decoder: str = "model"
    layers: str = "layers"
    embeddings: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    head_scale: str = ""
    head_cap: str = ""
    norm_offset: float = 0.0
    infix: str = ""
    layer_arguments: str = "config, number"
    remote_code: bool = False
    layer_output: str = "tensor"

    def block(self, kind: str) -> BlockSpec:
        """Return the row's block of a kind; it is a ``KeyError`` when there is none."""
        return {block.kind: block for block in self.blocks}[kind]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its blocks, in the order in which they run."""
        return tuple(block.kind for block in self.blocks)

    def logit_scale(self, config: Any) -> float:
        """Return what the head's output is multiplied by."""
        sign, _, key = self.head_scale.partition(" ")
        value = getattr(config, key) if key else 1.0
        return 1.0 / value if sign == "/" else value

    def key(self, name: str) -> str | None:
        """Return the configuration's key for a constant or an axis, where it has one of its own."""
        return next((key for key, text in self.config.items() if text == name), None)

    def counts(self, values: Mapping[str, Any]) -> dict[str, int]:
        """Read sizes from a configuration's values: of one layer, and what is the same in all of them.

        An axis that no key says holds one unit; heads that no key says how wide they are share the hidden size.

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
        said_of = {name for text in self.config.values() for name in Layout(text).names}
        known = {**{axis.name: 1 for axis in axes if axis.within or axis.name not in said_of}, **known}
        missing = {"hidden", *(axis.name for axis in axes)} - set(known)
        if missing:
            raise ConfigError(f"the configuration of a {self.model_type} model says nothing of {sorted(missing)}")
        if "head_dim" not in known and {"kv_groups", "queries"} <= set(known):
            known["head_dim"] = known["hidden"] // max(known["kv_groups"] * known["queries"], 1)
        return known

    def reading(self, config: str) -> dict[str, str]:
        """Return the Python expression of every size that :meth:`counts` reads, of a configuration object of this
        name.
        """
        said = sorted(((key, Layout(text)) for key, text in self.config.items()), key=lambda row: len(row[1].names))
        known: dict[str, str] = {}
        for key, layout in said:
            unknown = [name for name in layout.names if name not in known]
            rest = [name for name in layout.names if name in known]
            for name in unknown:
                known[name] = " // ".join([f"{config}.{key}", *rest]) if name == unknown[0] else "1"
        inner = (axis.name for kind in self.kinds for axis in BLOCK_KINDS[kind].axes if axis.within)
        return {**{name: "1" for name in inner if name not in known}, **known}

    def numbers(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return what the configuration's keys say of a layer that has so much of every axis; 0 where it has none."""
        layouts = {key: Layout(text) for key, text in self.config.items()}
        return {key: layout.size(counts) for key, layout in layouts.items() if layout.axes}

    @property
    def heads_keys(self) -> tuple[str, str]:
        """The configuration's keys for query heads and KV heads: the same where it has one for both."""
        heads = self.key("kv_groups * queries") or self.key("kv_groups") or self.key("heads") or ""
        return heads, self.key("kv_groups") or self.key("groups") or heads

    def sizes(self, values: Mapping[str, Any]) -> dict[str, Size]:
        """Return the sizes of a whole layer's blocks by their kinds, from a configuration's values; see
        :meth:`counts`.
        """
        counts = self.counts(values)
        return {kind: tuple(counts[name] for name in BLOCK_KINDS[kind].names) for kind in self.kinds}


_GROUPS_UNSAID = {key: text for key, text in GROUPED_HEADS.items() if key != "num_key_value_heads"}
_HEADS_TOGETHER = {**GROUPED_HEADS, "num_attention_heads": "heads", "num_key_value_heads": "groups"}
_POST: tuple[dict[str, Any], dict[str, Any]] = (
    {"before": "", "after": "post_attention_layernorm"},
    {"before": "", "after": "post_feedforward_layernorm"},
)
_AS_ONE = attention(*_TOGETHER, attributes=(), **_POST[0])
_FOUR_NORMS = (
    attention(after="post_attention_layernorm"),
    mlp(before="pre_feedforward_layernorm", after="post_feedforward_layernorm"),
)
_RESIDUAL: dict[str, Any] = {"gain": "residual_multiplier"}

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
            (
                attention(
                    fused="W_pack",
                    attributes=(("num_heads", Layout("kv_groups * queries")), ("hidden_size", Layout(_HEADS))),
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
        Family("gemma", "Gemma", norm_offset=1.0),
        Family("gemma2", "Gemma2", _FOUR_NORMS, norm_offset=1.0, head_cap="final_logit_softcapping"),
        Family("gemma3_text", "Gemma3", _FOUR_NORMS, norm_offset=1.0, head_cap="final_logit_softcapping", infix="Text"),
        # one norm over the queries of all heads, so that heads go together or not at all
        Family("olmo2", "Olmo2", (_AS_ONE, mlp(**_POST[1])), config=_HEADS_TOGETHER),
        Family("olmo3", "Olmo3", (_AS_ONE, mlp(**_POST[1])), config=_HEADS_TOGETHER),
    )
}  # fmt: skip
"""The families that can be pruned, by ``config.model_type``."""


def spec_for(config: Any) -> Family:
    """Return the row for a model's configuration.

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


def constants_of(config: Any) -> dict[str, int]:
    """Read a dense model's configuration for the numbers that no structure changes, by their names in layouts."""
    counts = spec_for(config).counts(_values(config))
    return {name: count for name, count in counts.items() if name not in AXES}


def anatomy_of(config: Any) -> Anatomy:
    """Return the residual blocks of a dense model, from its configuration."""
    family, constants = spec_for(config), constants_of(config)
    return Anatomy.uniform(getattr(config, family.depth), family.sizes(_values(config)), constants)


def _values(config: Any) -> dict[str, Any]:
    return {key: getattr(config, key, None) for key in spec_for(config).config}
