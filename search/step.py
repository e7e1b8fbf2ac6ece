"""One removal of a greedy path, and what a list of them leads to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from multipruner.core.axes import Dimension
from multipruner.core.errors import ConfigError
from multipruner.core.structure import BlockKind, LayerSize, Structure


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
