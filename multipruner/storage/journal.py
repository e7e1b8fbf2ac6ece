"""Files of JSON lines that are only ever appended to: a kill costs a line at most, and several processes may write."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, TypeVar

from filelock import FileLock

from multipruner.core.errors import ConfigError, NumericsError, OutputError

from .files import write_atomically

T = TypeVar("T")
BLOCK = 65536
"""Bytes looked at in one go when the end of the last whole line is searched."""


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that can be gone on with")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class Journal:
    """Appends records (JSON objects, one a line) and reads those that were appended since, by whichever process.

    A last line that a killed process left half-written is no record; it is cut off before the next one is written.

    Args:
        path: of the file; made, with its folder, by the first record.
        what: its records are, for messages.
        way_out: what somebody can do whose file is damaged, for messages.
        header: format and version of a first line that says what the others are of (its ``identity``), where there is
            one.
        shared: whether several processes write at once; they take turns by a lock file beside it.
        compact: whether lines go without spaces.
    """

    def __init__(
        self,
        path: Path,
        what: str,
        way_out: str,
        *,
        header: Mapping[str, Any] | None = None,
        shared: bool = False,
        compact: bool = False,
    ) -> None:
        self.path, self._what, self._way_out, self._shared = Path(path), what, way_out, shared
        self._separators = (",", ":") if compact else None
        self._format = header
        self.header: dict[str, Any] = {}
        self._read_to, self._lines = 0, 0

    def refresh(self, parse: Callable[[dict[str, Any]], T]) -> list[T]:
        """Return the records that were appended since the last look, own ones too; at first all. The header is none of
        them.

        Raises:
            OutputError: when a whole line is no record, or one that ``parse`` refuses, or the header is another one;
                names the line and the way out. Also when the file cannot be read.
        """
        if not self.path.exists():
            return []
        try:
            with self.path.open("rb") as stream:
                if stream.seek(0, os.SEEK_END) < self._read_to:  # another file than before
                    self._read_to = self._lines = 0
                stream.seek(self._read_to)
                data = stream.read()
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {error.strerror}") from error
        whole = data[: data.rfind(b"\n") + 1]  # the rest is torn, or still being written
        found = []
        for number, line in enumerate(whole.splitlines(), start=self._lines + 1):
            if number == 1 and self._format:
                self.header = self._parsed(number, line, self._checked)
            else:
                found.append(self._parsed(number, line, parse))
            self._lines = number
        self._read_to += len(whole)
        return found

    def begin(self, **header: Any) -> None:
        """Put a header into the place of all that was there.

        Raises:
            OutputError: when the file cannot be written.
        """
        write_atomically(self.path, self._line({**(self._format or {}), **header}))

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records in one write; they are on disk on return.

        Raises:
            NumericsError: when one holds NaN or infinity; none is written then.
            OutputError: when the file cannot be written.
        """
        data = "".join(map(self._line, records)).encode()
        if not data:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            turn = FileLock(f"{self.path}.lock") if self._shared else nullcontext()
            with turn, self.path.open("ab+") as stream:
                _cut_torn_line(stream)
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; mend that and run the same command again, it goes on "
                "where it was"
            ) from error

    def _line(self, record: Mapping[str, Any]) -> str:
        try:
            return json.dumps(record, separators=self._separators, allow_nan=False) + "\n"
        except ValueError:
            raise NumericsError(f"{self.path} keeps finite numbers only, not {record}") from None

    def _checked(self, header: dict[str, Any]) -> dict[str, Any]:
        if {**header, **(self._format or {})} != header or not isinstance(header["identity"], dict):
            raise ValueError("another format, or of another version of multipruner")
        return header

    def _parsed(self, number: int, line: bytes, parse: Callable[[dict[str, Any]], T]) -> T:
        try:
            record = _DECODER.decode(line.decode())
            if not isinstance(record, dict):
                raise ValueError("not a mapping")
            return parse(record)
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError, ConfigError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise OutputError(f"{self.path}, line {number}: no {self._what} ({reason}); {self._way_out}") from None


def _cut_torn_line(stream: IO[bytes]) -> None:
    """Truncate a file after its last newline, looking at no more of it than needed."""
    size = stream.seek(0, os.SEEK_END)
    whole = next(_newlines_from_the_end(stream, size), -1) + 1
    if whole < size:
        stream.truncate(whole)


def _newlines_from_the_end(stream: IO[bytes], end: int) -> Iterator[int]:
    """Tell where the last newline of every block is that has one, last block first."""
    while end:
        start = max(0, end - BLOCK)
        stream.seek(start)
        newline = stream.read(end - start).rfind(b"\n")
        if newline >= 0:
            yield start + newline
        end = start
