"""The configuration that a plan leaves of a dense one: the family's own where that has words for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PreTrainedConfig, PreTrainedModel

from multipruner.core.axes import Counts, Layout
from multipruner.core.errors import ConfigError
from multipruner.core.families import Family, dense_structure, dimensions, leading, spec_for
from multipruner.core.plan import PruningPlan, surviving_layers
from multipruner.core.structure import KINDS, LayerSize, Structure

from .classes import model_class


def pruned_config(config: Any, plan: PruningPlan, dense: PreTrainedModel | None = None) -> PreTrainedConfig:
    """Return the configuration that a plan leaves of a dense one: a stock one where that can say it.

    Args:
        config: the dense model's configuration; not modified.
        plan: what stays.
        dense: the dense model; needed where the family's code travels with the checkpoint.

    Raises:
        ConfigError: when the plan was made for another model, or leaves nothing.
        UnsupportedModelError: when the family has no row.
    """
    spec = spec_for(config)
    _check_plan(config, plan)
    layers = surviving_layers(plan)
    record = config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "per_layer_config"):
        record.pop(key, None)
    sizes = Structure(tuple(plan.structure[number] for number in layers))
    record |= {key: [record[key][number] for number in layers] for key in _per_layer_lists(record, len(plan.dense))}
    record[spec.depth] = len(layers)
    if record.get("layer_types"):
        record["layer_types"] = _layer_types(record["layer_types"], sizes)
    stock = _stock_config(config, record, sizes, spec)
    if stock is not None:
        return stock
    constants = dimensions(config).constants
    if (width := spec.key("head_dim")) is not None:
        record[width] = constants["head_dim"]
    record |= _cache_slots(sizes)
    record["per_layer_config"] = {number: _overrides(size, spec, constants) for number, size in enumerate(sizes)}
    config_class: Any = model_class(spec, dense).config_class
    return config_class(**record)


def _per_layer_lists(record: Mapping[str, Any], layers: int) -> list[str]:
    """Return keys that hold one value for every layer; lists of tokens and labels may be as long by chance."""
    return [
        key
        for key, value in record.items()
        if isinstance(value, list) and len(value) == layers and not re.search(r"token|label|arch|lang", key)
    ]


def _stock_config(config: Any, record: dict[str, Any], sizes: Structure, spec: Family) -> PreTrainedConfig | None:
    """Return the family's own configuration for these sizes, or ``None`` where it has no words for them."""
    size, constants = sizes[0], dimensions(config).constants
    widths = any(block.resized for block in map(spec.block, KINDS))
    if spec.remote_code or widths or len(set(sizes)) > 1 or not (size.has_attention and size.has_mlp):
        return None
    width = spec.key("head_dim")
    square = size.query_heads * constants["head_dim"] == constants["hidden"]
    if width is None and not square:
        return None
    record = {**record, **_sizes(size, spec, constants)}
    if width is not None and (width in record or not square):
        record[width] = constants["head_dim"]
    config_class: Any = type(config)
    try:
        stock = config_class(**record)
    except StrictDataclassClassValidationError:  # LlamaConfig: heads must divide hidden_size, head_dim or not
        return None
    return stock


def with_older_words(record: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration that says its rotary embeddings in the words of transformers 4 as well.

    Most other readers know no others, and take the defaults without a word. transformers 5 read the same out of both,
    but for the bare configuration that they fall back on where code is not to be run: what comes with code stays.
    """
    rope = record.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope or "auto_map" in record:
        return dict(record)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    older: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if scaling.get("rope_type", "default") != "default":
        older["rope_scaling"] = scaling
    return {**record, **older}


def _check_plan(config: Any, plan: PruningPlan) -> None:
    if plan.model_type != config.model_type:
        raise ConfigError(f"the plan was made for a {plan.model_type!r} model, this one is {config.model_type!r}")
    if plan.dense != dense_structure(config):
        sizes = [f"{len(s)} layers, the first {s[0]}" for s in (plan.dense, dense_structure(config))]
        raise ConfigError(f"the plan was made for a model of {sizes[0]}; this one has {sizes[1]}")
    if not surviving_layers(plan):
        raise ConfigError("the plan leaves no decoder layer")


def _cache_slots(sizes: Structure) -> dict[str, Any]:
    """As many slots of a cache as there are attentions, the first ones: an empty one breaks what takes tokens back.

    transformers do so for layers that share a cache, which they say by the layer; up to 5.14 by their number.
    """
    slots, layers = sizes.count("attention"), len(sizes)
    if slots in (0, layers):
        return {}
    return {
        "kv_sharing_modes": ["own" if number < slots else "reuse" for number in range(layers)],
        "num_kv_shared_layers": layers - slots,
    }


def _layer_types(types: list[str], sizes: Structure) -> list[str]:
    """Give layers without attention such types that the first slots of a cache are what the attentions need."""
    living = [kind for kind, size in zip(types, sizes, strict=True) if size.has_attention]
    slots = len(living)
    needed = [kind for kind, size in zip(types[slots:], tuple(sizes)[slots:], strict=True) if size.has_attention]
    free = iter(needed + living[:1] * len(types))
    return [kind if size.has_attention or not living else next(free) for kind, size in zip(types, sizes, strict=True)]


def _sizes(size: LayerSize, spec: Family, constants: Counts) -> dict[str, int]:
    """Return what the keys of a family's configuration say of a layer of this size."""
    counts = {**constants, **leading(size)}
    layouts = {key: Layout(text) for key, text in spec.config.items()}
    return {key: layout.size(counts) for key, layout in layouts.items() if layout.axes}


def _overrides(size: LayerSize, spec: Family, constants: Counts) -> dict[str, Any]:
    """Return one layer's entry of ``per_layer_config``; :func:`sizes_in` reads it.

    A removed block is written with size 1, the least that stock constructors take: building the layer costs nothing,
    and a stock class that knows no ``skip`` meets differing sizes and refuses.
    """
    skip = [kind for kind in KINDS if not size.has(kind)]
    numbers = {key: number or 1 for key, number in _sizes(size, spec, constants).items()}
    return {**numbers, **({"skip": skip} if skip else {})}


def sizes_in(record: Mapping[str, Any], spec: Family) -> Structure:
    """Return the sizes of all layers that a checkpoint's ``config.json`` says, stock or ours.

    Args:
        record: its content. ``per_layer_config`` says what differs from the rest (its keys may be padded: ``"02"``).
        spec: the family's row.
    """
    table = {int(number): entry for number, entry in (record.get("per_layer_config") or {}).items()}
    layers = []
    for number in range(int(record.get(spec.depth) or 0)):
        own = {**record, **table.get(number, {})}
        size = spec.size(own)
        for kind in own.get("skip") or ():
            size = size.without(kind)
        layers.append(size)
    return Structure(tuple(layers))
