"""The dense model as a teacher: how far a pruned model's predictions are from its own (arXiv 1503.02531).

The divergence is KL(dense || pruned), over the whole vocabulary or over the dense model's likeliest tokens with all
others taken as one; the latter is small enough to be kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from multipruner.core.identity import digest
from multipruner.storage.cache import cache_folder
from multipruner.storage.files import whole_file

FOLDER = "teacher"
_PART = 32
"""Sequences per file."""
_CHUNK = 128
"""Positions whose distributions are in memory together, beside the logits themselves."""
_LEAST = 1e-6
"""Of the probability of all other tokens taken as one: below it, rounding decides."""


@dataclass(frozen=True)
class Teacher:
    """Gives the loss of what a pruned model predicts.

    Attributes:
        model: the dense model; not needed where ``kept`` is.
        top: likeliest tokens that are compared; 0: all.
        kept: the folder that :func:`keep_predictions` filled.
    """

    model: Any = None
    top: int = 0
    kept: Path | None = None

    def loss(self, logits: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        """Return the mean divergence in nats per position.

        Args:
            logits: of the model that learns, [sequences, tokens, vocabulary].
            ids: int64 [sequences, tokens].
            rows: the sequences' numbers in the training text, int64 [sequences].
        """
        logits = logits.flatten(0, 1)
        if self.kept is not None:
            found = [_kept(self.kept, number) for number in rows.tolist()]
            tokens, logs = (torch.cat(part).to(logits.device) for part in zip(*found, strict=True))
            return likeliest_divergence(logits, tokens.long(), logs.float())
        with torch.no_grad():
            dense = self.model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        if not self.top:
            return divergence(logits, dense)
        logs, tokens = _likeliest(dense, self.top)
        return likeliest_divergence(logits, tokens, logs)


class _Divergence(torch.autograd.Function):
    """KL(dense || pruned), some positions at a time; its gradient over logits is the difference of probabilities."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dense: Tensor) -> Tensor:
        gradient, total = torch.empty_like(logits), logits.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(logits), _CHUNK):
            here = slice(begin, begin + _CHUNK)
            ours, theirs = (each[here].float().log_softmax(-1) for each in (logits, dense))
            likely = theirs.exp()
            total += (likely * (theirs - ours)).sum()
            gradient[here] = ours.exp_().sub_(likely) / len(logits)
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None


def divergence(logits: Tensor, dense: Tensor) -> Tensor:
    """Return the mean KL(dense || pruned) in nats; gradients flow to the pruned model's logits only.

    Args:
        logits, dense: of both, [positions, vocabulary].
    """
    return _Divergence.apply(logits, dense)  # pyright: ignore[reportReturnType]


def likeliest_divergence(logits: Tensor, tokens: Tensor, logs: Tensor) -> Tensor:
    """Return the mean KL in nats over some tokens of every position and all others taken as one.

    Args:
        logits: of the pruned model, [positions, vocabulary].
        tokens: int64 [positions, some].
        logs: logarithms of their probabilities for the dense model.
    """
    ours = logits.gather(1, tokens).float() - logits.float().logsumexp(-1, keepdim=True)
    rest, theirs = ((1 - each.exp().sum(-1)).clamp_min(_LEAST) for each in (ours, logs))
    known = (logs.exp() * (logs - ours)).sum(-1)
    return (known + theirs * (theirs.log() - rest.log())).mean()


def keep_predictions(
    model: Any,
    weights: str,
    ids: Tensor,
    text: str,
    top: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write what the dense model says of a text to the cache, going on where that was stopped.

    Args:
        model: the dense model, in evaluation mode.
        weights: its fingerprint.
        ids: int64 [sequences, tokens].
        text: the hash of the text.
        top: likeliest tokens that are kept of every position, with the logarithms of their probabilities as float16.
        progress: called with (sequences done, in all).

    Returns:
        The folder.
    """
    folder = cache_folder() / FOLDER / digest([weights, str(model.dtype), text, top])[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for begin in range(0, len(ids), _PART):
        progress(begin, len(ids))
        path = _part(folder, begin)
        if path.exists():
            continue
        found = []
        for row in ids[begin : begin + _PART]:
            with torch.no_grad():
                logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0]
            logs, tokens = _likeliest(logits, top)
            found.append((tokens.int().cpu(), logs.half().cpu()))
        tokens, logs = (torch.stack(part).contiguous() for part in zip(*found, strict=True))
        with whole_file(path) as aside:
            save_file({"tokens": tokens, "logs": logs}, aside)
    return folder


def _likeliest(logits: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return the largest logarithms of probabilities and their tokens, [positions, top] each."""
    found = [part.float().log_softmax(-1).topk(min(top, part.shape[-1])) for part in logits.split(_CHUNK)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number // _PART}.safetensors"


def _kept(folder: Path, number: int) -> tuple[Tensor, Tensor]:
    """Return tokens and logarithms of one sequence of the text, [tokens, top] each."""
    with safe_open(_part(folder, number), "pt") as file:
        tokens, logs = (file.get_slice(name)[number % _PART] for name in ("tokens", "logs"))
    return tokens, logs
