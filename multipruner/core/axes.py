"""The dimensions along which a model is cut."""

from __future__ import annotations

from typing import Literal

Dimension = Literal["blocks", "mlp", "heads"]
DIMENSIONS: tuple[Dimension, ...] = ("blocks", "mlp", "heads")
