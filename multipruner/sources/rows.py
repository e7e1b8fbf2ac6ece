"""Rows of text for calibration: from the Hub through ``datasets``, or from a local file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from multipruner.core.errors import CalibrationError
from multipruner.storage.hub import HubUnreachable, offline, repo_info

HUB_TEXTS: dict[str, dict[str, Any]] = {
    "alpaca": {"path": "tatsu-lab/alpaca"},
    "wikitext2": {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1"},
    "c4": {"path": "allenai/c4", "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "streaming": True},
}
"""What ``datasets.load_dataset`` is asked for; the train split and its ``text`` column are used."""
RUNNING_TEXT = ("wikitext2", ".txt", ".raw")
"""Sources whose rows are lines of a running text rather than texts of their own."""
TABLES = (".jsonl", ".json", ".parquet")
IDS = ".safetensors"
TOKENS_PER_ROW = 50
"""Rows taken from a stream are so many that this average length suffices."""


def rows_of(source: str, column: str | None, tokens: int, length: int) -> list[str]:
    """The texts of a source in their own order, empty and repeated ones left out.

    Running text is cut into stretches of about twice ``length`` tokens, so that a shuffled row is still coherent.

    Args:
        source: a name in :data:`HUB_TEXTS` or a local file.
        column: the column of a local table that holds the text.
        tokens: how many tokens are wanted at least (bounds what is read of a stream).
        length: tokens per sequence.

    Raises:
        CalibrationError: when the source does not exist, is damaged or empty, or has no such column.
        HubUnreachable: when the Hub cannot be asked and the data set is not cached.
    """
    texts = _from_hub(source, tokens) if source in HUB_TEXTS else _from_file(Path(source).expanduser(), column)
    if source in RUNNING_TEXT or Path(source).suffix in RUNNING_TEXT:
        texts = stretches("\n".join(texts), 8 * length)
    rows = list(dict.fromkeys(text for text in texts if text.strip()))
    if not rows:
        raise CalibrationError(f"{source} is empty: it holds no text")
    return rows


def stretches(text: str, size: int) -> list[str]:
    """A text cut into pieces of at most ``size`` characters, at line ends or else at blanks where it can be."""
    return re.findall(rf"[\s\S]{{1,{size}}}(?:\n|\Z)|[\s\S]{{1,{size}}}(?=\s)|[\s\S]{{1,{size}}}", text)


def _from_hub(source: str, tokens: int) -> list[str]:
    """The train split of a data set; without the Hub, what ``datasets`` has cached of it."""
    arguments = {"split": "train", **HUB_TEXTS[source]}
    repo = arguments["path"]
    import datasets
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        repo_info(repo, "dataset")
        rows = datasets.load_dataset(**arguments)
    except HubUnreachable as error:
        try:
            with offline():
                rows = datasets.load_dataset(**arguments)
        except Exception:  # whatever datasets meets without a network: it is not cached
            raise error from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError, OSError, ValueError) as error:
        raise CalibrationError(f"cannot load {repo} from the Hub: {' '.join(str(error).split())}") from error
    if arguments.get("streaming"):
        return [row["text"] for row in islice(rows, 1000 + tokens // TOKENS_PER_ROW)]
    return list(rows["text"])


def _from_file(path: Path, column: str | None) -> list[str]:
    if not path.is_file():
        known = ", ".join((*HUB_TEXTS, "self"))
        raise CalibrationError(f"no calibration text {str(path)!r}: give {known}, or a local file")
    try:
        if path.suffix in (".txt", ".raw"):
            return path.read_text(encoding="utf-8").splitlines()
        if path.suffix in TABLES:
            return _column(path, _columns(path), column)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, not JSON, not Parquet
        raise CalibrationError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    raise CalibrationError(f"{path} is of no known kind: give .txt, .raw, {', '.join(TABLES)} or {IDS}")


def _columns(path: Path) -> Mapping[str, Sequence[Any]]:
    """A table's columns by name."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pydict()
    text = path.read_text(encoding="utf-8")
    data = [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else None
    data = json.loads(text) if data is None else data
    if isinstance(data, dict) and data and all(isinstance(values, list) for values in data.values()):
        return data
    if isinstance(data, list) and all(isinstance(row, str) for row in data):
        return {"text": data}
    if isinstance(data, list) and all(isinstance(row, dict) for row in data):
        return {name: [row.get(name) for row in data] for name in dict.fromkeys(key for row in data for key in row)}
    raise ValueError("texts, or objects with a text each, are expected")


def _column(path: Path, columns: Mapping[str, Sequence[Any]], wanted: str | None) -> list[str]:
    """The values of the wanted column: the one named, else ``text``, else the only one that holds text."""
    if not any(map(len, columns.values())):
        return []
    holding_text = [
        name
        for name, values in columns.items()
        if any(isinstance(value, str) for value in values)
        and all(isinstance(value, str) or value is None for value in values)
    ]
    name = wanted or ("text" if "text" in holding_text else None)
    if name is None and len(holding_text) == 1:
        name = holding_text[0]
    if name not in holding_text:
        problem = f"no text column {wanted!r}" if wanted else "no column that is clearly the text"
        raise CalibrationError(
            f"{path} has {problem}; columns with text: {', '.join(holding_text) or 'none'}; choose with --text-column"
        )
    return [value for value in columns[name] if value is not None]
