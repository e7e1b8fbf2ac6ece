"""Projections of attention with fewer value dimensions than the stock code between them knows."""

from __future__ import annotations

from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn


class _OfHeads(nn.Linear):
    """A linear layer that has fewer dimensions for every head (``kept``) than the stock code around it, which knows
    heads of one width (``whole``). ``checkpoint/template.py``, which may import nothing from here, has the same.
    """

    kept: int
    whole: int

    @classmethod
    def of(cls, linear: nn.Linear, kept: int, whole: int) -> Self:
        """Return such a layer with the tensors of a linear layer, which has these dimensions already."""
        layer = cls.__new__(cls)
        layer.__dict__ = {**linear.__dict__, "kept": kept, "whole": whole}
        return layer


class PaddedValues(_OfHeads):
    """Gives the first dimensions of every head, and zeros for the others."""

    def forward(self, input: Tensor) -> Tensor:
        heads = super().forward(input).unflatten(-1, (-1, self.kept))
        return F.pad(heads, (0, self.whole - self.kept)).flatten(-2)


class PartlyRead(_OfHeads):
    """Reads the first dimensions of every head."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(self.read(input))

    def read(self, input: Tensor) -> Tensor:
        """Return what it reads of its input, [..., heads * kept], of [..., heads * whole]."""
        return input.unflatten(-1, (-1, self.whole))[..., : self.kept].flatten(-2)
