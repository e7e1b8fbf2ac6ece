"""The dense model as transformers load it, with tensors that stay in their files until somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from multipruner.core.errors import ConfigError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import Family
from multipruner.engine.fingerprint import fingerprint
from multipruner.sources.dense import Accounted, check_told
from multipruner.sources.intake.accounting import reason_of
from multipruner.storage.tensor_headers import TORCH_NAMES, StoredTensor

from .deferred import Deferred, Read, WrittenError, values_of

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, own) for name, own in TORCH_NAMES.items()}
"""torch's types by safetensors' names of them."""
LOADED = (torch.float32, torch.bfloat16, torch.float16)
"""Types that a run may have loaded the weights in whose fingerprint its plan has."""


def shell_of(config: Any, spec: Family, trust: bool) -> PreTrainedModel:
    """Return the model of a configuration on the meta device, where it has shapes and no weights.

    Raises:
        ConfigError: when no model can be built from the configuration.
    """
    how = {"trust_remote_code": trust} if spec.remote_code else {}
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, **how)
    except Exception as error:  # of every kind: the class meets values that nobody checked
        raise ConfigError(f"no model can be built from this config.json: {reason_of(error)}") from error


def deferred_model(found: Accounted, trust: bool) -> PreTrainedModel:
    """Return the dense model with deferred weights, in the one type that all of them are stored in, else in the type
    that the configuration names.

    Raises:
        UnsupportedModelError: when transformers do not find a place for every tensor, and a tensor for every place, or
            write into them.
        UnknownModelError: when they cannot load it.
    """
    cls: Any = type(shell_of(found.config, found.spec, trust))
    tensors = {name: _deferred(name, tensor, found.spec) for name, tensor in found.stored.items()}
    how = {name: value for name, value in found.how.items() if name != "trust_remote_code"}
    try:
        loaded = cls.from_pretrained(
            None, config=found.config, state_dict=tensors, dtype=dtype_of(found), output_loading_info=True, **how
        )
    except WrittenError as error:
        raise UnsupportedModelError(
            f"{found.name}: the code of {found.spec.model_type} changes weights while it loads them, which needs them "
            "in memory: load the model in Python and use multipruner.apply_plan"
        ) from error
    except Exception as error:  # of every kind: transformers meets files that nobody checked
        raise UnknownModelError(f"cannot load {found.name}: {reason_of(error)}") from error
    return check_told(found.name, found.spec, *loaded).eval()


def dtype_of(found: Accounted) -> torch.dtype:
    """Return the type that a checkpoint's weights have, or are meant in where they differ."""
    types = {DTYPES[tensor.dtype] for tensor in found.stored.values()}
    return next(iter(types)) if len(types) == 1 else getattr(found.config, "dtype", None) or torch.float32


def _deferred(name: str, tensor: StoredTensor, spec: Family) -> Deferred:
    shape = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device="meta")
    return Deferred(shape, Read(partial(_read, tensor, name, name.removeprefix(f"{spec.decoder}."))))


def _read(tensor: StoredTensor, *names: str) -> Tensor:
    """Read a tensor, under the first of these names that its file knows.

    Raises:
        UnknownModelError: when the file is not there any more, or changed.
    """
    try:
        with safe_open(tensor.file, "pt") as file:
            there = set(file.keys())
            return file.get_tensor(next(name for name in names if name in there))
    except Exception as error:  # of every kind: another process may write where we read
        raise UnknownModelError(f"cannot read {names[0]} from {tensor.file}: {reason_of(error)}") from error


def has_fingerprint(model: PreTrainedModel, wanted: str, tick: Callable[[int], object]) -> bool:
    """Tell whether the weights are those of a fingerprint, in one of the types that they may have been loaded in.

    Args:
        model: with deferred weights, which are all read once for each type that is tried, their own first.
        wanted: the fingerprint.
        tick: called with the bytes of every tensor that was read.
    """

    def values(weight: Tensor, dtype: torch.dtype) -> Tensor:
        found = values_of(weight.detach())
        tick(found.nbytes)
        return found.to(dtype)

    others = (dtype for dtype in LOADED if dtype != model.dtype)
    return any(fingerprint(model, partial(values, dtype=dtype)) == wanted for dtype in (model.dtype, *others))
