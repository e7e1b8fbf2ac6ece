"""The configuration that a plan leaves of a dense one: the family's own where that has words for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PreTrainedConfig, PreTrainedModel

from multipruner.core.axes import BLOCK_KINDS, PAIRS, VALUES, ranges_of, units_in
from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.families import Family, anatomy_of, constants_of, spec_for
from multipruner.core.layout import count_of
from multipruner.core.plan import BlockUnits, PruningPlan
from multipruner.core.structure import GONE, Anatomy, Place, Structure

from .classes import model_class

VALUE_DIM, ROPE_PAIRS = "value_head_dim", "rotary_pairs"
"""What a layer's entry calls that its heads keep, where some have left: how many value dimensions, and which pairs of
queries and keys in every KV group."""


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
    _check_plan(config, plan)
    spec, whole = spec_for(config), anatomy_of(config, plan.along)
    hidden = whole.constants["hidden"] if plan.stream is None else len(plan.stream)
    layers = plan.layers
    said = config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "per_layer_config"):
        said.pop(key, None)
    record = spec.part_of(said)  # within the other, or itself: what changes in it changes there
    for key in spec.derived:
        record.pop(key, None)
    units = [kept for place, kept in zip(whole, plan.blocks, strict=True) if place.layer in set(layers)]
    anatomy, structure = whole.of_layers(layers), Structure(tuple(kept.size for kept in units))
    heads = _in_heads(units, anatomy)
    record |= {key: [record[key][number] for number in layers] for key in _per_layer_lists(record, whole.layers)}
    record[spec.depth] = len(layers)
    record |= spec.plain(record)
    record |= {spec.ahead: 0} if record.get(spec.ahead) else {}
    if plan.stream is not None:
        width, own = check_narrower(spec)  # heads are as wide as they were, which has to be said now
        record |= {width: hidden, own: whole.constants["head_dim"]}
    if record.get("layer_types") and spec.mixing is None:  # else a type says what a layer is
        record["layer_types"] = _layer_types(record["layer_types"], _cached(structure, anatomy, spec))
    record |= _said(anatomy, spec)
    names = getattr(spec.part_of(config), "attribute_map", {})  # a key may be another one's name
    rows = [
        {names.get(key, key): number for key, number in _numbers(structure, anatomy, layer, spec).items()}
        for layer in range(len(layers))
    ]
    if not any(heads):  # which no stock configuration says
        stock = _stock_config(config, said, rows, structure, anatomy, spec, hidden)
        if stock is not None:
            return stock
    if (width := spec.key("head_dim")) is not None:
        record[width] = anatomy.constants["head_dim"]
    elif spec.task.reads_text and "head_dim" in anatomy.constants and not hasattr(type(config), "head_dim"):
        record["head_dim"] = anatomy.constants["head_dim"]  # vLLM would divide by the heads that a layer has left
    if spec.head_scale:
        record["logit_scale"] = spec.logit_scale(spec.part_of(config))  # vLLM's word for it, whatever the family's is
    record |= _cache_slots(structure, anatomy, spec)
    skips = [_skipped(structure, anatomy, layer) for layer in range(len(layers))]
    layer = enumerate(zip(rows, skips, heads, strict=True))
    record["per_layer_config"] = {n: {**_overrides(numbers, skip), **own} for n, (numbers, skip, own) in layer}
    config_class: Any = model_class(spec, dense).config_class
    return config_class(**said)


def _per_layer_lists(record: Mapping[str, Any], layers: int) -> list[str]:
    """Return keys that hold one value for every layer; lists of tokens and labels may be as long by chance."""
    return [
        key
        for key, value in record.items()
        if isinstance(value, list) and len(value) == layers and not re.search(r"token|label|arch|lang|image|patch", key)
    ]


def _stock_config(
    config: Any,
    record: dict[str, Any],
    rows: list[dict[str, int]],
    structure: Structure,
    anatomy: Anatomy,
    spec: Family,
    hidden: int,
) -> PreTrainedConfig | None:
    """Return the family's own configuration for these sizes and this width of the residual stream, or ``None`` where it
    has no words for them.
    """
    constants = constants_of(config)
    sizes = {place.kind: place.dense for place in anatomy}
    cut = any(
        spec.block(place.kind).resized and size != sizes[place.kind]
        for place, size in zip(anatomy, structure, strict=True)
    )  # a stock constructor knows such blocks in their dense size alone
    said = {key: number for row in rows for key, number in row.items()}
    alike = all(said[key] == number for row in rows for key, number in row.items())
    if spec.remote_code or cut or not alike or not all(structure):
        return None
    width, own = spec.key("head_dim"), {**spec.part_of(record), **said}
    heads = own.get(spec.heads_keys[0])
    square = heads is None or heads * constants["head_dim"] == hidden
    if width is None and not square:
        return None
    if width is not None and (width in own or not square):
        own[width] = constants["head_dim"]
    config_class: Any = type(config)
    try:
        stock = config_class(**({**record, spec.part: own} if spec.part else own))
    except StrictDataclassClassValidationError:  # LlamaConfig: heads must divide hidden_size, head_dim or not
        return None
    # some constructors work sizes out anew, whatever they are given
    told = spec.part_of(stock)
    heard = all(getattr(told, key, None) == number for key, number in said.items())
    heard &= width is None or getattr(told, width, None) in (None, constants["head_dim"])
    return stock if heard else None


def check_narrower(spec: Family) -> tuple[str, str]:
    """Return the keys in which a configuration says the width of the residual stream and that of a head.

    Raises:
        UnsupportedModelError: when it cannot say one without the other.
    """
    if not spec.task.reads_text:
        raise _unrepaired(spec, "the embeddings of pictures")
    width, own = spec.key("hidden"), spec.key("head_dim")
    if any(BLOCK_KINDS[block.kind].whole for block in spec.blocks):
        raise _unrepaired(spec, "mixers of tokens")
    if width is None or own is None or spec.remote_code or any(block.resized for block in spec.blocks):
        raise UnsupportedModelError(
            f"{spec.model_type}: the hidden size is the number of heads times their width in this family's code, so it "
            "stays as it is: give no --hidden-size (latency: no --hidden-sizes)"
        )
    if spec.routes(spec.kinds):
        raise _unrepaired(spec, "mixtures of experts")
    if any(block.parallel for block in spec.blocks):
        raise _unrepaired(spec, "blocks that run side by side")
    return width, own


def _unrepaired(spec: Family, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{spec.model_type}: a narrower residual stream is not repaired through {what}, so the hidden size stays as it "
        "is: give no --hidden-size (latency: no --hidden-sizes)"
    )


def _check_plan(config: Any, plan: PruningPlan) -> None:
    if plan.model_type != config.model_type:
        raise ConfigError(f"the plan was made for a {plan.model_type!r} model, this one is {config.model_type!r}")
    if plan.anatomy != anatomy_of(config, plan.along):
        sizes = [_described(anatomy) for anatomy in (plan.anatomy, anatomy_of(config, plan.along))]
        raise ConfigError(f"the plan was made for a model of {sizes[0]}; this one has {sizes[1]}")
    hidden = anatomy_of(config).constants["hidden"]
    if plan.stream is not None and plan.hidden != hidden:
        raise ConfigError(f"the plan was made for a model of hidden size {plan.hidden}; this one has {hidden}")
    if not plan.layers:
        raise ConfigError("the plan leaves no decoder layer")
    anatomy_of(config, plan.along).check(plan.structure)


def _described(anatomy: Anatomy) -> str:
    first = (place for place in anatomy if place.layer == 0)
    sizes = ", ".join(f"{place.kind} {' x '.join(map(str, place.dense))}" for place in first)
    return f"{anatomy.layers} layers, the first with {sizes}"


def _cached(structure: Structure, anatomy: Anatomy, spec: Family, kind: str = "") -> list[bool]:
    """Tell of every layer whether it has a block that is in the cache, of a kind or of any."""
    kinds = {block.kind for block in spec.blocks if block.cache and kind in ("", block.kind)}
    has = {place.layer for place, size in zip(anatomy, structure, strict=True) if size and place.kind in kinds}
    return [layer in has for layer in range(anatomy.layers)]


def _cache_slots(structure: Structure, anatomy: Anatomy, spec: Family) -> dict[str, Any]:
    """Return as many slots of a cache as there are attentions, the first ones: an empty one breaks what takes tokens
    back.

    transformers do so for layers that share a cache, which they say by the layer; up to 5.14 by their number.
    Where layers mix tokens in several ways, every way has its own slots, which stay where such layers are.
    """
    if spec.mixing is not None:
        used = _own_slots(structure, anatomy, spec)
        whole = _cached(anatomy.dense, anatomy, spec)
        modes = ["reuse" if has and number not in used else "own" for number, has in enumerate(whole)]
        return {"kv_sharing_modes": modes} if "reuse" in modes else {}
    slots, layers = sum(_cached(structure, anatomy, spec)), anatomy.layers
    if slots in (0, layers):
        return {}
    return {
        "kv_sharing_modes": ["own" if number < slots else "reuse" for number in range(layers)],
        "num_kv_shared_layers": layers - slots,
    }


def _own_slots(structure: Structure, anatomy: Anatomy, spec: Family) -> set[int]:
    """Return the slots of a cache that the blocks of every kind fill: the first of those that their layers have.

    Where one way is lost altogether its slots stay, empty: some code asks for the length of the first.
    """
    used: set[int] = set()
    for kind in (block.kind for block in spec.blocks if block.cache):
        slots = [number for number, has in enumerate(_cached(anatomy.dense, anatomy, spec, kind)) if has]
        used.update(slots[: sum(_cached(structure, anatomy, spec, kind)) or len(slots)])
    return used


def _layer_types(types: list[str], has: list[bool]) -> list[str]:
    """Give layers without attention such types that the first slots of a cache are what the attentions need."""
    living = [kind for kind, cached in zip(types, has, strict=True) if cached]
    slots = len(living)
    needed = [kind for kind, cached in zip(types[slots:], has[slots:], strict=True) if cached]
    free = iter(needed + living[:1] * len(types))
    return [kind if cached or not living else next(free) for kind, cached in zip(types, has, strict=True)]


def _numbers(structure: Structure, anatomy: Anatomy, layer: int, spec: Family) -> dict[str, int]:
    """Return what the keys of a family's configuration say of a layer; 0 where the block is gone."""
    counts = dict(anatomy.constants)
    for number in anatomy.of_layer(layer):
        counts |= anatomy.counts(number, structure[number])
    return spec.numbers(counts)


