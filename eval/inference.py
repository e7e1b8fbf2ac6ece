"""A model in evaluation mode, and as it was again afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def inference(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; every module's training flag is restored, on errors too."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
