"""Local files and folders, as running text or as a table."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from multipruner.core.errors import CalibrationError
from multipruner.storage.text_files import COMPRESSED, ending, read_bytes, read_text

Table = Mapping[str, Sequence[Any]]
"""Columns by name."""
RUNNING = (".txt", ".raw")
"""Files whose lines are those of a running text rather than texts of their own."""
TABLES = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".arrow")
KNOWN = f"{', '.join((*RUNNING, *TABLES))}, compressed or not ({', '.join(COMPRESSED)})"
_SAVED = ("state.json", "dataset_dict.json")
"""What a folder holds that ``datasets`` saved."""


def is_known(path: Path) -> bool:
    """Tell whether a name ends as a file of text does."""
    return ending(path) in (*RUNNING, *TABLES)


def read(path: Path) -> Iterator[str | Table]:
    """Yield what a file holds, or every file of a folder in the order of their names: running texts and tables.

    Of a folder with a train split that split alone is read.

    Raises:
        CalibrationError: when something is damaged, of no known kind, or of several kinds.
    """
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        yield _guarded(path, _saved)
        return
    for file in _files(path) if path.is_dir() else [path]:
        if not is_known(file):
            raise CalibrationError(f"{file} is of no known kind: give {KNOWN}, .safetensors, or a folder of them")
        yield _guarded(file, read_text if ending(file) in RUNNING else _table)


def _guarded(path: Path, reader: Any) -> Any:
    """Return what a reader makes of a path.

    Raises:
        CalibrationError: for whatever it meets in a damaged file.
    """
    try:
        return reader(path)
    # not UTF-8, not JSON, not Parquet; pyarrow's own classes derive from these; JSON nested too deeply
    except (OSError, ValueError, TypeError, KeyError, NotImplementedError, OverflowError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        raise CalibrationError(f"cannot read {path}: {reason[:300]}") from error


def _files(folder: Path) -> list[Path]:
    inside = [path for path in sorted(folder.rglob("*")) if path.is_file() and is_known(path)]
    files = [path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not files:
        raise CalibrationError(f"the folder {folder} holds no text: it needs files {KNOWN}")
    train = [path for path in files if "train" in re.split(r"[^a-z]+", str(path.relative_to(folder)).lower())]
    kinds = sorted({ending(path) for path in train or files})
    if len(kinds) > 1:
        raise CalibrationError(f"the folder {folder} holds {', '.join(kinds)} files: give one of them, or one kind")
    return train or files


def _saved(folder: Path) -> Table:
    import datasets

    found = datasets.load_from_disk(str(folder))
    if isinstance(found, datasets.DatasetDict):
        if "train" not in found:
            raise ValueError(f"no split is called train: give a folder in it ({', '.join(map(str, found))})")
        found = found["train"]
    return _columns(found.with_format("arrow")[:])


def _table(path: Path) -> Table:
    kind = ending(path)
    if kind in (".csv", ".tsv"):
        return _separated(read_text(path), "\t" if kind == ".tsv" else ",")
    if kind == ".parquet":
        import pyarrow.parquet

        return _columns(pyarrow.parquet.read_table(io.BytesIO(read_bytes(path))))
    if kind == ".arrow":
        return _arrow(read_bytes(path))
    text = read_text(path)
    return _of_json(list(_lines(text)) if kind == ".jsonl" else json.loads(text or "[]"))


def _lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number:,} is no JSON: {error}") from error


def _of_json(data: Any) -> Table:
    """Return the columns of a JSON value: texts, objects, a table by columns, or any of them under the only key."""
    if isinstance(data, dict) and len(data) == 1:
        inner = next(iter(data.values()))
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            data = inner
    if isinstance(data, dict) and data and all(isinstance(values, list) for values in data.values()):
        return data
    if isinstance(data, list) and all(isinstance(row, str) for row in data):
        return {"text": data}
    if isinstance(data, list) and all(isinstance(row, dict) for row in data):
        return {name: [row.get(name) for row in data] for name in dict.fromkeys(key for row in data for key in row)}
    raise ValueError("texts, or objects with a text each, are expected")


def _separated(text: str, separator: str) -> Table:
    """Return a table whose first line names the columns; all values are taken as they stand."""
    import pyarrow
    from pyarrow import csv

    if not text.strip():
        return {}
    content = text.encode()
    read = csv.ReadOptions(use_threads=False, block_size=min(len(content) + 1, 1 << 30))
    parse = csv.ParseOptions(delimiter=separator, newlines_in_values=True)
    names = csv.open_csv(io.BytesIO(content), read_options=read, parse_options=parse).schema.names
    if len(set(names)) < len(names):
        raise ValueError(f"columns share a name: {', '.join(names)}")
    convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pyarrow.string()))
    return _columns(csv.read_csv(io.BytesIO(content), read, parse, convert))


def _arrow(content: bytes) -> Table:
    import pyarrow

    try:
        return _columns(pyarrow.ipc.open_file(content).read_all())
    except pyarrow.ArrowInvalid:  # as datasets writes them
        return _columns(pyarrow.ipc.open_stream(content).read_all())


def _columns(table: Any) -> Table:
    """Return the columns of an arrow table; numbers stand for what cannot be text: numbers, dates, bytes."""
    from pyarrow import types

    found = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type.value_type if types.is_dictionary(column.type) else column.type
        if name in found:
            raise ValueError(f"two columns are called {name}")
        textual = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
        if textual or types.is_nested(kind):
            found[name] = column.to_pylist()
        else:
            found[name] = [None] * len(column) if types.is_null(kind) else [0] * len(column)
    return found
