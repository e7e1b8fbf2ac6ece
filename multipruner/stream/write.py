"""Weights of a checkpoint folder, written tensor by tensor: names and shards as transformers' own writer has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from multipruner.core.errors import NumericsError
from multipruner.storage.tensor_bytes import Part, write_parts
from multipruner.storage.tensor_headers import INDEX

from .deferred import Deferred, Read, Values
from .dense import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PATTERN = "model{suffix}.safetensors"


def saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model under the names, and in the layout, in which transformers save them; deferred, so
    that experts that lie apart in files are taken apart one layer after the other.
    """
    tied = set(model.all_tied_weights_keys)
    own = {name: _deferred(tensor.detach()) for name, tensor in model.state_dict().items() if name not in tied}
    return revert_weight_conversion(model, own)


def _deferred(tensor: Tensor) -> Tensor:
    return tensor if isinstance(tensor, Deferred) else Deferred(tensor, Read(lambda: tensor))


def write_weights(folder: Path, model: PreTrainedModel, shard_size: str, tick: Callable[[int], object]) -> None:
    """Write a model's tensors, with an index where there are several files.

    Args:
        folder: that is there already.
        model: whose tensors may be deferred.
        shard_size: the most that one file holds, such as ``5GB``.
        tick: called with the bytes of every tensor that was written.

    Raises:
        NumericsError: naming the first tensor with NaN or infinity.
        OSError: when the disk does not take it.
    """
    tensors = saved_tensors(model)
    shapes = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in tensors.items()}
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=_PATTERN, max_shard_size=shard_size)
    values = Values(tensors.values())
    for file, names in split.filename_to_tensors.items():
        write_parts(folder / file, {name: part_of(name, tensors[name], values) for name in names}, tick)
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def part_of(name: str, tensor: Tensor, values: Values) -> Part:
    """Return a tensor, deferred or not, as something to write.

    Args:
        name: what to call it in errors.
        tensor: whose values are asked for when they are written.
        values: gives them.
    """

    def chunks() -> Iterator[memoryview]:
        value = values.of(tensor)
        if value.is_floating_point() and not value.isfinite().all():
            raise NumericsError(f"{name} holds NaN or infinity; take a dense model whose weights are finite")
        yield value.contiguous().reshape(-1).view(torch.uint8).numpy().data

    return Part(_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, chunks)
