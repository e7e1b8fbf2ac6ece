"""The text tower of a model of several modalities, taken out of its files into an ordinary checkpoint in the cache.

Tensors are copied as bytes, one after the other. The folder is named after what the files are, so a tower is taken out
once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from multipruner.core.errors import ConfigError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import Family, spec_for
from multipruner.core.families.towers import NOW, TEXT, TOWERS, Tower
from multipruner.storage.cache import cache_folder, is_whole, keep_folder, work_folder
from multipruner.storage.files import output_errors
from multipruner.storage.memory import size_text
from multipruner.storage.tensor_bytes import parts_of
from multipruner.storage.tensor_headers import StoredTensor, check_tied, json_object, stored_tensors

from .intake.accounting import build_config, has_plan, reason_of
from .intake.derived import copy_beside, digest, write_files
from .intake.recognise import quantised

EXTRACTION = 1
"""Raised when what is written changes."""


def tower_in(config: str | Path) -> Tower | None:
    """Return the row of a wrapper, by its ``config.json``; ``None`` for any other file."""
    try:
        return TOWERS.get(str(json_object(Path(config)).get("model_type")))
    except UnknownModelError:  # whoever reads it next says so
        return None


def text_config(folder: Path, name: str) -> tuple[Tower, Any, Family]:
    """Return the row of a wrapper, and configuration and family of its text tower as a model by itself.

    Args:
        folder: of the wrapper; its ``config.json`` alone is read.
        name: what to call it in errors.

    Raises:
        UnsupportedModelError: for a family without a row, and for quantised or pruned weights.
        ConfigError: when the configuration cannot be meant.
    """
    from transformers import AutoConfig

    record = json_object(folder / "config.json")
    tower = TOWERS[str(record.get("model_type"))]
    if has_plan(folder):
        raise UnsupportedModelError(f"{name} is pruned already; start from the dense model, at a higher ratio")
    if method := quantised(record):
        raise UnsupportedModelError(
            f"{name} is quantised ({method}), and a model of several modalities: the two together are not read; start "
            "from the unquantised model"
        )
    whole = build_config(name, folder)
    said = every_key(getattr(whole, TEXT))
    kind = str(said.pop("model_type", None))
    for key in ("_name_or_path", "transformers_version", "architectures"):
        said.pop(key, None)
    rope = said.get("rope_parameters")
    if isinstance(rope, dict):
        said["rope_parameters"] = {key: value for key, value in rope.items() if key not in tower.rotary}
    said["tie_word_embeddings"] = bool(getattr(whole, "tie_word_embeddings", False))
    said["dtype"] = said.get("dtype") or every_key(whole).get("dtype")
    family = tower.text.get(kind, kind)
    try:
        spec = spec_for({**said, "model_type": family})
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"{name} is a model of several modalities ({tower.model_type}), and its text tower: {error}"
        ) from None
    try:
        config = AutoConfig.for_model(family, **{**said, "architectures": [spec.class_name]})
    except Exception as error:  # of every kind: the class meets values that nobody checked
        raise ConfigError(f"{TEXT} of {name} cannot be meant: {reason_of(error)}") from error
    return tower, config, spec


def every_key(config: Any) -> dict[str, Any]:
    """Return what a configuration object says, defaults too, as JSON has it."""
    return json.loads(config.to_json_string(use_diff=False))


def text_model(folder: Path, name: str, say: Callable[[str], None]) -> Path:
    """Return the folder of a wrapper's text tower: an ordinary checkpoint of a family, in the cache.

    Args:
        folder: of the wrapper, with its weights.
        name: what to call it in errors.
        say: told before what takes long.

    Raises:
        UnsupportedModelError: for a family without a row, for quantised or pruned weights, and for files without a
            text tower.
        UnknownModelError: when files are missing or damaged.
        OutputError: when the cache cannot be written; nothing half-written is left.
    """
    tower, config, spec = text_config(folder, name)
    stored = stored_tensors(folder)
    names = tower.names(stored, spec)
    if not names:
        raise UnsupportedModelError(
            f"{name} is a model of several modalities ({tower.model_type}), but no tensor in its files is of a text "
            f"tower ({NOW[0]}* or {tower.earlier[0]}*); take files as transformers' {tower.class_name} saves them"
        )
    target = cache_folder() / "towers" / digest(EXTRACTION, folder, {tensor.file for tensor in stored.values()})
    if is_whole(target):
        return target
    parts = {path: parts_of(path) for path in sorted({tensor.file for tensor in stored.values()})}
    own = {path: {names[key]: part for key, part in each.items() if key in names} for path, each in parts.items()}
    size = size_text(sum(part.nbytes for each in own.values() for part in each.values()))
    say(f"taking the text tower ({spec.model_type}, {size}) out of {name} (once, into the cache)")
    config.tie_word_embeddings = config.tie_word_embeddings and _one_matrix(name, stored, names, spec)
    with output_errors(target), work_folder() as work:
        made = work / "model"
        made.mkdir()
        config.save_pretrained(made)
        copy_beside(folder, made)
        write_files(made, [each for each in own.values() if each])
        keep_folder(made, target, wrapper=name)
    return target


def _one_matrix(name: str, stored: Mapping[str, StoredTensor], names: Mapping[str, str], spec: Family) -> bool:
    """Tell whether head and embeddings are the same; where files hold two matrices, stock classes keep both."""
    wanted = {f"{spec.decoder}.{spec.embeddings}.weight", f"{spec.head}.weight"}
    found = [key for key, own in names.items() if own in wanted]
    try:
        if len(found) == len(wanted):
            check_tied(name, stored, *found)
    except UnsupportedModelError:
        return False
    return True
