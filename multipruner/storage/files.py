"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from multipruner.core.errors import OutputError, UnknownModelError


def write_atomically(path: Path, text: str) -> None:
    """Write a text aside, bring it to the disk, and rename it.

    Raises:
        OutputError: when the file cannot be written.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def write_history(path: Path, history: Iterable[Mapping[str, Any]]) -> None:
    """Write the records of a search as JSON lines, all of them (a resumed search brings the earlier ones along)."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in history))


def path_of(model: str) -> Path:
    """A model's name as a path, whatever it names.

    Raises:
        UnknownModelError: when it can be no path and no Hub id.
    """
    try:
        path = Path(model).expanduser()
        path.exists()  # what no file system takes, such as a name that is too long, fails here
    except (OSError, ValueError, RuntimeError) as error:
        raise UnknownModelError(f"{model[:60]!r} cannot be a path or a Hub id: {error}") from None
    if not model.strip():
        raise UnknownModelError("the model's name is empty; give a recipe, a folder, a .gguf file or a Hub id")
    return path
