"""The files of a tokenizer with fewer tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from multipruner.core.errors import UnsupportedModelError

from .ids import renumbered
from .kinds import Kind

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
_SAME = ("special_tokens_map.json", "chat_template.jinja", "chat_template.json")
"""Files that know tokens by their names alone."""
_FOLDERS = ("additional_chat_templates",)


def serialised(tokenizer: Any, name: str) -> dict[str, Any]:
    """Return what ``tokenizer.json`` would hold of a tokenizer.

    Raises:
        UnsupportedModelError: when it has no such form.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"the tokenizer of {name} has no tokenizer.json, and transformers make none of it, so that its vocabulary "
            "cannot be cut"
        )
    return json.loads(backend.to_str())


def special_ids(record: Mapping[str, Any]) -> dict[int, str]:
    """Return ids and names of the tokens that a tokenizer adds to its model's, or puts around text."""
    found = {added["id"]: added["content"] for added in record["added_tokens"]}
    for step in _steps(record.get("post_processor")):
        for token in (step.get("special_tokens") or {}).values():
            found |= dict(zip(token["ids"], token["tokens"], strict=True))
        found |= {pair[1]: pair[0] for pair in (step.get("sep"), step.get("cls")) if pair}
    return found


def cut_record(record: Mapping[str, Any], kind: Kind, numbers: Mapping[int, int]) -> dict[str, Any]:
    """Return what ``tokenizer.json`` holds of the tokenizer with fewer tokens.

    Args:
        record: of the dense one.
        kind: its model.
        numbers: new ids by the dense ones; all others are gone.
    """
    left = {token: numbers[number] for token, number in kind.numbers.items() if number in numbers}
    found = {**record, "model": kind.without(left)}
    if padding := record.get("padding"):
        found["padding"] = {**padding, "pad_id": numbers[padding["pad_id"]]} if padding["pad_id"] in numbers else None
    found["added_tokens"] = sorted(
        ({**added, "id": numbers[added["id"]]} for added in record["added_tokens"] if added["id"] in numbers),
        key=lambda added: added["id"],
    )
    found["post_processor"] = _renumbered_step(record.get("post_processor"), numbers)
    return found


def tokenizer_of(record: Mapping[str, Any], like: Any = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer that ``tokenizer.json`` describes.

    Args:
        record: what it holds.
        like: a tokenizer whose special tokens it shall have.
    """
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: value for name in names if (value := getattr(like, name, None)) is not None}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(record)), **special)


def write_files(
    folder: Path, source: Path, tokenizer: Any, record: Mapping[str, Any], numbers: Mapping[int, int]
) -> list[str]:
    """Write the tokenizer into a folder, and return the dense one's files that have no place there.

    Args:
        folder: that is there already.
        source: of the dense model.
        tokenizer: the dense one; where the source has no settings of it, they are taken from it.
        record: what :func:`cut_record` gave.
        numbers: new ids by the dense ones.
    """
    if not (source / SETTINGS).is_file():
        tokenizer.save_pretrained(folder)
    _write(folder / FILE, record)
    settings_file = (source if (source / SETTINGS).is_file() else folder) / SETTINGS
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    decoder = settings.pop("added_tokens_decoder", None)
    settings = renumbered(settings, numbers)
    if decoder is not None:
        kept = {int(key): value for key, value in decoder.items() if int(key) in numbers}
        settings["added_tokens_decoder"] = {str(numbers[key]): value for key, value in sorted(kept.items())}
    _write(folder / SETTINGS, settings)
    for path in (source / name for name in _SAME):
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    for path in (path for each in _FOLDERS for path in (source / each).glob("*.jinja")):
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    return _write_older(folder, source, record, numbers)


def _write_older(folder: Path, source: Path, record: Mapping[str, Any], numbers: Mapping[int, int]) -> list[str]:
    """Write what older readers take beside ``tokenizer.json``, and return names of files that none can be made of."""
    model = record["model"]
    if (source / "added_tokens.json").is_file():
        added = json.loads((source / "added_tokens.json").read_text(encoding="utf-8"))
        _write(folder / "added_tokens.json", {key: numbers[one] for key, one in added.items() if one in numbers})
    lost = [name for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json", "vocab.txt",
                              "tiktoken.model") if (source / name).exists()]  # fmt: skip
    lost += [path.name for path in source.glob("*.tiktoken")]
    if model["type"] != "BPE":
        return [*lost, *(name for name in ("vocab.json", "merges.txt") if (source / name).exists())]
    if (source / "vocab.json").is_file():
        _write(folder / "vocab.json", model["vocab"])
    if (source / "merges.txt").is_file():
        merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return lost


def _steps(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a post-processor, whatever they are nested in."""
    if step is not None:
        yield step
        for inner in step.get("processors") or ():
            yield from _steps(inner)


def _renumbered_step(step: Mapping[str, Any] | None, numbers: Mapping[int, int]) -> dict[str, Any] | None:
    if step is None:
        return None
    found = dict(step)
    if step.get("processors"):
        found["processors"] = [_renumbered_step(inner, numbers) for inner in step["processors"]]
    if step.get("special_tokens"):
        found["special_tokens"] = {
            name: {**token, "ids": [numbers[one] for one in token["ids"]]}
            for name, token in step["special_tokens"].items()
        }
    for key in ("sep", "cls"):
        if step.get(key):
            found[key] = [step[key][0], numbers[step[key][1]]]
    return found


def _write(path: Path, record: Any) -> None:
    path.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
