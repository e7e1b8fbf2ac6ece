"""The state of a training on disk: adapter weights and AdamW's moments as plain tensors, no pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from multipruner.storage.files import whole_file

STATE = "state.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        step: optimizer steps done.
        seconds: spent on them, over all processes that took part.
        losses: of every step, in nats per token, before its update.
    """

    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def keep(
    path: Path,
    progress: Progress,
    weights: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
) -> None:
    """Write the state; raises :class:`~multipruner.core.errors.OutputError` when that fails."""
    tensors = {f"weight.{name}": weight.detach() for name, weight in weights.items()}
    for name, weight in weights.items():
        tensors |= {f"{moment}.{name}": optimizer.state[weight][moment] for moment in _MOMENTS}
    about = {"step": progress.step, "seconds": progress.seconds, "losses": progress.losses, "identity": dict(identity)}
    with whole_file(path) as aside:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, {"tuning": json.dumps(about)})


def kept_identity(folder: Path) -> dict[str, Any] | None:
    """Return what the state in a folder is of; ``None`` where there is none."""
    about = _about(folder / STATE)
    return about and about["identity"]


def _about(path: Path) -> dict[str, Any] | None:
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["tuning"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def restore(path: Path, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Progress:
    """Put a state back into adapters and optimizer, if there is one."""
    about = _about(path)
    if about is None:
        return Progress()
    with safe_open(path, "pt") as file, torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(file.get_tensor(f"weight.{name}"))
            moments = {moment: file.get_tensor(f"{moment}.{name}").to(weight.device) for moment in _MOMENTS}
            optimizer.state[weight] = {"step": torch.tensor(float(about["step"])), **moments}
    return Progress(about["step"], about["seconds"], about["losses"])
