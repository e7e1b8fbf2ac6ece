"""The probes of a latency measurement on disk, one JSON line each, so that one killed at any point goes on."""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from multipruner.core import earlier
from multipruner.core.errors import OutputError
from multipruner.core.identity import differences
from multipruner.core.structure import Structure
from multipruner.storage.journal import Journal
from multipruner.storage.partial import header_of

FORMAT = {"format": "multipruner-latency-probes", "version": 1}


@dataclass(frozen=True, slots=True)
class ProbeRecord:
    """The samples of one probe, in milliseconds.

    Attributes:
        workload: its name.
        stage, number: which probe of the measurement it is.
        sizes: of the probe's blocks.
        plain: of whole passes without marks.
        marked: of whole passes with marks.
        blocks: of those passes' blocks, in the order in which they run.
    """

    workload: str
    stage: int
    number: int
    sizes: Structure
    plain: list[float]
    marked: list[float]
    blocks: list[list[float]]

    @property
    def calm(self) -> bool:
        """Whether the passes took about what the fastest did: other programs make most of them far slower."""
        return statistics.median(self.plain) <= 1.15 * min(self.plain)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {**values, "sizes": self.sizes.to_json()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> ProbeRecord:
        """Return the inverse of :meth:`to_json`."""
        return cls(**{**record, "sizes": Structure.from_json(record["sizes"])})


def check_journal(path: Path) -> None:
    """Refuse a file beside the output that no measurement left.

    Raises:
        OutputError: naming it.
    """
    if not os.path.lexists(path):
        return
    empty = path.is_file() and path.stat().st_size == 0
    if path.is_symlink() or not (empty or (header_of(path) or {}).get("format") == FORMAT["format"]):
        raise OutputError(f"{path} is no latency measurement; move it, or choose another output")


def discard(path: Path) -> None:
    """Remove what an interrupted measurement left.

    Raises:
        OutputError: when a process is writing to it, or it is something else.
    """
    check_journal(path)
    if not path.exists():
        return
    lock = path.with_name(path.name + ".lock")
    try:
        with FileLock(lock, timeout=0):
            path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)
    except Timeout:
        raise OutputError(f"another process is writing to {path}; wait, or choose another output") from None


class ProbeJournal:
    """Keeps what was measured; entered, no other process can write to it.

    Args:
        path: the file, or ``None`` to keep nothing.
        identity: everything that the times depend on.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._identity = dict(identity)
        way_out = "remove the file, or choose another output"
        self._journal = Journal(path, "latency measurement", way_out, header=FORMAT) if path else None
        self._known: dict[tuple[str, int | None, int, int], ProbeRecord] = {}
        self._lock = FileLock(path.with_name(path.name + ".lock"), timeout=0) if path else None

    def __enter__(self) -> ProbeJournal:
        """Read what is there.

        Raises:
            OutputError: when it is something else, of another measurement, or in use.
        """
        if self._journal is None or self._lock is None:
            return self
        path = self._journal.path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout:
            raise OutputError(f"another process is writing to {path}; wait, or choose another output") from None
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from error
        try:
            self._open(self._journal)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def find(self, workload: str, sizes: Structure, stage: int, number: int) -> ProbeRecord | None:
        """Return what was measured of a probe before, if it was."""
        record = self._known.get((workload, sizes.hidden, stage, number))
        return record if record is not None and record.sizes == sizes else None

    def add(self, record: ProbeRecord) -> None:
        """Keep one probe; it is on disk on return."""
        if self._journal is not None:
            self._journal.append([record.to_json()])

    def _open(self, journal: Journal) -> None:
        records = journal.refresh(ProbeRecord.from_json)
        if not journal.header:
            journal.begin(identity=self._identity)
        elif found := differences(earlier.shapes(journal.header["identity"]), self._identity):
            raise OutputError(
                f"{journal.path} holds a measurement with other settings ({'; '.join(found)}); remove it to start"
            )
        self._known = {(each.workload, each.sizes.hidden, each.stage, each.number): each for each in records}
