"""A checkpoint in the cache that is made of another one's files: what is copied beside its weights, and its name."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path

from multipruner.storage.tensor_bytes import Part, write_index, write_parts
from multipruner.storage.tensor_headers import INDEX, SINGLE

from .accounting import PLAN_FILE

_BESIDE = ("*.json", "*.jinja", "*.model", "*.model.v*", "*.txt", "*.tiktoken", "additional_chat_templates/*.jinja")
"""Tokenizer and generation settings, with what else is small."""
_NOT_BESIDE = ("config.json", INDEX, PLAN_FILE, "report.json")


def digest(version: int, folder: Path, weights: Collection[Path]) -> str:
    """Return what files are called by in the cache: where they are, how large, and when they were written.

    Args:
        version: of what is made of them.
        folder: that holds them.
        weights: those that tensors are in; the small ones are found.
    """
    small = {path for each in _BESIDE for path in folder.glob(each)}
    about = [(str(path.resolve()), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in {*weights, *small}]
    text = json.dumps([version, str(folder.resolve()), sorted(about)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def copy_beside(folder: Path, made: Path, without: Collection[str] = (), *more: str) -> None:
    """Copy what lies beside a model's weights: tokenizer, chat templates, generation settings.

    Args:
        folder: where it lies.
        made: where it goes.
        without: names of files that stay behind, besides configuration and index.
        *more: patterns of further files.
    """
    for path in {path for each in (*_BESIDE, *more) for path in folder.glob(each)}:
        if path.is_file() and path.name not in {*_NOT_BESIDE, *without}:
            (made / path.relative_to(folder)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, made / path.relative_to(folder))


def write_files(folder: Path, files: list[dict[str, Part]]) -> None:
    """Write a checkpoint's tensors.

    Args:
        folder: that is there already.
        files: the tensors of every file, by name.
    """
    if len(files) == 1:
        write_parts(folder / SINGLE, files[0], lambda done: None)
        return
    named = {f"model-{number:05}-of-{len(files):05}.safetensors": each for number, each in enumerate(files, 1)}
    for file, each in named.items():
        write_parts(folder / file, each, lambda done: None)
    write_index(folder / INDEX, named)
