"""A quantised checkpoint as an ordinary one in the cache: one weight at a time is in memory, all else is copied.

The folder is named after what the files are, so a checkpoint is unpacked once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.core.errors import MultiprunerError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import Family
from multipruner.sources.intake.accounting import WIDE, account, build_config, read_config, reason_of
from multipruner.sources.intake.derived import copy_beside, digest, write_files
from multipruner.sources.intake.recognise import quantised, unread
from multipruner.storage.cache import cache_folder, is_whole, keep_folder, work_folder
from multipruner.storage.files import output_errors
from multipruner.storage.memory import size_text
from multipruner.storage.tensor_bytes import Part, parts_of
from multipruner.storage.tensor_headers import TORCH_NAMES, StoredTensor, json_object, stored_tensors

from .formats import FORMATS, Packed, Packing

if TYPE_CHECKING:
    import torch

UNPACKING = 1
"""Raised when what is written changes."""
_RUNNING = re.compile(r"\.(input|output|activation|[kqv])_(scale(_inv)?|zero_point|g_idx|global_scale)$")
"""What activations and keys and values were to be rounded by while the model runs."""
_ABOUT = ("quantization_config", "quantization", "compression_config", "torch_dtype")
_SETTINGS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
_FLOATS = ("bfloat16", "float16", "float32")
"""Types of the result, where the configuration names one of them, else the first."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A weight that will be written in place of those that it is packed in.

    Attributes:
        packing: how it is packed.
        packed: what it is packed in.
        shape: of it.
    """

    packing: Packing
    packed: Packed
    shape: tuple[int, ...]


def method_of(config: str | Path) -> str | None:
    """Return how a ``config.json`` says that the weights are quantised; ``None`` for any other file."""
    try:
        return quantised(json_object(Path(config)))
    except UnknownModelError:  # whoever reads it next says so
        return None


def result_dtype(config: Any) -> str:
    """Return the type of what is unpacked, as torch names it, by the configuration object."""
    said = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return said if said in _FLOATS else _FLOATS[0]


def check_read(folder: Path, name: str, trust: bool) -> Family:
    """Return the family of a quantised checkpoint, by its small files alone, where it is read.

    Args:
        folder: that holds ``config.json``.
        name: what to call the model in errors.
        trust: whether the model's own code may be run.

    Raises:
        UnsupportedModelError: for another format, with the way out, and as for unquantised checkpoints.
    """
    record = json_object(folder / "config.json")
    if not isinstance(record.get("quantization_config"), dict):
        raise UnsupportedModelError(unread(name, str(quantised(record))))
    return read_config(folder, name, trust, packed=True)


@dataclass(frozen=True, slots=True)
class Plain:
    """What a quantised checkpoint becomes; nothing of it is read yet.

    Attributes:
        method: how it is quantised.
        dtype: of what is unpacked, as torch names it.
        record: its ``config.json`` without a word of that.
        kept: tensors that stay as they are.
        made: weights that are unpacked.
        note: for people.
    """

    method: str
    dtype: str
    record: Mapping[str, Any]
    kept: Mapping[str, StoredTensor]
    made: Mapping[str, Unpacked]
    note: str


def plain_of(folder: Path, name: str, trust: bool) -> Plain:
    """Return what a quantised checkpoint becomes, by the headers of its files.

    Args:
        folder: of the checkpoint, with its weights.
        name: what to call it in errors.
        trust: whether the model's own code may be run.

    Raises:
        UnsupportedModelError: for weights that are packed in another way, for tensors without a place, places without a
            tensor, and families without a row.
        UnknownModelError: when files are missing or damaged.
    """
    spec = check_read(folder, name, trust)
    record = json_object(folder / "config.json")
    config = build_config(name, folder, **({"trust_remote_code": trust} if spec.remote_code else {}))
    vars(config).pop("quantization_config", None)
    settings, dtype = record["quantization_config"], result_dtype(config)
    kept, made = _planned(name, stored_tensors(folder), method := settings["quant_method"], settings)
    _check(folder, name, config, spec, kept, made, dtype)
    plain = {key: value for key, value in record.items() if key not in _ABOUT}
    size = size_text(sum(prod(one.shape) for one in made.values()) * _bytes(dtype))
    note = (
        f"note: {name} is quantised ({method}): {len(made)} weights are read as the numbers that they stand for, in "
        f"{dtype} ({size}, in the cache), and so is the result; what was lost in rounding is not found again"
    )
    return Plain(method, dtype, {**plain, "dtype": dtype}, kept, made, note)


def unquantised(folder: Path, name: str, trust: bool, say: Callable[[str], None]) -> Path:
    """Return the folder of a quantised checkpoint's unquantised twin, in the cache.

    Args:
        folder, name, trust: as for :func:`plain_of`.
        say: told what is read and written, before it takes long.

    Raises:
        MultiprunerError: as :func:`plain_of`, before anything is written.
        OutputError: when the cache cannot be written; nothing half-written is left.
    """
    plain = plain_of(folder, name, trust)
    say(plain.note)
    weights = {tensor.file for tensor in stored_tensors(folder).values()}
    target = cache_folder() / "unquantised" / digest(UNPACKING, folder, weights)
    if is_whole(target):
        return target
    with output_errors(target), work_folder() as work:
        made = work / "model"
        made.mkdir()
        copy_beside(folder, made, _SETTINGS, "*.py")
        (made / "config.json").write_text(json.dumps(plain.record, indent=2) + "\n", encoding="utf-8")
        write_files(made, _files(name, plain))
        keep_folder(made, target, quantised=name, method=plain.method)
    return target


def _planned(
    name: str, stored: Mapping[str, StoredTensor], method: str, settings: Mapping[str, Any]
) -> tuple[dict[str, StoredTensor], dict[str, Unpacked]]:
    """Return the tensors that stay as they are and the weights that are unpacked, by name.

    Raises:
        UnsupportedModelError: when a tensor is packed in a way that is not read, or none is packed.
    """
    made: dict[str, Unpacked] = {}
    taken = {key for key in stored if _RUNNING.search(key)}
    for packing in FORMATS[method]:
        for packed in packing.find(stored, settings):
            own = packed.stem + packing.result
            if own not in made:
                with _refusing(name, own):
                    made[own] = Unpacked(packing, packed, tuple(map(int, packing.shape(packed))))
                taken |= {packed.stem + ending for ending in packed.tensors}
    kept = {key: tensor for key, tensor in stored.items() if key not in taken}
    other = [key for key, tensor in kept.items() if tensor.dtype not in WIDE]
    if other:
        about = f"{other[0]} is stored as {kept[other[0]].dtype}"
        raise UnsupportedModelError(
            f"{name} is quantised ({method}) in a way that is not read: {about}; start from the unquantised model"
        )
    if not made:
        raise UnsupportedModelError(
            f"{name} is quantised ({method}), says its config.json, but no weight in its files is; where they are "
            "unquantised, take quantization_config out of config.json"
        )
    return kept, made


@contextmanager
def _refusing(name: str, weight: str) -> Iterator[None]:
    """Turn what arithmetic says of tensors that do not fit each other into one line."""
    try:
        yield
    except MultiprunerError:
        raise
    except Exception as error:  # of every kind: these are files that nobody checked
        raise UnsupportedModelError(
            f"{name} is quantised, and its {weight} cannot be read: {reason_of(error)}; start from the unquantised "
            "model"
        ) from error


def _check(
    folder: Path,
    name: str,
    config: Any,
    spec: Family,
    kept: Mapping[str, StoredTensor],
    made: Mapping[str, Unpacked],
    dtype: str,
) -> None:
    """Hold what will be written against what the configuration asks for.

    Raises:
        UnsupportedModelError: naming what does not fit, or matrices that lie the other way.
    """
    kind = next(key for key, own in TORCH_NAMES.items() if own == dtype)
    there = {key: replace(next(iter(one.packed.tensors.values())), dtype=kind, shape=one.shape)
             for key, one in made.items()}  # fmt: skip
    head, embeddings = f"{spec.head}.weight", f"{spec.decoder}.{spec.embeddings}.weight"
    if config.tie_word_embeddings and head in made and embeddings in {*kept, *made}:
        raise UnsupportedModelError(
            f"config.json of {name} ties head and embeddings (tie_word_embeddings), but {head} is quantised by itself: "
            "set tie_word_embeddings to false to keep both"
        )
    account(folder, name, config, spec, {**kept, **there})
    if any(block.output and block.transposed for block in spec.blocks):
        raise UnsupportedModelError(
            f"{name} is quantised, and matrices of {spec.class_name} lie the other way (Conv1D): start from the "
            "unquantised model"
        )


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _files(name: str, plain: Plain) -> list[dict[str, Part]]:
    """Return what is written, in as many files as there were; an unpacked weight is in that of its numbers."""
    kept, made, dtype = plain.kept, plain.made, plain.dtype
    paths = {key: one.packed.tensors[one.packing.main].file for key, one in made.items()}
    files: dict[Path, dict[str, Part]] = {}
    for path in sorted({*paths.values(), *(tensor.file for tensor in kept.values())}):
        old = parts_of(path)
        files[path] = {key: old[key] for key, tensor in kept.items() if tensor.file == path}
    kind = next(key for key, own in TORCH_NAMES.items() if own == dtype)
    for key, one in made.items():
        size = prod(one.shape) * _bytes(dtype)
        files[paths[key]][key] = Part(kind, one.shape, size, partial(_chunks, name, key, one, dtype))
    return list(files.values())


def _chunks(name: str, key: str, one: Unpacked, dtype: str) -> Iterable[memoryview]:
    """Yield the bytes of a weight, of several matrices one after the other."""
    import torch

    several = len(one.packed.shape(one.packing.main)) > 2
    for number in range(one.shape[0]) if several else (None,):
        with _refusing(name, key):
            values: torch.Tensor = one.packing.values(one.packed, number).to(getattr(torch, dtype))
            if tuple(values.shape) != one.shape[several:]:
                raise ValueError(f"its numbers are of shape {list(values.shape)}, not {list(one.shape[several:])}")
        yield values.contiguous().flatten().view(torch.uint8).numpy().data
