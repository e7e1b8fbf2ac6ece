"""Evaluations on disk: what was scored once, by whichever process, is never scored again.

One JSON line per evaluation. A line is the namespace (whatever the value depends on beside the candidate: a hash of
model, calibration text and settings), the candidate, the fidelity and the values. Losses that are not finite are kept
as ``null``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite
from pathlib import Path
from typing import Any

from multipruner.core.errors import ConfigError
from multipruner.core.structure import Structure
from multipruner.storage.journal import Journal

Values = tuple[float, ...]


class Memo:
    """The evaluations of one namespace in a file that many processes and searches may share.

    Of two values for one key the first one stays.

    Args:
        path: of the file; created, with its folder, by the first evaluation.
        namespace: a text that changes whenever a value would.

    Raises:
        ConfigError: when the namespace is empty.
        OutputError: when the file is damaged.
    """

    def __init__(self, path: Path, namespace: str) -> None:
        if not namespace:
            raise ConfigError("a memo needs a namespace: a hash of all that the values depend on")
        self.path = Path(path)
        self.namespace = namespace
        self._known: dict[tuple[str, int], Values] = {}
        way_out = "remove the line, or the file: what it holds is measured again"
        self._journal = Journal(self.path, "evaluation", way_out, shared=True, compact=True)
        self.refresh()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, candidate: Any, fidelity: int) -> Values | None:
        """Return the values of a candidate (a JSON value; a structure as any version wrote it), or ``None``."""
        return self._known.get((_key(candidate), fidelity))

    def add(self, entries: Iterable[tuple[Any, int, Sequence[float]]]) -> None:
        """Append (candidate, fidelity, values) for those that are new, in one write.

        Raises:
            OutputError: when the file cannot be written.
        """
        records: list[dict[str, Any]] = []
        for candidate, fidelity, values in entries:
            key = (_key(candidate), fidelity)
            if key in self._known:
                continue
            finite = [value if isfinite(value) else None for value in values]
            self._known[key] = tuple(inf if value is None else value for value in finite)
            records.append(
                {"namespace": self.namespace, "candidate": candidate, "fidelity": fidelity, "values": finite}
            )
        self._journal.append(records)

    def refresh(self) -> None:
        """Take in what other processes have appended since the last look.

        Raises:
            OutputError: when the file is damaged; names the line and the way out.
        """
        for evaluation in filter(None, self._journal.refresh(self._parsed)):
            self._known.setdefault(*evaluation)

    def _parsed(self, record: Mapping[str, Any]) -> tuple[tuple[str, int], Values] | None:
        """Return key and values of an evaluation; ``None`` for what else is in the file, and for those of other
        namespaces.
        """
        if record.get("namespace") != self.namespace:
            return None
        values = tuple(inf if value is None else float(value) for value in record["values"])
        return (_key(record["candidate"]), int(record["fidelity"])), values


def _key(candidate: Any) -> str:
    return json.dumps(_as_now(candidate), sort_keys=True, separators=(",", ":"))


def _as_now(candidate: Any) -> Any:
    """Return a candidate as it is written today: version 1 had structures as rows of layers, in a list."""
    if not isinstance(candidate, list):
        return candidate
    try:
        return Structure.from_json(candidate).to_json()
    except (ConfigError, TypeError, ValueError):  # another list, of a space that has such candidates
        return candidate
