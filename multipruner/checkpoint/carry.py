"""What a smaller model takes over from the folder of the dense one, byte by byte: tokenizer, generation settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from .run_folder import PROCESSOR, TOKENIZER

GENERATION = "generation_config.json"
_SAME = ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id", "padding_side", "chat_template")
_SETTINGS = "tokenizer_config.json"
SAMPLES = (
    "the quiet river",
    " leading  space",
    "naïve über 雨 книга\nline\tTab",
    "def f(x):\n    return 2048",
    "don't!",
)
"""Texts that tell tokenizers apart: spaces, other scripts, code, digits, apostrophes."""


def folder_of(path_or_id: str, revision: str | None = None) -> Path | None:
    """Tell where the files of a model lie: its folder, or that of its revision in the Hub's cache; ``None`` if
    nowhere.
    """
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    found = try_to_load_from_cache(path_or_id, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def write_generation(folder: Path, model: PreTrainedModel, source: Path | None) -> None:
    """Write the generation settings as the dense model has them, valid or not: what was greedy stays greedy.

    transformers refuse to save some that they load, such as a temperature without sampling. Where the dense folder has
    no such file the smaller one has none either.
    """
    path = folder / GENERATION
    path.unlink(missing_ok=True)
    if source is not None:
        if (source / GENERATION).is_file():
            shutil.copyfile(source / GENERATION, path)
    elif isinstance(settings := getattr(model, "generation_config", None), GenerationConfig):
        path.write_text(settings.to_json_string(use_diff=True), encoding="utf-8")


def write_tokenizer(folder: Path, tokenizer: Any, source: Path | None) -> None:
    """Copy the tokenizer's files, so that whatever reads the dense ones reads these; save it where there are none.

    ``config.json`` must be there already: transformers choose a tokenizer's class by the model's type too. Where that
    leads to another tokenizer than the dense one, its class is written into the settings, and if that does not
    help, transformers save the tokenizer in their own way. One that brings code of its own is always saved.
    """
    if source is None or not _copied(folder, source) or "auto_map" in _settings(folder):
        tokenizer.save_pretrained(folder)
        return
    if opens_as(folder, tokenizer):
        return
    named = {**_settings(folder), "tokenizer_class": type(tokenizer).__name__}
    (folder / _SETTINGS).write_text(json.dumps(named, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if opens_as(folder, tokenizer):
        return
    for path in folder.iterdir():
        if path.is_file() and _is_tokenizer(path.name):
            path.unlink()
    tokenizer.save_pretrained(folder)


def opens_as(folder: Path, tokenizer: Any) -> bool:
    """Tell whether a folder's tokenizer, opened without running code, does what the one in memory does."""
    try:
        with _quiet():
            opened = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        return False
    same = all(getattr(opened, name, None) == getattr(tokenizer, name, None) for name in _SAME)
    return same and len(opened) == len(tokenizer) and ids_of(opened) == ids_of(tokenizer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from warning about a model's type that only code knows, which is not run here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def ids_of(tokenizer: Any, texts: Sequence[str] = SAMPLES) -> list[list[int]]:
    """Return the token ids of texts, by default of those that tell tokenizers apart."""
    return [list(tokenizer(text)["input_ids"]) for text in texts]


def write_processor(folder: Path, processor: Any, source: Path | None) -> None:
    """Copy the file of an image processor; save it where there is none."""
    if source is not None and (source / PROCESSOR).is_file():
        shutil.copyfile(source / PROCESSOR, folder / PROCESSOR)
    else:
        processor.save_pretrained(folder)


def _copied(folder: Path, source: Path) -> list[Path]:
    """Return copies of a model's tokenizer files, links followed."""
    copies = []
    for path in sorted((*source.iterdir(), *source.glob("additional_chat_templates/*"))):
        name = path.relative_to(source)
        if path.is_file() and _is_tokenizer(name.as_posix()):
            (folder / name).parent.mkdir(exist_ok=True)
            copies.append(Path(shutil.copyfile(path, folder / name)))
    return copies


def _is_tokenizer(name: str) -> bool:
    return any(fnmatch(name, each) for each in TOKENIZER)


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / _SETTINGS
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record if isinstance(record, dict) else {}
