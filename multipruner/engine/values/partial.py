"""Projections of attention that have less of every head than the stock code between them, which knows heads of one
width. ``checkpoint/template.py``, which may import nothing from here, has the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multipruner.core.axes import AXES, PAIRS, Counts, Kept


class Placed(nn.Linear):
    """Gives what it has of every head in its place, and zeros for the rest."""

    places: Tensor
    """For every row of whole heads the one of the weight, or the number of those, behind which a zero stands."""

    @classmethod
    def of(cls, linear: nn.Linear, rows: Tensor, whole: int) -> Self:
        """Return such a layer with the tensors of a linear layer, which has these rows of so many already."""
        places = torch.full((whole,), len(rows)).index_copy_(0, rows, torch.arange(len(rows)))
        layer = cls.__new__(cls)
        layer.__dict__ = {**linear.__dict__, "places": places.to(linear.weight.device)}
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return F.pad(super().forward(input), (0, 1)).index_select(-1, self.places)


class PartlyRead(nn.Linear):
    """Reads the first dimensions of every head."""

    kept: int
    whole: int

    @classmethod
    def of(cls, linear: nn.Linear, kept: int, whole: int) -> Self:
        """Return such a layer with the tensors of a linear layer, which has these columns already."""
        layer = cls.__new__(cls)
        layer.__dict__ = {**linear.__dict__, "kept": kept, "whole": whole}
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.read(input))

    def read(self, input: Tensor) -> Tensor:
        """Return what it reads of its input, [..., heads * kept], of [..., heads * whole]."""
        return input.unflatten(-1, (-1, self.whole))[..., : self.kept].flatten(-2)


def leading(counts: Counts, pairs: Sequence[Any]) -> Kept:
    """Return what a block of so many units keeps: the leading ones, but of pairs, which stay in their places, the first
    of an order for every KV group (none: as they lie).
    """
    groups = pairs[: counts.get(AXES[PAIRS].within, 0)]
    return {**counts, PAIRS: [sorted(order[: counts[PAIRS]]) for order in groups]} if groups else counts
