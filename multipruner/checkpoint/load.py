"""Opening what was saved, without running any code from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from multipruner.config.precedence import trusts
from multipruner.core.errors import ConfigError, MultiprunerError, OutputError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import first_row
from multipruner.core.families.tasks import CAUSAL_LM
from multipruner.core.families.towers import TOWERS
from multipruner.storage.tensor_headers import check_tied, stored_tensors

from .classes import family_of, model_class
from .run_folder import INDEX, VOCABULARY, check_index
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
        OutputError: when weights are missing, or its index of weights names files elsewhere.
        ConfigError: when the code in the checkpoint would have to be trusted and is not.
    """
    trust = trusts(kwargs.pop("trust_remote_code", False))
    if (Path(source) / INDEX).is_file() and not (Path(source) / "model.safetensors").exists():
        check_index(Path(source) / INDEX)  # transformers would follow it out of the folder
    try:
        options = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        config, _ = PreTrainedConfig.get_config_dict(str(source), **options)
    except OSError as error:
        raise UnknownModelError(f"no model at {str(source)!r}: {error}") from error
    spec = family_of(config)
    _check_heads(Path(source), config)
    if spec is None and _is_stock_result(str(source), config, options):
        return _whole(_stock_opener(config), str(source), trust_remote_code=False, **kwargs)
    if spec is None and (tower := TOWERS.get(str(config.get("model_type")))) is not None:
        raise UnsupportedModelError(
            f"{str(source)!r} is a model of several modalities ({tower.model_type}); open it with "
            "transformers.AutoModelForImageTextToText.from_pretrained, and evaluate the run of its text tower"
        )
    if spec is None:
        raise UnsupportedModelError(
            f"{str(source)!r} is not a pruned model (model_type {config.get('model_type')!r}); "
            f"load it with transformers.{_stock_opener(config).__name__}.from_pretrained"
        )
    if not spec.remote_code:
        return _whole(model_class(spec), str(source), **kwargs)
    if not trust:
        raise ConfigError(f"{spec.model_type}: the model's code is part of the checkpoint; pass trust_remote_code=True")
    return _whole(transformers.AutoModelForCausalLM, str(source), trust_remote_code=True, **kwargs)


def _stock_opener(config: Mapping[str, Any]) -> Any:
    """Return the class of transformers that opens stock models of a configuration's family."""
    row = first_row(config.get("model_type"))
    return getattr(transformers, (CAUSAL_LM if row is None else row.task).auto_class)


def _check_heads(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a folder that somebody made, or an older version: tied, but with a head of its own in the file."""
    spec = family_of(config) or first_row(config.get("model_type"))
    if spec is not None and (folder / "config.json").is_file() and config.get("tie_word_embeddings"):
        embeddings = f"{spec.decoder}.{spec.embeddings}.weight"
        check_tied(str(folder), stored_tensors(folder), embeddings, f"{spec.head}.weight")


def _whole(cls: Any, source: str, **kwargs: Any) -> Any:
    """Open a checkpoint whose weights are all there: transformers make up those that are not."""
    wanted = kwargs.pop("output_loading_info", False)
    model, info = cls.from_pretrained(source, use_safetensors=True, output_loading_info=True, **kwargs)
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info[key]:
            names = ", ".join(sorted(map(str, info[key]))[:3])
            raise OutputError(f"{source} is damaged: {key.replace('_keys', '')} weights, such as {names}")
    return (model, info) if wanted else model


def load_run(folder: str | Path, **kwargs: Any) -> Any:
    """Call :func:`load` for a folder that somebody names: whatever is wrong with it is one line.

    Raises:
        OutputError: when it is damaged, or weights hold NaN or infinity.
        MultiprunerError: as :func:`load`.
    """
    try:
        model = load(folder, **kwargs)
    except MultiprunerError:
        raise
    except Exception as error:  # many libraries read its files, each with errors of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise OutputError(
            f"{folder} cannot be opened, it is damaged or not whole ({reason}); make the run again"
        ) from error
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise OutputError(f"{folder} is damaged: {name} holds NaN or infinity; make the run again")
    return model


def _is_stock_result(source: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> bool:
    """Tell whether this is a stock checkpoint that a plan was applied to (see :func:`multipruner.apply_plan`), or one
    with fewer tokens (``multipruner vocabulary``)."""
    family = first_row(config.get("model_type"))
    if family is None or family.remote_code:
        return False
    return any(_has(source, name, options) for name in (PLAN_FILE, VOCABULARY))


def _has(source: str, name: str, options: Mapping[str, Any]) -> bool:
    try:
        return cached_file(source, name, **options) is not None
    except OSError:
        return False