def _said(anatomy: Anatomy, spec: Family) -> Mapping[str, Any]:
    """Return what the configuration says of which layers have which kind of block, where they differ."""
    kinds = [{anatomy[number].kind for number in anatomy.of_layer(layer)} for layer in range(anatomy.layers)]
    said = (pattern.telling([next(kind for kind in each if kind in pattern.kinds) for each in kinds])
            for pattern in spec.patterns)  # fmt: skip
    return {key: value for each in said for key, value in each.items()}


def _skipped(structure: Structure, anatomy: Anatomy, layer: int) -> list[str]:
    """Return the kinds of the blocks that a layer has lost."""
    return [anatomy[number].kind for number in anatomy.of_layer(layer) if not structure[number]]


def _in_heads(blocks: list[BlockUnits], anatomy: Anatomy) -> list[dict[str, Any]]:
    """Return what every layer keeps within its heads, by its key; nothing of that of which none has left."""
    found: list[dict[str, Any]] = [{} for _ in range(anatomy.layers)]
    for axis, key in ((VALUES, VALUE_DIM), (PAIRS, ROPE_PAIRS)):
        whole = anatomy.constants.get(axis, 0)
        kept: list[Any] = [(range(whole),)] * anatomy.layers
        for place, units in zip(anatomy, blocks, strict=True):
            kept[place.layer] = units.by_axis(place.kind).get(axis) or kept[place.layer]
        if min(map(count_of, kept), default=whole) < whole:
            for entry, units in zip(found, kept, strict=True):
                entry[key] = count_of(units) if axis == VALUES else list(map(ranges_of, units))
    return found


