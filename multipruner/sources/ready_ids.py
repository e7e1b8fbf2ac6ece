"""Token ids that somebody else has made, from a safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from multipruner.config.spellings import respelled
from multipruner.core.errors import CalibrationError

from .packing import Split


def is_ready(source: str) -> bool:
    """Tell whether a source is a file of token ids, by its name."""
    return Path(source).suffix.lower() == ".safetensors"


def ready_ids(path: Path, split: Split, tokenizer: Any, model: Any) -> torch.Tensor | None:
    """Read token ids from a file: the tensor ``input_ids`` (or the only one), held-out ``heldout_ids`` (or none)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CalibrationError(f"there is no file {path}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error
    tensors = respelled("text", tensors, str(path))
    heldout, moments = tensors.pop("heldout_ids", None), tensors.pop("moments_ids", None)
    if split == "moments" and moments is not None:
        return _checked(path, moments, tokenizer, model)
    if split == "heldout":
        return None if heldout is None else _checked(path, heldout, tokenizer, model)
    if "input_ids" not in tensors and len(tensors) != 1:
        raise CalibrationError(f"{path} needs a tensor input_ids; it holds {', '.join(sorted(tensors)) or 'none'}")
    return _checked(path, tensors.get("input_ids", next(iter(tensors.values()))), tokenizer, model)


def _checked(path: Path, ids: torch.Tensor, tokenizer: Any, model: Any) -> torch.Tensor:
    vocabulary = model.config.vocab_size if model is not None else len(tokenizer)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"{path}: token ids must be integers, not {ids.dtype}")
    if ids.ndim != 2 or len(ids) < 1 or ids.shape[1] < 2:
        raise CalibrationError(f"{path}: token ids must be [sequences, length >= 2], not {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(f"{path}: token id {low if low < 0 else high} is outside 0..{vocabulary - 1}")
    return ids.to(torch.int64)
