"""Tensors of safetensors files as bytes: written one after the other, copied from file to file without a look at them.

Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from multipruner.core.errors import UnknownModelError

from .tensor_headers import check_downloaded

_CHUNK = 1 << 24
_LENGTH = 8
"""Bytes of the header's length, a little-endian number at the beginning of a file."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that is to be written.

    Attributes:
        dtype: as safetensors names it.
        shape: of the tensor.
        nbytes: of its values.
        chunks: gives these, in order, when they are asked for.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: Callable[[], Iterable[bytes | memoryview]]


def parts_of(path: Path) -> dict[str, Part]:
    """Return the tensors of a file, by name; their values are read when they are written elsewhere.

    Raises:
        UnknownModelError: when it is no whole safetensors file, or was not downloaded.
    """
    check_downloaded(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH), "little")
            header: dict[str, Any] = json.loads(file.read(length)) if _LENGTH + length <= size else {}
        header.pop("__metadata__", None)
        parts = {name: _part(path, _LENGTH + length, **about) for name, about in header.items()}
    except (OSError, ValueError, TypeError) as error:
        raise UnknownModelError(f"{path} is no whole safetensors file ({error}); download it again") from error
    if _LENGTH + length + sum(part.nbytes for part in parts.values()) != size:
        raise UnknownModelError(f"{path} is no whole safetensors file (its sizes disagree); download it again")
    return parts


def _part(path: Path, start: int, dtype: str, shape: list[int], data_offsets: tuple[int, int]) -> Part:
    begin, end = data_offsets
    return Part(dtype, tuple(shape), end - begin, partial(_copied, path, start + begin, end - begin))


def _copied(path: Path, begin: int, count: int) -> Iterator[bytes]:
    """Read so many bytes of a file.

    Raises:
        UnknownModelError: when the file is shorter than it was.
    """
    with path.open("rb") as file:
        file.seek(begin)
        while count:
            chunk = file.read(min(count, _CHUNK))
            if not chunk:
                raise UnknownModelError(f"{path} became shorter while it was read; run the same command again")
            count -= len(chunk)
            yield chunk


def write_parts(path: Path, parts: Mapping[str, Part], tick: Callable[[int], object]) -> None:
    """Write a safetensors file: the header's length, the header, the bytes of all tensors.

    Wide types come first, so that all are aligned.

    Args:
        path: of the file.
        parts: its tensors, by name.
        tick: called with the bytes of every tensor that was written.

    Raises:
        OSError: when the disk does not take it.
    """
    order = sorted(parts, key=lambda name: (-_width(parts[name]), name))
    header: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + parts[name].nbytes
        header[name] = {"dtype": parts[name].dtype, "shape": list(parts[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(_LENGTH, "little") + text)
        for name in order:
            for chunk in parts[name].chunks():
                file.write(chunk)
            tick(parts[name].nbytes)


def _width(part: Part) -> int:
    """Return bytes of one number."""
    return part.nbytes // max(prod(part.shape), 1)


def write_index(path: Path, files: Mapping[str, Mapping[str, Part]], **metadata: Any) -> None:
    """Write the index of a checkpoint of several files.

    Args:
        path: of the index.
        files: the tensors of every file, by the file's name.
        **metadata: what it says besides their size.
    """
    size = sum(part.nbytes for parts in files.values() for part in parts.values())
    table = {name: file for file, parts in files.items() for name in parts}
    record = {"metadata": {**metadata, "total_size": size}, "weight_map": table}
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
