"""A pruned Llama: the stock decoder layers, each with its own number of heads and channels, or without a block.

Written by multipruner (https://pypi.org/project/multipruner); needs torch and transformers>=5.14, nothing else.
Sizes come from ``per_layer_config`` in config.json; every forward pass is transformers' own.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import transformers.configuration_utils as known

if not hasattr(getattr(known, "PreTrainedConfig", None), "per_layer_config"):  # before what older ones do not have
    raise ImportError("this model needs transformers>=5.14 (per_layer_config): pip install -U transformers")

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# family: begin
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel

DECODER, LAYERS, DEPTH, PART = "model", "layers", "num_hidden_layers", ""
BLOCKS = {"attention": ("self_attn", ("input_layernorm",)), "mlp": ("mlp", ("post_attention_layernorm",))}
CACHE_SLOTS = {"attention": "layer_idx"}
SETTINGS: dict[str, tuple[str, ...]] = {}
VALUES: tuple[str, ...] = ("self_attn.v_proj", "self_attn.o_proj")
ROTATED, NEIGHBOURS = ("self_attn.q_proj", "self_attn.k_proj"), False
MODEL_SETTINGS: dict[str, Any] = {}
ADDED_TO, PAIRED, HANDED = False, False, False
HEADS, KV_HEADS = "num_attention_heads", "num_key_value_heads"


def stock_layer(config: Any, number: int, dense: dict[str, Any]) -> Any:
    """Return the stock decoder layer of one layer's configuration; ``dense`` holds the dense model's."""
    return LlamaDecoderLayer(config, number)


# family: end


class NoHeads(nn.Module):
    """Stands where an attention block was removed and adds nothing to the residual stream.

    (From "Attention" in a class's name here, transformers would conclude that implementations cannot be switched.)
    vLLM wants one attention for every layer, and tells what is one by these attributes and by reading ``forward``.
    """

    is_causal = True

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, number

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        if hidden_states is None:  # never: it is there to be read
            interface: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
            return interface(self, *args, **kwargs)
        return args[0] if HANDED else hidden_states.new_zeros(1), None


class NoMLP(nn.Module):
    """Stands where an MLP, experts or a mixer of tokens were removed and adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        nothing = args[0] if HANDED else hidden_states.new_zeros(hidden_states.shape if ADDED_TO else 1)
        return (nothing, None) if PAIRED else nothing


class Placed(nn.Module):
    """Gives what is left of every head in its place, and zeros for what has left.

    What is between it and the output projection is transformers' own, and knows heads of one width. It is no
    ``nn.Linear``: other programs put layers of their own in the place of those.
    """

    def __init__(self, dense: Any, rows: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(dense.weight.detach()[: len(rows)].clone())
        self.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach()[: len(rows)].clone())
        numbers = {row: number for number, row in enumerate(rows)}
        places = [numbers.get(row, len(rows)) for row in range(dense.out_features)]  # behind all rows stands a zero
        self.places = torch.tensor(places, device="cpu")  # also where weights are not there yet

    def forward(self, input: Tensor) -> Tensor:
        places = self.places.to(input.device)
        if not places.is_meta:
            self.places = places
        rows = nn.functional.linear(input, self.weight, self.bias)
        return nn.functional.pad(rows, (0, 1)).index_select(-1, places)


class PartlyRead(nn.Module):
    """An output projection that reads the first dimensions of every head."""

    def __init__(self, dense: Any, kept: int, whole: int) -> None:
        super().__init__()
        columns = dense.in_features // whole * kept
        self.kept, self.whole = kept, whole
        self.weight = nn.Parameter(dense.weight.detach()[:, :columns].clone())
        self.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().clone())

    def forward(self, input: Tensor) -> Tensor:
        heads = input.unflatten(-1, (-1, self.whole))[..., : self.kept]
        return nn.functional.linear(heads.flatten(-2), self.weight, self.bias)


