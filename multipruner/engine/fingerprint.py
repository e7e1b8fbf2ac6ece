"""What tells two models apart: hashes of their weights and of their configuration."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from multipruner.core.identity import digest

if TYPE_CHECKING:
    import torch


def fingerprint(model: torch.nn.Module, values: Callable[[torch.Tensor], torch.Tensor] | None = None) -> str:
    """Return SHA-256 (hexadecimal) over names, dtypes, shapes and bytes of all parameters, tied ones once.

    Args:
        model: whose they are.
        values: gives a parameter's values where they lie somewhere else, or are meant in another type.
    """
    import torch

    hashed = hashlib.sha256()
    for name, parameter in model.named_parameters():
        weight = parameter if values is None else values(parameter)
        hashed.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        hashed.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


_NOT_COMPUTED_WITH = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
"""What a configuration says that changes no logit of weights at hand (their dtype is in their fingerprint)."""


def configuration(model: Any) -> str:
    """Return SHA-256 (hexadecimal) of a model's configuration: how it computes with its weights, such as rotary
    embeddings.
    """
    settings = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NOT_COMPUTED_WITH}
    return digest(settings, default=str)