def _overrides(numbers: Mapping[str, int], skip: list[str]) -> dict[str, Any]:
    """Return one layer's entry of ``per_layer_config``; :func:`sizes_in` reads it.

    A removed block is written with size 1, the least that stock constructors take: building the layer costs nothing,
    and a stock class that knows no ``skip`` meets differing sizes and refuses.
    """
    return {**{key: number or 1 for key, number in numbers.items()}, **({"skip": skip} if skip else {})}


def sizes_in(record: Mapping[str, Any], spec: Family) -> tuple[Anatomy, Structure]:
    """Return the blocks of all layers that a checkpoint's ``config.json`` says, stock or ours, and what they keep.

    Args:
        record: its content. ``per_layer_config`` says what differs from the rest (its keys may be padded: ``"02"``).
        spec: the family's row.

    Returns:
        The anatomy of a dense model of as many layers, every block as large as it is here, and the structure, in which
        removed blocks are gone.
    """
    record = spec.part_of(record)
    table = {int(number): entry for number, entry in (record.get("per_layer_config") or {}).items()}
    places, sizes = [], []
    for number in range(int(record.get(spec.depth) or 0)):
        own = {**record, **table.get(number, {})}
        for kind, always in spec.sizes(own, number).items():
            size = always
            if spec.block(kind).valued and (VALUE_DIM in own or ROPE_PAIRS in own):
                pairs = (len(units_in(own[ROPE_PAIRS][0])),) if ROPE_PAIRS in own else ()
                size = (*always, int(own.get(VALUE_DIM) or spec.counts(own)[VALUES]), *pairs)
            places.append(Place(number, kind, size))
            sizes.append(GONE if kind in (own.get("skip") or ()) else size)
    return Anatomy(tuple(places)), Structure(tuple(sizes))