def within_heads(dense: Any, path: str, own: Any, width: int) -> Any:
    """Return a projection of heads of a width as it is in a layer of these sizes, of which some dimensions may have
    left.
    """
    heads = range(dense.in_features // width if path == VALUES[-1] else dense.out_features // width)
    dims: list[list[int]] = [list(range(width)) for _ in heads]
    if path in ROTATED and (kept := getattr(own, "rotary_pairs", None)):
        share = (getattr(own, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
        whole = int(width * share) // 2
        for head in heads:
            pairs = pairs_in(kept[head * len(kept) // len(heads)])
            two = [(2 * pair, 2 * pair + 1) if NEIGHBOURS else (pair, whole + pair) for pair in pairs]
            dims[head] = sorted(dim for both in two for dim in both) + dims[head][2 * whole :]
    elif path in VALUES and (count := getattr(own, "value_head_dim", None)):
        dims = [one[:count] for one in dims]
    if all(len(one) == width for one in dims):
        return dense
    if path == VALUES[-1]:
        return PartlyRead(dense, len(dims[0]), width)
    return Placed(dense, [width * head + dim for head, own in enumerate(dims) for dim in own])


def pairs_in(text: str) -> list[int]:
    """Return numbers of ranges: ``"0-2,7"`` is 0, 1, 2 and 7."""
    ends = [run.split("-") for run in text.split(",")]
    return [number for run in ends for number in range(int(run[0]), int(run[-1]) + 1)]


class OwnSettings:
    """The model's configuration for a block whose forward reads some of its numbers: these are the layer's own."""

    def __init__(self, config: Any, own: dict[str, Any]) -> None:
        vars(self).update(own, _config=config)

    def __getattr__(self, name: str) -> Any:
        if name == "_config":  # while it is copied
            raise AttributeError(name)
        return getattr(self._config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._config, name, value)


def part_of(config: Any) -> Any:
    """Return the configuration of the class that holds the layers, of the whole model's or itself."""
    return getattr(config, PART, config) if PART else config


@strict
class PrunedLlamaConfig(LlamaConfig):
    """``per_layer_config`` holds what differs between layers; the global sizes are the dense model's."""

    model_type = "multipruner_llama"

    def __post_init__(self, **kwargs: Any) -> None:
        classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        kwargs["auto_map"] = {auto: f"modeling_multipruner_llama.PrunedLlama{end}" for auto, end in classes.items()}
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Accept what the stock check does not, which wants hidden_size to be a multiple of the heads; with an explicit
        head_dim it need not.
        """
        for number, layer in enumerate(part_of(self).per_layer_config or ()):  # None in 5.14 where all layers are alike
            heads = getattr(layer, HEADS)
            kv_heads = getattr(layer, KV_HEADS, None) or heads
            if heads % kv_heads:
                raise ValueError(f"layer {number}: {kv_heads} KV heads do not divide {heads}")

    def validate_rope(self) -> None:
        """Let the stock check read the dense model's sizes."""
        whole = copy.copy(self)
        whole.per_layer_config = None
        LlamaConfig.validate_rope(whole)

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        depth = getattr(part_of(self), DEPTH)
        output.setdefault("num_hidden_layers", depth)  # where code is not to be run, no other word is known
        rope = output.get("rope_parameters") or {}
        if "rope_theta" in rope:  # transformers 4 and most other readers look for it here
            output["rope_theta"] = rope["rope_theta"]
        return output


@contextmanager
def without_layers(config: Any) -> Iterator[None]:
    """Let a stock constructor build all but the decoder layers, on this same configuration object."""
    flag = "allow_global_per_layer_attribute_access"
    before = {name: vars(config)[name] for name in (DEPTH, flag) if name in vars(config)}
    vars(config).update({DEPTH: 0, flag: True})
    try:
        yield
    finally:
        for name in (DEPTH, flag):
            del vars(config)[name]
        vars(config).update(before)


def pruned_layer(config: Any, number: int) -> nn.Module:
    """Return the stock decoder layer in its own sizes, with null modules in the place of removed blocks."""
    own = config.per_layer_config[number]
    layer = stock_layer(own, number, vars(config))
    for kind in getattr(own, "skip", ()):
        block, norms = BLOCKS[kind]
        owner, _, name = block.rpartition(".")
        setattr(layer.get_submodule(owner), name, NoHeads(config, number) if kind == "attention" else NoMLP())
        for norm in norms:
            setattr(layer, norm, nn.Identity())
    for path in (*VALUES, *ROTATED):
        parent, _, name = path.rpartition(".")
        attention: Any = dict(layer.named_modules()).get(parent)
        if hasattr(attention, name):  # or it was removed, or the layer mixes tokens in another way
            setattr(attention, name, within_heads(getattr(attention, name), path, own, attention.head_dim))
    for module in layer.modules():  # one object for all, so that set_attn_implementation() reaches every layer
        if hasattr(module, "config"):
            module.config = config
    for path, keys in SETTINGS.items():
        layer.get_submodule(path).config = OwnSettings(config, {key: getattr(own, key) for key in keys})
    return layer


def assign_cache_slots(config: Any, layers: Sequence[Any]) -> None:
    """Hand the cache's slots, in order and by layer type, to the blocks that are left of a kind.

    Lengths and masks are read from the first slot of each type, which a layer without attention would leave empty.
    vLLM keeps a cache of its own, and looks up a layer's sizes by this number: there it stays.
    """
    if getattr(config, "_attn_implementation", None) == "vllm":
        return
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    for kind, name in CACHE_SLOTS.items():
        slots = {type_: iter([number for number, other in enumerate(types) if other == type_]) for type_ in set(types)}
        for layer, type_ in zip(layers, types, strict=True):
            block = dict(layer.named_modules()).get(BLOCKS[kind][0])  # it may mix tokens in another way, or in none
            if block is not None and not isinstance(block, (NoHeads, NoMLP)):
                setattr(block, name, next(slots[type_]))


class PrunedLlamaModel(LlamaModel):
    config_class = PrunedLlamaConfig
    base_model_prefix = DECODER

    def __init__(self, config: PrunedLlamaConfig) -> None:
        config = part_of(config)
        with without_layers(config):
            super().__init__(config, **MODEL_SETTINGS)
        rotary: Any = getattr(self, "rotary_emb", None)
        if rotary is not None:  # some read the number of heads, and the width off the dense model's
            rotary.config = config.per_layer_config[0]
            vars(rotary.config).update({key: vars(config)[key] for key in (HEADS, KV_HEADS) if key in vars(config)})
        layers: Any = self.get_submodule(LAYERS)
        del layers[:]  # where another key says how many there are
        layers.extend(pruned_layer(config, number) for number in range(getattr(config, DEPTH)))
        assign_cache_slots(config, list(layers))
        self.post_init()


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    config_class = PrunedLlamaConfig

    def __init__(self, config: PrunedLlamaConfig) -> None:
        with without_layers(part_of(config)):
            super().__init__(config)
        owner, _, name = DECODER.rpartition(".")
        setattr(self.get_submodule(owner), name, PrunedLlamaModel(config))
        self.post_init()

    def _get_static_cache_init_shape(self) -> None:
        """Give no shapes in advance: cache slots are not in the order of the layers (the first update shapes them)."""
        return


PrunedLlamaConfig.register_for_auto_class()
PrunedLlamaModel.register_for_auto_class("AutoModel")
PrunedLlamaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
