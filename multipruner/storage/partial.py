"""The folder beside an output in which a command keeps what it has: marked, so that nobody else's is taken for it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from multipruner.core.errors import OutputError

MARK = ".multipruner"
FORMAT = "multipruner-partial"
LOCK = ".lock"
OURS = "multipruner-"
"""What every format of this program begins with."""


def header_of(path: Path) -> dict[str, Any] | None:
    """Return the first line of a file, or else all of it, if that is a JSON object in one of our formats."""
    try:
        with path.open(encoding="utf-8") as stream:
            first = stream.readline(1 << 20)
            record = _object(first)
            if record is None and path.suffix == ".json":
                record = _object(first + stream.read())
    except (OSError, ValueError):
        return None
    return record if record is not None and str(record.get("format")).startswith(OURS) else None


def _object(text: str) -> dict[str, Any] | None:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


class PartialFolder:
    """A folder that a command makes beside its output, and removes; never one of somebody else.

    Args:
        path: the folder.
        names: patterns of what the command writes there.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        self.path, self._names = path, tuple(names)
        self._made: list[Path] = []

    def claim(self) -> None:
        """Make the folder, or take one that an earlier command of ours left.

        Raises:
            OutputError: when it is somebody else's, a link, a file, or cannot be written.
        """
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise OutputError(f"{self.path} is {self._kind()}; move it, or choose another --output")
        try:
            foreign = self._foreign() if self.path.is_dir() else None
            if foreign is not None:
                raise OutputError(
                    f"{self.path} holds {foreign}, which multipruner did not write; move that folder, or choose "
                    "another --output"
                )
            missing = [folder for folder in self.path.parents if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = missing
            if header_of(self.path / MARK) is None:
                record = {"format": FORMAT, "version": 1, "token": uuid.uuid4().hex}
                (self.path / MARK).write_text(json.dumps(record) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write to {self.path}: {error.strerror}; choose another --output") from error

    def own(self, pattern: str = "*") -> list[Path]:
        """Return what a command of ours wrote there, of names that fit a pattern."""
        return [path for path in self.path.glob(pattern) if self._is_own(path)]

    def remove(self) -> None:
        """Remove what a command of ours wrote, the folder, and the parents made for it; others' files stay."""
        if header_of(self.path / MARK) is None:
            return
        try:
            for path in self.own():
                path.unlink(missing_ok=True)
            (self.path / LOCK).unlink(missing_ok=True)
            if all(path.name == MARK for path in self.path.iterdir()):
                (self.path / MARK).unlink(missing_ok=True)
                self.path.rmdir()
            for folder in self._made:  # the innermost first; one that is in use ends the loop
                folder.rmdir()
        except OSError:
            return

    def _is_own(self, path: Path) -> bool:
        """Tell by its name, or that of such a file while it is written (``.NAME.NUMBER``)."""
        beside = path.name.removeprefix(".").rpartition(".")[0] if path.name.startswith(".") else path.name
        return path.is_file() and any(fnmatch(name, each) for name in (path.name, beside) for each in self._names)

    def _foreign(self) -> str | None:
        """Return the name of something that no command of ours wrote; ``None`` where the mark, or every file, is
        ours.
        """
        if header_of(self.path / MARK) is not None:
            return None
        for path in sorted(self.path.iterdir()):  # a version without marks may have left it
            if path.name != LOCK and not (self._is_own(path) and self._content_is_own(path)):
                return path.name
        return None

    def _content_is_own(self, path: Path) -> bool:
        if path.stat().st_size == 0 or header_of(path) is not None:
            return True
        if path.suffix != ".safetensors":
            return False
        with path.open("rb") as stream:  # the state of a training says so in its header
            return b'"tuning"' in stream.read(1 << 16)

    def _kind(self) -> str:
        return "a link" if self.path.is_symlink() else "a file"
