"""How often an image classifier is right, or, where nobody says what is, how often it gives the dense model's class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from multipruner.eval.results import Evaluation, MetricResult, TaskResult

AT_ONCE = 64
"""Pictures that are read and run together."""
ACCURACY, AGREEMENT = "acc", "same class as dense"


@torch.inference_mode()
def classes_of(
    model: Any,
    pixels: Callable[[int, int], Tensor],
    count: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[int]:
    """Return the class that a model gives to each of some pictures.

    Args:
        model: an image classifier.
        pixels: reads a run of them, from and to: [pictures, channels, height, width].
        count: how many there are.
        progress: called with (``"pictures"``, done, in all).
    """
    found: list[int] = []
    for begin in range(0, count, AT_ONCE):
        rows = pixels(begin, min(begin + AT_ONCE, count))
        found += model(pixel_values=rows.to(model.device)).logits.argmax(dim=-1).tolist()
        progress("pictures", len(found), count)
    return found


def judged(name: str, found: Sequence[int], right: Sequence[int] | None, dense: Sequence[int]) -> Evaluation:
    """Return what the classes that a model gave come to.

    Args:
        name: of the pictures.
        found: the classes that it gave.
        right: those that are right; ``None`` where nobody has said.
        dense: those that the dense model gave.
    """
    metric, wanted = (ACCURACY, right) if right is not None else (AGREEMENT, dense)
    pairs = enumerate(zip(found, wanted, strict=True))
    result = MetricResult.of({str(number): float(own == other) for number, (own, other) in pairs})
    return Evaluation({}, {name: TaskResult({metric: result})})
