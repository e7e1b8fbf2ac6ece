"""The trajectory on disk: one JSON line per step, so that a run killed at any point goes on where it was.

The first line says what run this is, the last one that the search is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.search import Step
from multipruner.storage.journal import Journal

FORMAT = {"format": "multipruner-trajectory", "version": 1}


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


class TrajectoryJournal(Journal):
    """Appends to a trajectory file; every line is on disk before the next step begins."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "step of a trajectory", "remove the file to start anew", header=FORMAT)

    def start(self, identity: Mapping[str, Any], ratio: float) -> None:
        """Write the header of a new trajectory."""
        self.begin(ratio=ratio, identity=dict(identity))

    def add(self, step: Step) -> None:
        """Append one step."""
        self.append([step.to_json()])

    def finish(self) -> None:
        """Note that the search is over."""
        self.append([{"finished": True}])


def read_trajectory(path: Path) -> Trajectory | None:
    """Read a trajectory; ``None`` when it has not taken a step.

    Raises:
        OutputError: when the file is damaged, something else, or of a newer format.
    """
    journal = TrajectoryJournal(path)
    entries = journal.refresh(lambda record: None if "finished" in record else Step.from_json(record))
    if not entries:
        return None
    steps = tuple(filter(None, entries))
    return Trajectory(journal.header["identity"], journal.header["ratio"], steps, None in entries)
