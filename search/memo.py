"""Evaluations on disk: what was scored once, by whichever process, is never scored again.

One JSON line per evaluation. A line is the namespace (whatever the value depends on beside the candidate: a hash of
model, calibration text and settings), the candidate, the fidelity and the values. Losses that are not finite are kept
as ``null``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from math import inf, isfinite
from pathlib import Path
from typing import IO, Any

from filelock import FileLock

from multipruner.core.errors import ConfigError, OutputError

Values = tuple[float, ...]
BLOCK = 65536  # bytes looked at in one go when the last line is searched


class Memo:
    """The evaluations of one namespace in a file that many processes and searches may share.

    A line that was torn by a kill is cut off before the next one is written; lines are written under a lock file
    beside the memo. Of two values for one key the first one stays.

    Args:
        path: of the file; created, with its folder, by the first evaluation.
        namespace: a text that changes whenever a value would.

    Raises:
        ConfigError: when the namespace is empty.
    """

    def __init__(self, path: Path, namespace: str) -> None:
        if not namespace:
            raise ConfigError("a memo needs a namespace: a hash of all that the values depend on")
        self.path = Path(path)
        self.namespace = namespace
        self.damaged = 0  # whole lines that are no evaluations
        self._known: dict[tuple[str, int], Values] = {}
        self._read_to = 0
        self.refresh()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, candidate: Any, fidelity: int) -> Values | None:
        """The values of a candidate (a JSON value), or ``None``."""
        return self._known.get((_key(candidate), fidelity))

    def add(self, entries: Iterable[tuple[Any, int, Sequence[float]]]) -> None:
        """Append (candidate, fidelity, values) for those that are new, in one write.

        Raises:
            OutputError: when the file cannot be written.
        """
        lines: list[str] = []
        for candidate, fidelity, values in entries:
            key = (_key(candidate), fidelity)
            if key in self._known:
                continue
            self._known[key] = tuple(values)
            finite = [value if isfinite(value) else None for value in values]
            record = {"namespace": self.namespace, "candidate": candidate, "fidelity": fidelity, "values": finite}
            lines.append(json.dumps(record, separators=(",", ":")) + "\n")
        if lines:
            self._append("".join(lines).encode())

    def _append(self, data: bytes) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock"), self.path.open("ab+") as stream:
                _cut_torn_line(stream)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; mend that and run the same command again, it goes on "
                "where it was"
            ) from error

    def refresh(self) -> None:
        """Take in what other processes have appended since the last look."""
        if not self.path.exists():
            return
        with self.path.open("rb") as stream:
            if stream.seek(0, os.SEEK_END) < self._read_to:  # another file than before
                self._read_to = 0
            stream.seek(self._read_to)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]  # the rest is torn, or still being written
        self._read_to += len(whole)
        for line in whole.splitlines():
            try:
                record = json.loads(line)
                if record["namespace"] != self.namespace:
                    continue
                values = tuple(inf if value is None else float(value) for value in record["values"])
                self._known.setdefault((_key(record["candidate"]), int(record["fidelity"])), values)
            except (KeyError, TypeError, ValueError):
                self.damaged += 1


def _key(candidate: Any) -> str:
    return json.dumps(candidate, sort_keys=True, separators=(",", ":"))


def _cut_torn_line(stream: IO[bytes]) -> None:
    """Truncate a file after its last newline, looking at no more of it than needed."""
    size = end = stream.seek(0, os.SEEK_END)
    whole = 0
    while end:
        start = max(0, end - BLOCK)
        stream.seek(start)
        newline = stream.read(end - start).rfind(b"\n")
        if newline >= 0:
            whole = start + newline + 1
            break
        end = start
    if whole < size:
        stream.truncate(whole)
