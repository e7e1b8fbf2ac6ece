"""What safetensors files hold, by their headers: names, shapes and types; tensors where two must be the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.core.errors import UnknownModelError, UnsupportedModelError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""Where transformers looks for weights, in this order."""
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""Types as torch names them, by safetensors' names of them."""
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor on disk.

    Attributes:
        file: that holds it.
        dtype: as safetensors names it, such as ``BF16`` or ``F8_E4M3``.
        shape: of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that transformers reads weights from.

    Raises:
        UnknownModelError: when there is none, an index cannot be read, or two sets of weights lie side by side.
    """
    single, index = folder / SINGLE, folder / INDEX
    if single.exists() and not index.exists():
        return [single]
    table = json_object(index).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise UnknownModelError(f"{index} has no weight_map from tensors to files; download it again")
    names = sorted(set(table.values()))
    if any(Path(name).name != name for name in names):
        raise UnknownModelError(f"{index} names files outside of the folder; download it again")
    if single.exists() and names != [SINGLE]:
        raise UnknownModelError(
            f"{folder} holds two sets of weights, {SINGLE} and those of {INDEX}; take one of them away"
        )
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise UnknownModelError(
            f"{folder} lacks {len(missing)} of {len(names)} files with weights: {', '.join(missing[:3])}; download them"
        )
    return [folder / name for name in names]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor that a model folder holds, by name.

    Raises:
        UnknownModelError: when a file is missing, damaged, not downloaded, or disagrees with the index.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, StoredTensor] = {}
    for path in weight_files(folder):
        check_downloaded(path)
        try:
            with safe_open(path, "np") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if name in found:
                        raise UnknownModelError(f"{name} is in two files, {found[name].file.name} and {path.name}")
                    part = file.get_slice(name)
                    found[name] = StoredTensor(path, str(part.get_dtype()), tuple(part.get_shape()))
        except (OSError, ValueError, SafetensorError) as error:
            raise UnknownModelError(
                f"cannot load {folder.name}: {path.name} is no whole safetensors file ({error}); download it again"
            ) from error
    if (folder / INDEX).exists():
        lost = sorted(set(json_object(folder / INDEX)["weight_map"]) - set(found))
        if lost:
            raise UnknownModelError(f"{folder / INDEX} names tensors that no file holds, such as {lost[0]}")
    return found


def check_tied(name: str, found: Mapping[str, StoredTensor], embeddings: str, head: str) -> None:
    """Tell where files hold a head beside tied embeddings, both must be the same matrix.

    Raises:
        UnsupportedModelError: when they differ.
    """
    import torch
    from safetensors import safe_open

    if not (embeddings in found and head in found):
        return
    with safe_open(found[embeddings].file, "pt") as first, safe_open(found[head].file, "pt") as second:
        one, other = first.get_slice(embeddings), second.get_slice(head)
        parts = (slice(begin, begin + 4096) for begin in range(0, found[embeddings].shape[0], 4096))
        if found[embeddings].shape != found[head].shape or not all(
            torch.equal(one[part].double(), other[part].double()) for part in parts
        ):
            raise UnsupportedModelError(
                f"config.json of {name} ties head and embeddings (tie_word_embeddings), but {head} and {embeddings} "
                f"differ, and readers disagree on which is meant: set tie_word_embeddings to false to keep both, or "
                f"take {head} out of the file"
            )


def json_object(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        UnknownModelError: when the file cannot be read, or holds something else.
    """
    check_downloaded(path)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise UnknownModelError(f"cannot read {path}: {reason}") from None
    if not isinstance(record, dict):
        raise UnknownModelError(f"{path} must hold a JSON object, not {type(record).__name__}; download it again")
    return record


def check_downloaded(path: Path) -> None:
    """Refuse the pointer that a clone without Git LFS has in place of a large file.

    Raises:
        UnknownModelError: naming the command that fetches the file.
    """
    try:
        with path.open("rb") as stream:
            pointer = stream.read(len(_POINTER)) == _POINTER
    except OSError:
        return
    if pointer:
        raise UnknownModelError(
            f"{path} is a pointer of Git LFS, the large file itself was not downloaded; run `git lfs pull` there, or "
            "download the model with `hf download`"
        )
