"""Opening what was saved, without running any code from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from multipruner.config.precedence import trusts
from multipruner.core.errors import ConfigError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import FAMILIES

from .classes import family_of, model_class
from .save import PLAN_FILE

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def load(source: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Open a pruned checkpoint without running any code from it.

    Args:
        source: a folder written by :func:`save`, or a Hub repository's id.
        kwargs: as for transformers' ``from_pretrained`` (``dtype``, ``device_map``, ``revision`` ...). A family whose
            own code travels with the checkpoint needs ``trust_remote_code=True``, and that code is run.

    Raises:
        UnknownModelError: when there is no such folder or repository.
        UnsupportedModelError: when it is no checkpoint of ours.
        ConfigError: when the code in the checkpoint would have to be trusted and is not.
    """
    trust = trusts(kwargs.pop("trust_remote_code", False))
    try:
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        config, _ = PreTrainedConfig.get_config_dict(str(source), **options)
    except OSError as error:
        raise UnknownModelError(f"no model at {str(source)!r}: {error}") from error
    spec = family_of(config)
    if spec is None and _is_stock_result(str(source), config, options):
        return AutoModelForCausalLM.from_pretrained(
            str(source), use_safetensors=True, trust_remote_code=False, **kwargs
        )
    if spec is None:
        raise UnsupportedModelError(
            f"{str(source)!r} is not a pruned model (model_type {config.get('model_type')!r}); "
            "load it with transformers.AutoModelForCausalLM.from_pretrained"
        )
    if not spec.remote_code:
        return model_class(spec).from_pretrained(str(source), use_safetensors=True, **kwargs)
    if not trust:
        raise ConfigError(f"{spec.model_type}: the model's code is part of the checkpoint; pass trust_remote_code=True")
    return AutoModelForCausalLM.from_pretrained(str(source), use_safetensors=True, trust_remote_code=True, **kwargs)


def _is_stock_result(source: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Whether this is a stock checkpoint that a plan was applied to (see :func:`multipruner.apply_plan`)."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or family.remote_code:
        return False
    try:
        return cached_file(source, PLAN_FILE, **options) is not None
    except OSError:
        return False
