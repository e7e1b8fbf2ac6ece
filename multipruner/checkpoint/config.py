"""The configuration that a plan leaves of a dense one: the family's own where that has words for it."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import PreTrainedConfig, PreTrainedModel

from multipruner.core.errors import ConfigError
from multipruner.core.families import Family, dense_structure, dimensions, spec_for
from multipruner.core.plan import PruningPlan, surviving_layers
from multipruner.core.structure import LayerSize, Structure

from .classes import model_class


def pruned_config(config: Any, plan: PruningPlan, dense: PreTrainedModel | None = None) -> PreTrainedConfig:
    """The configuration that a plan leaves of a dense one: a stock one where that can say it.

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
    record["num_hidden_layers"] = len(layers)
    sizes = Structure(tuple(plan.structure[number] for number in layers))
    if record.get("layer_types"):
        record["layer_types"] = _layer_types([record["layer_types"][number] for number in layers], sizes)
    stock = _stock_config(config, record, sizes, spec)
    if stock is not None:
        return stock
    record["head_dim"] = dimensions(config).head_dim
    grouped = "num_key_value_heads" in record
    record["per_layer_config"] = {number: _overrides(size, grouped) for number, size in enumerate(sizes)}
    config_class: Any = model_class(spec, dense).config_class
    return config_class(**record)


def _stock_config(config: Any, record: dict[str, Any], sizes: Structure, spec: Family) -> PreTrainedConfig | None:
    """The family's own configuration for these sizes, or ``None`` where it has no words for them."""
    size, head_dim = sizes[0], dimensions(config).head_dim
    if spec.remote_code or len(set(sizes)) > 1 or not (size.has_attention and size.has_mlp):
        return None
    record = {**record, "num_attention_heads": size.query_heads, "intermediate_size": size.channels}
    if "num_key_value_heads" in record or size.kv_heads != size.query_heads:
        record["num_key_value_heads"] = size.kv_heads
    if "head_dim" in record or size.query_heads * head_dim != config.hidden_size:
        record["head_dim"] = head_dim
    config_class: Any = type(config)
    try:
        stock = config_class(**record)
    except StrictDataclassClassValidationError:  # LlamaConfig: heads must divide hidden_size, head_dim or not
        return None
    rope = getattr(stock, "rope_parameters", None) or {}
    if "rope_theta" in rope:  # transformers 4 and most other readers look for it here
        stock.rope_theta = rope["rope_theta"]
    return stock


def _check_plan(config: Any, plan: PruningPlan) -> None:
    if plan.model_type != config.model_type:
        raise ConfigError(f"the plan was made for a {plan.model_type!r} model, this one is {config.model_type!r}")
    if plan.dense != dense_structure(config):
        sizes = [f"{len(s)} layers, the first {s[0]}" for s in (plan.dense, dense_structure(config))]
        raise ConfigError(f"the plan was made for a model of {sizes[0]}; this one has {sizes[1]}")
    if not surviving_layers(plan):
        raise ConfigError("the plan leaves no decoder layer")


def _layer_types(types: list[str], sizes: Structure) -> list[str]:
    """Layers without attention take the type of one that has it: a type only says which cache slot there is."""
    living = [kind for kind, size in zip(types, sizes, strict=True) if size.has_attention]
    return [kind if size.has_attention or not living else living[0] for kind, size in zip(types, sizes, strict=True)]


def _overrides(size: LayerSize, grouped: bool) -> dict[str, Any]:
    """One layer's entry of ``per_layer_config``.

    A removed block is written with size 1, the least that stock constructors take: building the layer costs nothing,
    and a stock class that knows no ``skip`` meets differing sizes and refuses.
    """
    heads = {"num_attention_heads": size.query_heads or 1}
    if grouped:
        heads["num_key_value_heads"] = size.kv_heads or 1
    skip = [kind for kind, there in (("attention", size.has_attention), ("mlp", size.has_mlp)) if not there]
    return {**heads, "intermediate_size": size.channels or 1, **({"skip": skip} if skip else {})}
