"""Bits per byte, which models with other tokenizers can be set beside, and where in the context they are lost."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from multipruner.core.errors import CalibrationError, ConfigError
from multipruner.eval.results import MetricResult
from multipruner.eval.scoring import bytes_predicted, cut_rows, head_stands_alone, token_losses
from multipruner.eval.suite.subject import Subject

_EDGES = (0, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)


def positions(
    subject: Subject, *, length: int, sequences: int, kind: str = "prose", beyond: float = 1.0
) -> dict[str, MetricResult]:
    """Return bits per byte, and the mean loss (nats per token) within bands of positions.

    Args:
        subject: the model; its text ``kind`` is read.
        length: tokens per sequence; at most the model's context.
        sequences: how many; fewer where the text ends before.
        kind: of the text.
        beyond: where above 1, sequences are so much longer than the context, if ``length`` reaches it at all; a band
            of its own tells the loss there. A model that cannot compute there (positions that are learned) has none.
    """
    text = subject.texts[kind]
    length = min(length, subject.context)
    rows = _rows(text, length, sequences)
    chunked = head_stands_alone(subject.model, rows)
    losses = []
    for number, row in enumerate(rows):
        subject.progress(number, len(rows))
        losses.append(token_losses(subject.model, row[None].to(subject.model.device), chunked)[0].cpu())
    subject.progress(len(rows), len(rows))
    whole = {str(number): float(loss.mean()) for number, loss in enumerate(losses)}
    found = {"bits per byte": MetricResult.of(_bits(subject, rows, losses)), "loss per token": MetricResult.of(whole)}
    width = rows.shape[1] - 1  # the loss at index p predicts the token at position p + 1
    for low, high in pairwise(_EDGES):
        if low < width:
            high = min(high, width)
            bands = {str(n): float(loss[low:high].mean()) for n, loss in enumerate(losses)}
            found[f"loss at {low} to {high - 1}"] = MetricResult.of(bands)
    if beyond > 1 and length == subject.context:
        found |= _beyond(subject, text, int(length * beyond), chunked)
    return found


def _rows(text: Tensor, length: int, sequences: int) -> Tensor:
    """Return sequences of a length; of all that there is, where the text is shorter than one of them."""
    if text.ndim == 1:
        length = min(length, len(text))
    return cut_rows(text, length)[:sequences]


def _bits(subject: Subject, rows: Tensor, losses: list[Tensor]) -> dict[str, float]:
    """Return bits per byte of every sequence: what its tokens stand for, but for the first one, in UTF-8."""
    found = {}
    for number, (row, loss) in enumerate(zip(rows.tolist(), losses, strict=True)):
        found[str(number)] = float(loss.sum()) / math.log(2) / max(1, bytes_predicted(subject.tokenizer, row))
    return found


def _beyond(subject: Subject, text: Tensor, length: int, chunked: bool) -> dict[str, MetricResult]:
    """Return the loss behind the context's end, over one sequence; nothing where text or model do not reach there."""
    try:
        row = cut_rows(text, length)[:1]
        with torch.inference_mode():
            losses = token_losses(subject.model, row.to(subject.model.device), chunked)[0]
    except (CalibrationError, ConfigError, IndexError, RuntimeError, ValueError):
        return {}
    return {"loss beyond the context": MetricResult.of({"0": float(losses[subject.context :].mean())})}
