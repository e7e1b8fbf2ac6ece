"""The trajectory on disk: one JSON line per step, so that a run killed at any point goes on where it was.

The first line says what run this is, the last one that the search is over. A torn last line (killed while
writing) is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.core.errors import OutputError
from multipruner.search import Step

FORMAT = "multipruner-trajectory"
VERSION = 1


@dataclass(frozen=True, slots=True)
class Trajectory:
    """What a ``trajectory.jsonl`` holds.

    Attributes:
        identity: everything that the decisions depend on, except the ratio.
        ratio: the target of the search.
        steps: its removals so far.
        finished: whether the search came to its end.
    """

    identity: Mapping[str, Any]
    ratio: float
    steps: tuple[Step, ...]
    finished: bool

    def differences(self, identity: Mapping[str, Any]) -> list[str]:
        """The entries in which another identity differs, as ``name: theirs -> ours``."""
        names = sorted(set(self.identity) | set(identity))
        return [
            f"{name}: {self.identity.get(name)!r} -> {identity.get(name)!r}"
            for name in names
            if self.identity.get(name) != identity.get(name)
        ]


class Journal:
    """Appends to a trajectory file; every line is on disk before the next step begins."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, identity: Mapping[str, Any], ratio: float) -> None:
        """Write the header of a new trajectory."""
        header = {"format": FORMAT, "version": VERSION, "ratio": ratio, "identity": dict(identity)}
        self._write(header, "w")

    def add(self, step: Step) -> None:
        """Append one step."""
        self._write(step.to_json())

    def finish(self) -> None:
        """Note that the search is over."""
        self._write({"finished": True})

    def _write(self, record: Mapping[str, Any], mode: str = "a") -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as stream:
                stream.write(json.dumps(record) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; make room and run the same command again, "
                "it goes on where it was"
            ) from error


def read_trajectory(path: Path) -> Trajectory | None:
    """Read a trajectory, cutting a torn last line off the file; ``None`` when it has not taken a step.

    Raises:
        OutputError: when the file is something else, or of a newer format.
    """
    if not path.exists():
        return None
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        path.write_bytes(whole)
    try:
        records = [json.loads(line) for line in whole.splitlines()]
    except ValueError:
        raise OutputError(f"{path} is damaged; remove it to start anew") from None
    if len(records) < 2:
        return None
    header, *rest = records
    ours = isinstance(header, dict) and {"identity", "ratio"} <= header.keys()
    if not ours or (header.get("format"), header.get("version")) != (FORMAT, VERSION):
        raise OutputError(f"{path} is not a trajectory that this version of multipruner reads")
    steps = tuple(Step.from_json(record) for record in rest if "finished" not in record)
    return Trajectory(header["identity"], header["ratio"], steps, any("finished" in record for record in rest))
