"""A model that is not loaded: its sizes on the meta device, and a stand-in of a few layers to measure times on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from multipruner.config.precedence import trusts
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError
from multipruner.core.families import Family, anatomy_of
from multipruner.sources.dense import attention_of
from multipruner.sources.intake.accounting import build_config, read_config, reason_of
from multipruner.sources.quantised.unpack import check_read, method_of, result_dtype
from multipruner.sources.towers import text_config, tower_in

LAYERS = 2
_VALUE = 0.01
"""Of every weight: products of it take as long as any other's."""


def meta_model(folder: Path, recipe: Recipe) -> tuple[Any, torch.dtype]:
    """Return a folder's model without its weights, and the type that these are stored in.

    Raises:
        MultiprunerError: for a configuration that a run would refuse, too.
    """
    trust = trusts(recipe.trust_remote_code)
    if tower_in(folder / "config.json"):
        _, config, spec = text_config(folder, folder.name)
        config._attn_implementation = attention_of(spec)
    else:
        packed = method_of(folder / "config.json") is not None
        spec = check_read(folder, folder.name, trust) if packed else read_config(folder, folder.name, trust)
        how: dict[str, Any] = (
            {"trust_remote_code": trust} if spec.remote_code else {"attn_implementation": attention_of(spec)}
        )
        config = build_config(folder.name, folder, **how)
        if packed:
            vars(config).pop("quantization_config", None)
            config.dtype = getattr(torch, result_dtype(config))
    stored = getattr(config, "dtype", None) if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    stored = stored if isinstance(stored, torch.dtype) else torch.float32
    return _built(config, stored, trust=spec.remote_code), stored


def _built(config: Any, dtype: torch.dtype, *, trust: bool) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            more = {"trust_remote_code": True} if trust else {}
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **more).eval()
    except Exception as error:  # of every kind: the class meets values that nobody checked
        raise ConfigError(f"no model can be built from this configuration: {reason_of(error)}") from error


def stand_in(model: Any, spec: Family, dtype: torch.dtype, device: torch.device) -> Any:
    """Return the same model with a few layers, and weights that mean nothing, on a device that computes.

    Args:
        model: on the meta device.
        spec: its family.
        dtype: of the weights.
        device: to measure.
    """
    config = copy.deepcopy(model.config)
    depth = getattr(config, spec.depth)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth:  # such as the kind of every layer's attention
            setattr(config, name, value[:LAYERS])
    setattr(config, spec.depth, min(LAYERS, depth))
    for pattern in spec.patterns:
        kinds = (place.kind for place in anatomy_of(model.config) if place.kind in pattern.kinds)
        told = list(dict.fromkeys(kinds))  # a layer of every kind, or several alike
        vars(config).update(pattern.telling((told * LAYERS)[: min(LAYERS, depth)]))
    small = _built(config, dtype, trust=spec.remote_code).to_empty(device=device)
    small.tie_weights()
    with torch.no_grad():
        for tensor in (*small.parameters(), *small.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(_VALUE)
    return small.eval()
