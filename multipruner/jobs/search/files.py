"""What a search keeps on disk: evaluations in the cache, its state beside the output, its results in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from multipruner.config.spellings import now_called
from multipruner.core.errors import OutputError
from multipruner.core.identity import differences, digest
from multipruner.jobs.workspace import Workspace
from multipruner.search import Memo
from multipruner.search.front import Front
from multipruner.storage.cache import cache_folder
from multipruner.storage.files import write_atomically
from multipruner.storage.journal import Journal

HISTORY = "search.jsonl"
"""A line that says what was searched, one line per generation, one for what was picked."""
FRONT = "front.json"
FORMAT = {"format": "multipruner-search", "version": 1}


def evaluations(identity: Mapping[str, Any]) -> Memo:
    """Return the evaluations of everything that has this identity, in the cache: shared by all searches and
    processes.
    """
    namespace = digest(dict(identity))
    return Memo(cache_folder() / "evaluations" / f"{namespace[:32]}.jsonl", namespace)


class SearchWorkspace(Workspace):
    """Where a search keeps its state until its folder appears."""

    def __enter__(self) -> SearchWorkspace:
        super().__enter__()
        return self

    @property
    def journal_path(self) -> Path:
        """The history, which goes into the finished folder."""
        return self.partial / HISTORY

    def checkpoint_path(self, algorithm: str) -> Path:
        """Return the state of one algorithm's search after its last generation."""
        return self.partial / f"{algorithm}.json"

    def open_search(self, identity: Mapping[str, Any], overwrite: bool) -> bool:
        """Claim the folder for a search; whether it goes on with an interrupted or a finished one.

        Raises:
            OutputError: when the folder holds something else, unless overwritten.
        """
        header = {**FORMAT, "identity": dict(identity)}
        for folder in (self.partial, self.output):
            known = _read_header(folder / HISTORY)
            if known == json.loads(json.dumps(dict(identity))):
                if folder is self.output:
                    self._give_up_partial()
                    write_history(self.journal_path, header, ())
                return True
            if (known is not None or _holds_run(folder)) and not overwrite:
                raise OutputError(_conflict(folder, known, identity))
        self._give_up_partial()
        write_history(self.journal_path, header, ())
        return False

    def _give_up_partial(self) -> None:
        """Remove the state of another run."""
        for path in self._folder.own("*.json*"):
            path.unlink()

    def __exit__(self, *error: object) -> None:
        """Let others have the folder; leave nothing of a search that has not finished a generation."""
        if not any(self.partial.glob("*.json")) and not _holds_run(self.partial):
            self._folder.remove()
        self._lock.release()  # last: what another process has begun here must not be removed


def _holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("trajectory.jsonl", "measurements.jsonl", "plan.json"))


def _read_header(path: Path) -> dict[str, Any] | None:
    """Return what a history is of, if it is one."""
    try:
        with path.open(encoding="utf-8") as stream:
            header = json.loads(stream.readline())
        return header["identity"] if header["format"] == FORMAT["format"] else None
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _conflict(folder: Path, known: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> str:
    what = "another run, no search"
    if known is not None:
        ours = json.loads(json.dumps(dict(identity)))
        found = differences(now_called(known), now_called(ours))
        what = f"a search with other settings ({'; '.join(found)})"
    return f"{folder} holds {what}; choose another --output, or give that up with --overwrite"


def write_history(path: Path, header: Mapping[str, Any], records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a history: its header and its records, one JSON line each."""
    write_atomically(path, "".join(json.dumps(record) + "\n" for record in (header, *records)))


def read_history(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return header and records of a history; a torn last line (the writer was killed) does not count.

    Raises:
        OutputError: when it is none, or a line inside is damaged.
    """
    journal = Journal(path, "line of a search history", "make the search again", header=FORMAT)
    records = journal.refresh(dict)
    if not journal.header:
        raise OutputError(f"{path} is no search history: there is no such file, or nothing in it")
    return journal.header, records


def front_record(front: Front[Any], picked: int, encode: Any) -> str:
    """Return what ``front.json`` holds: the points with their values, and which one became the model."""
    record = {
        "format": "multipruner-front",
        "version": 1,
        "kind": front.kind,
        "objectives": list(front.objectives),
        "picked": picked,
        **front.to_json(encode),
    }
    return json.dumps(record, indent=1) + "\n"
