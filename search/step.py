"""One removal of a greedy path, what a list of them leads to, and the file that keeps them.

A ``trajectory.jsonl`` has one line per step, so that a run killed at any point goes on where it was. The first line
says what run this is, the last one that the search is over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from multipruner.core.axes import Dimension
from multipruner.core.errors import ConfigError
from multipruner.core.structure import BlockKind, LayerSize, Structure
from multipruner.storage.journal import Journal

FORMAT = {"format": "multipruner-trajectory", "version": 1}


@dataclass(frozen=True, slots=True)
class Step:
    """One removal.

    Attributes:
        stage: the dimension being pruned.
        kind, layer: the block that was removed or narrowed.
        size: the layer's size afterwards, (query heads, KV heads, channels).
        loss: calibration loss afterwards, in nats.
        ratio, backbone_ratio: removed so far, of all parameters and of the decoder layers alone.
        candidates: how many were compared.
        runner_up: the second best as (kind, layer), or ``None``.
        runner_up_loss: its loss.
        seconds: the time the step took (not compared).
    """

    stage: Dimension
    kind: BlockKind
    layer: int
    size: tuple[int, int, int]
    loss: float
    ratio: float
    backbone_ratio: float
    candidates: int
    runner_up: tuple[BlockKind, int] | None = None
    runner_up_loss: float | None = None
    seconds: float = field(default=0.0, compare=False)

    def to_json(self) -> dict[str, Any]:
        """A plain mapping; floats keep every bit."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Step:
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: when the mapping is no step.
        """
        try:
            if not isfinite(record["loss"]):
                raise ConfigError(f"not a step of a trajectory: its loss is {record['loss']}")
            runner_up = record["runner_up"]
            return cls(
                **{
                    **record,
                    "size": tuple(record["size"]),
                    "runner_up": tuple(runner_up) if runner_up else None,
                }
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(f"not a step of a trajectory: {error!r}") from None


def replay(dense: Structure, steps: Sequence[Step]) -> Structure:
    """The structure that some steps lead to."""
    structure = dense
    for step in steps:
        structure = structure.replace(step.layer, LayerSize(*step.size))
    return structure


def steps_to(steps: Sequence[Step], ratio: float, stop: str = "nearest") -> int:
    """How many steps of a path lead to a ratio.

    Args:
        steps: the path.
        ratio: smaller than the path's.
        stop: ``"nearest"``: the prefix that ends nearest to the ratio (the shorter of two); ``"reach"``: the first
            that reaches it.
    """
    ratios = [0.0, *(step.ratio for step in steps)]
    if stop == "reach":
        return next((count for count, reached in enumerate(ratios) if reached >= ratio), len(steps))
    return min(range(len(ratios)), key=lambda count: (abs(ratios[count] - ratio), count))


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


class TrajectoryJournal(Journal):
    """Appends to a trajectory file; every line is on disk before the next step begins."""

    def __init__(self, path: Path, way_out: str = "remove the file to start anew") -> None:
        super().__init__(path, "step of a trajectory", way_out, header=FORMAT)

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
