"""One family: where the parts of a decoder layer are, and how its configuration says their sizes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from multipruner.core.axes import BLOCK_KINDS, Axis, up_to_last, with_unsaid
from multipruner.core.blocks import BlockSpec
from multipruner.core.errors import ConfigError
from multipruner.core.layout import Layout
from multipruner.core.structure import Size

from .parts import attention, mlp
from .patterns import Listed, Pattern, Wording
from .tasks import CAUSAL_LM, Task

GROUPED_HEADS: dict[str, str] = {
    "hidden_size": "hidden",
    "head_dim": "head_dim",
    "num_attention_heads": "kv_groups * queries",
    "num_key_value_heads": "kv_groups",
    "intermediate_size": "channels",
}
"""How most configurations name sizes: key -> layout."""
_HEADS = ("kv_groups * queries", "queries", "kv_groups", "heads", "4 * kv_groups")
"""What the number of query heads may be."""
ROTATION = "rope_parameters"
"""The key that says which share of a head rotary embeddings turn, where they do not turn all of it."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family.

    Attributes:
        model_type: ``config.model_type`` of the family.
        prefix: the stock classes are ``{prefix}Config``, ``{prefix}Model``, ``{prefix}ForCausalLM`` ...
        infix: what stands between the prefix and ``Config`` and ``Model``.
        task: what its models are for.
        causal_lm, layer: how the names of the whole model, of that task, and of the decoder layer end.
        model: how the name of the class that holds the decoder layers ends.
        blocks: the residual blocks of a layer, in the order in which they run; Llama's where nothing is said.
        config: keys of the configuration that say sizes -> what they are the size of.
        unsaid: a size -> its layout where its key says nothing.
        needs: settings of the configuration -> the values with which the row is right; one that is not there fits.
        others: rows of the same model type for other values.
        depth: the key that says how many decoder layers there are.
        decoder: the stack of layers, within the causal language model.
        layers, embeddings, final_norm: within the decoder.
        head: the output projection to the vocabulary, within the causal language model.
        head_scale: the key of the configuration that its logits are multiplied by (``"* key"``) or divided by
            (``"/ key"``); empty where neither.
        head_cap: the key of the configuration within whose value a tanh keeps the logits; empty where none does.
        embeddings_scaled: whether the embeddings are multiplied by the square root of the hidden size.
        norm_offset: what a norm's parameter is added to before it multiplies: 1 where the parameter of a norm that
            does nothing is 0.
        layer_arguments: what a decoder layer is built from: ``config``, ``number``, in the constructor's order.
        remote_code: whether the family's code travels with the checkpoint (``trust_remote_code``).
        layer_output: what a decoder layer returns: the hidden states as a ``"tensor"``, or in a ``"tuple"`` that holds
            nothing else, or in a ``"pair"`` with its attention.
        ahead: the key that says how many more layers, which predict further tokens, checkpoints hold behind the others;
            stock models have none of them. Empty where there are none.
        beside: how the names begin of such layers' tensors where they stand beside the decoder; empty where none do.
        pattern: which of its layers have which of two kinds of blocks; nothing where all have all of them.
        mixing: likewise, which layers mix tokens by attention and which otherwise.
        wording: how a configuration says sizes in words of its own; nothing where every key means what it says.
        model_settings: what the class that holds the layers is built with beside the configuration.
        part: the configuration within the whole model's that says the sizes and is that of the class which holds the
            layers; empty where there is one for all.
        derived: keys of the configuration that follow from the number of layers, and that no classifier or language
            model reads: what a backbone gives, of which layers.
        any_picture: whether it takes pictures of other sizes than its configuration says: those that the image
            processor makes.
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
    embeddings_scaled: bool = False
    norm_offset: float = 0.0
    infix: str = ""
    causal_lm: str = "ForCausalLM"
    layer: str = "DecoderLayer"
    model: str = "Model"
    unsaid: Mapping[str, str] = field(default_factory=dict, hash=False)
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict, hash=False)
    others: tuple[Family, ...] = ()
    layer_arguments: str = "config, number"
    remote_code: bool = False
    layer_output: str = "tensor"
    ahead: str = ""
    beside: str = ""
    pattern: Pattern | None = None
    mixing: Pattern | Listed | None = None
    wording: Wording | None = None
    task: Task = CAUSAL_LM
    model_settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    part: str = ""
    derived: tuple[str, ...] = ()
    any_picture: bool = False

    def part_of(self, config: Any) -> Any:
        """Return the configuration that says the sizes, of the whole model's: an object's, or of its values."""
        if not self.part:
            return config
        if not isinstance(config, Mapping):
            return getattr(config, self.part)
        own = config.get(self.part)
        return own if isinstance(own, Mapping) else {}

    def fits(self, values: Mapping[str, Any]) -> bool:
        """Tell whether the row is right for a configuration's values."""
        return all(values[key] in allowed for key, allowed in self.needs.items() if key in values)

    @property
    def class_name(self) -> str:
        """The stock class of the whole model."""
        return f"{self.prefix}{self.causal_lm}"

    def leaving(self, block: BlockSpec) -> tuple[str, ...]:
        """Return the norms that leave with a block; one that several share stays as long as their layer does."""
        shared = self.shared_norms
        return tuple(norm for norm in block.norms if norm not in shared)

    @property
    def shared_norms(self) -> tuple[str, ...]:
        """The norms of a layer that more than one of its blocks reads."""
        apart = [set(pattern.kinds) for pattern in self.patterns]
        pairs = (
            (one, other)
            for one, other in combinations(self.blocks, 2)
            if not any({one.kind, other.kind} <= kinds for kinds in apart)
        )
        return tuple(dict.fromkeys(norm for one, other in pairs for norm in one.norms if norm in other.norms))

    @property
    def patterns(self) -> tuple[Pattern | Listed, ...]:
        """What says which layers have which kinds of blocks."""
        return tuple(pattern for pattern in (self.mixing, self.pattern) if pattern is not None)

    def block(self, kind: str) -> BlockSpec:
        """Return the row's block of a kind; it is a ``KeyError`` when there is none."""
        return {block.kind: block for block in self.blocks}[kind]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its blocks, in the order in which they run."""
        return tuple(block.kind for block in self.blocks)

    def routes(self, kinds: Collection[str]) -> bool:
        """Tell whether blocks of experts are among these kinds, such as those that a model of the row has."""
        return any(block.routed for block in self.blocks if block.kind in kinds)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of a configuration that say sizes, and which layer has what."""
        more = (*self.patterns, *((self.wording,) if self.wording else ()))
        return tuple(dict.fromkeys((*self.config, *(key for each in more for key in each.keys))))

    def kinds_in(self, values: Mapping[str, Any], layer: int) -> tuple[str, ...]:
        """Return the kinds of the blocks of a layer, in the order in which they run."""
        missing = {kind for pattern in self.patterns for kind in pattern.kinds if kind != pattern.kind(values, layer)}
        return tuple(kind for kind in self.kinds if kind not in missing)

    def plain(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is to be said in the place of some of a configuration's values; see :class:`Wording`."""
        return self.wording.plain(values) if self.wording else {}

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
        values = {**values, **self.plain(values)}
        said = [(key, Layout(text), values[key]) for key, text in self.config.items() if values.get(key) is not None]
        known: dict[str, int] = {}
        for key, layout, value in sorted(said, key=lambda row: len(row[1].names)):
            unknown = [name for name in layout.names if name not in known]
            known |= dict.fromkeys(unknown, 1)
            if unknown:
                known[unknown[0]] = value // layout.size(known)
            if not layout.names and layout.size(known) != value:
                raise ConfigError(f"{key} = {value}: of {self.model_type} only models with {layout.text} can be pruned")
            if layout.size(known) != value:
                raise ConfigError(f"{key} = {value} is no multiple of the rest of {layout.text} ({known})")
        axes = [axis for kind in self.kinds for axis in BLOCK_KINDS[kind].always]
        said_of = {name for text in self.config.values() for name in Layout(text).names}
        known = {**{axis.name: 1 for axis in axes if axis.within or axis.name not in said_of}, **known}
        known |= {name: Layout(text).size(known) for name, text in self.unsaid.items() if name not in known}
        missing = {"hidden", *(axis.name for axis in axes)} - set(known)
        if missing:
            raise ConfigError(f"the configuration of a {self.model_type} model says nothing of {sorted(missing)}")
        if "head_dim" not in known and {"kv_groups", "queries"} <= set(known):
            heads = Layout(self.config.get(self.heads_keys[0], "kv_groups * queries"))
            if set(heads.names) <= set(known):
                known["head_dim"] = known["hidden"] // max(heads.size(known), 1)
        if not self.further:
            return known
        rotation = values.get(ROTATION)
        share = rotation.get("partial_rotary_factor", 1.0) if isinstance(rotation, Mapping) else 1.0
        return with_unsaid(known, share)

    @property
    def further(self) -> tuple[Axis, ...]:
        """The axes that sizes name only in models that are cut along them, of those that its tensors lie over."""
        names = {n for block in self.blocks for tensor in block.tensors for side in tensor.dims for n in side.names}
        axes = (axis for kind in self.kinds for axis in BLOCK_KINDS[kind].axes)
        return tuple(axis for axis in axes if axis.unsaid and axis.name in names)

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
                each = layout.size(dict.fromkeys(layout.names, 1))  # a number in it
                parts = [f"{config}.{key}", *rest, *([str(each)] if each > 1 else [])]
                known[name] = " // ".join(parts) if name == unknown[0] else "1"
        axes = (axis.name for kind in self.kinds for axis in BLOCK_KINDS[kind].always)
        return {**{name: "1" for name in axes if name not in known}, **known}

    def numbers(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Return what the configuration's keys say of a layer that has so much of every axis; 0 where it has none.

        Keys of axes that are not named, as of experts where the layer is one without, say nothing of it.
        """
        layouts = {key: Layout(text) for key, text in self.config.items()}
        return {
            key: layout.size(counts) for key, layout in layouts.items() if layout.axes and layout.axes <= set(counts)
        }

    def stream_side(self, name: str) -> int | None:
        """Return the side of a tensor outside the decoder layers along which the residual stream lies, if one does."""
        sides = {f"{self.decoder}.{self.embeddings}.weight": 1, f"{self.head}.weight": 1}
        return 0 if name.rpartition(".")[0] == f"{self.decoder}.{self.final_norm}" else sides.get(name)

    @property
    def heads_keys(self) -> tuple[str, str]:
        """The configuration's keys for query heads and KV heads: the same where it has one for both."""
        heads = next(filter(None, map(self.key, _HEADS)), "")
        return heads, self.key("kv_groups") or self.key("groups") or heads

    def sizes(self, values: Mapping[str, Any], layer: int = 0, along: Collection[str] = ()) -> dict[str, Size]:
        """Return the sizes of a whole layer's blocks by their kinds, from a configuration's values; see
        :meth:`counts`.

        Args:
            values: of the configuration.
            layer: which one.
            along: the axes that sizes name besides those that every size does.
        """
        counts = self.counts(values)
        along = up_to_last(along)
        named = {
            kind: [axis.name for axis in BLOCK_KINDS[kind].axes if not axis.unsaid or axis.name in along]
            for kind in self.kinds_in(values, layer)
        }
        return {kind: tuple(counts[name] for name in names) for kind, names in named.items()}
