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

from multipruner.core import earlier
from multipruner.core.axes import Dimension
from multipruner.core.errors import ConfigError
from multipruner.core.structure import Anatomy, Size, Structure
from multipruner.storage.journal import Journal

FORMAT = {"format": "multipruner-trajectory", "version": 1}


@dataclass(frozen=True, slots=True)
class Step:
    """One removal.

    Attributes:
        stage: the dimension being pruned.
        kind, layer: the block that was removed or narrowed.
        size: its size afterwards.
        loss: calibration loss afterwards, in nats.
        ratio, backbone_ratio: removed so far, of all parameters and of the decoder layers alone.
        candidates: how many were compared.
        runner_up: the second best as (kind, layer), or ``None``.
        runner_up_loss: its loss.
        measured: what every candidate that was measured adds to the loss, as (block, nats), where not all were.
        seconds: the time the step took (not compared).
    """

    stage: Dimension
    kind: str
    layer: int
    size: Size
    loss: float
    ratio: float
    backbone_ratio: float
    candidates: int
    runner_up: tuple[str, int] | None = None
    runner_up_loss: float | None = None
    measured: tuple[tuple[int, float], ...] = ()
    seconds: float = field(default=0.0, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Encode as a plain mapping; floats keep every bit."""
        record = asdict(self)
        left_out = {"size"} if self.measured else {"size", "measured"}
        return {**{key: value for key, value in record.items() if key not in left_out}, "kept": list(self.size)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Step:
        """Decode what :meth:`to_json`, or version 1, encoded.

        Version 1 had the size of the whole layer, ``[query heads, KV heads, channels]``.

        Raises:
            ConfigError: when the mapping is no step.
        """
        try:
            if not isfinite(record["loss"]):
                raise ConfigError(f"not a step of a trajectory: its loss is {record['loss']}")
            runner_up, measured = record["runner_up"], record.get("measured", ())
            found = {"runner_up": tuple(runner_up) if runner_up else None}
            return cls(
                **{
                    **attributes(record),
                    **found,
                    "measured": tuple((int(block), float(add)) for block, add in measured),
                }
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a step of a trajectory: {error!r}") from None


def attributes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a step by their names, from what :meth:`Step.to_json`, or version 1, encoded.

    Raises:
        KeyError, TypeError, ValueError: when it is neither.
    """
    now = earlier.step(record) if "size" in record else record
    return {**{key: value for key, value in now.items() if key != "kept"}, "size": tuple(now["kept"])}


def replay(anatomy: Anatomy, steps: Sequence[Step], start: Structure | None = None) -> Structure:
    """Return the structure that some steps lead to.

    Args:
        anatomy: the dense model's blocks.
        steps: of a path.
        start: where they begin; default: the dense structure.
    """
    structure = anatomy.dense if start is None else start
    for step in steps:
        structure = structure.replace(anatomy.at(step.layer, step.kind), step.size)
    return structure


def steps_to(steps: Sequence[Step], ratio: float, stop: str = "nearest") -> int:
    """Tell how many steps of a path lead to a ratio.

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
