"""Tensors in an unnamed file instead of memory, for what is needed one at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Hashable, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from multipruner.core.errors import OutputError

from .cache import ENVIRONMENT, cache_folder

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in the file, and what it was."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class OnDisk(MutableMapping[Key, Tensor], Generic[Key]):
    """Tensors by key; every access reads the file again, and gives a copy on the device that the tensor came from.

    The file is in the cache folder and has no name: it goes when the process ends, however it ends. What is removed
    leaves its bytes.

    Raises:
        OutputError: when the disk is full; what was there before can still be read.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115 - as long as this object lives
        self._places: dict[Key, _Place] = {}
        self._end = 0

    def __setitem__(self, key: Key, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        try:
            self._file.seek(self._end)
            self._file.write(data.data)
            self._file.flush()
        except OSError as error:
            raise _full(data.nbytes, error) from error
        self._places[key] = _Place(self._end, tensor.shape, tensor.dtype, tensor.device)
        self._end += data.nbytes

    def __getitem__(self, key: Key) -> Tensor:
        place = self._places[key]
        tensor = torch.empty(place.shape, dtype=place.dtype)
        self._file.seek(place.offset)
        self._file.readinto(tensor.flatten().view(torch.uint8).numpy().data)
        return tensor.to(place.device)

    def __delitem__(self, key: Key) -> None:
        del self._places[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def mapped(tensor: Tensor) -> Tensor:
    """Return the same numbers in a file of the cache folder that is mapped: a tensor like any other, also to write to,
    whose memory the system takes back where it is needed. The file goes with the tensor.

    Args:
        tensor: on the CPU.

    Raises:
        OutputError: when the disk is full.
    """
    if not tensor.numel():
        return tensor.clone()
    data = tensor.detach().contiguous()
    try:
        with tempfile.NamedTemporaryFile(dir=cache_folder(), prefix="tensor-", delete=False) as file:
            place = Path(file.name)
            file.write(data.flatten().view(torch.uint8).numpy().data)
    except OSError as error:
        raise _full(data.nbytes, error) from error
    try:
        return torch.from_file(str(place), shared=True, size=data.numel(), dtype=data.dtype).view(data.shape)
    finally:
        with suppress(OSError):  # Windows keeps the name of what is mapped
            place.unlink()


def _full(size: int, error: OSError) -> OutputError:
    return OutputError(
        f"cannot keep {size / 2**20:,.0f} MiB more on disk, in {cache_folder()}: {error.strerror}; make room, or set "
        f"{ENVIRONMENT} to a folder on a larger disk"
    )
