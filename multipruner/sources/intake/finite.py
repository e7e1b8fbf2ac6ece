"""Whether every weight of a model is a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from multipruner.core.errors import NumericsError

if TYPE_CHECKING:
    import torch


def check_finite(model: torch.nn.Module) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        NumericsError: naming the first one.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise NumericsError(f"{name} holds NaN or infinity; the checkpoint is damaged")
