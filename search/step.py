"""One removal of a greedy path, and what a list of them leads to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from multipruner.core import earlier
from multipruner.core.axes import Dimension
from multipruner.core.errors import ConfigError
from multipruner.core.structure import Anatomy, Size, Structure


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
    seconds: float = field(default=0.0, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Encode as a plain mapping; floats keep every bit."""
        record = asdict(self)
        return {**{key: value for key, value in record.items() if key != "size"}, "kept": list(self.size)}

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
            runner_up = record["runner_up"]
            return cls(**{**attributes(record), "runner_up": tuple(runner_up) if runner_up else None})
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"not a step of a trajectory: {error!r}") from None


def attributes(record: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a step by their names, from what :meth:`Step.to_json`, or version 1, encoded.

    Raises:
        KeyError, TypeError, ValueError: when it is neither.
    """
    now = earlier.step(record) if "size" in record else record
    return {**{key: value for key, value in now.items() if key != "kept"}, "size": tuple(now["kept"])}


def replay(anatomy: Anatomy, steps: Sequence[Step], start: Structure | None = None) -> Structure:
    """The structure that some steps lead to.

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
