"""Drawing tokens from probabilities."""

from __future__ import annotations

import torch


def drawn(probabilities: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return the tokens that draws in [0, 1), [rows, n], pick from probabilities [rows, vocabulary]; [rows, n]."""
    cumulated = probabilities.cumsum(-1)
    target = draws.to(cumulated.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).clamp(max=cumulated.shape[-1] - 1)
