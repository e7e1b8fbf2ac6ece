"""How far a model's predictions are from the dense model's, on three kinds of text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from multipruner.core.errors import NumericsError
from multipruner.eval.results import MetricResult
from multipruner.eval.scoring import cut_rows, head_stands_alone, logits_in_pieces
from multipruner.eval.suite.subject import Subject
from multipruner.eval.suite.table import KINDS


def reference(subject: Subject, *, length: int, sequences: int, top: int) -> dict[str, Tensor]:
    """Return what of the dense model's distributions others are set beside.

    Args:
        subject: the dense model.
        length: tokens per sequence.
        sequences: of each kind of text.
        top: tokens per position that are kept: the likeliest ones.

    Returns:
        By kind of text: ``KIND.ids`` int32 [positions, top], likeliest first, and ``KIND.logs`` float32, the
        logarithms of their probabilities.
    """
    found = {}
    for kind, rows, chunked in _texts(subject, length, sequences):
        ids, logs = [], []
        for number, row in enumerate(rows):
            subject.progress(number, len(rows))
            for piece in logits_in_pieces(subject.model, row[None].to(subject.model.device), chunked):
                best = piece.log_softmax(-1).topk(min(top, piece.shape[-1]))
                ids.append(best.indices.int().cpu())
                logs.append(best.values.cpu())
        found |= {f"{kind}.ids": torch.cat(ids), f"{kind}.logs": torch.cat(logs)}
    return found


def agreement(subject: Subject, *, length: int, sequences: int, top: int) -> dict[str, MetricResult]:
    """Return divergence from the dense model and the share of positions with the same likeliest token.

    The divergence is KL(dense || this) in nats over the dense model's ``top`` likeliest tokens and the rest taken
    together, which is at most that over the whole vocabulary (data-processing inequality) and needs a hundredth of
    the room. Of the dense model itself it is 0.

    Args as for :func:`reference`; ``subject.reference`` holds what that gave.

    Raises:
        NumericsError: when a prediction is NaN.
    """
    found: dict[str, MetricResult] = {}
    for kind, rows, chunked in _texts(subject, length, sequences):
        if not subject.reference:
            zero = {str(n): 0.0 for n in range(len(rows))}
            found[f"KL, {kind}"], found[f"same first choice, {kind}"] = (
                MetricResult.of(zero), MetricResult.of(dict.fromkeys(zero, 1.0)),
            )  # fmt: skip
            continue
        ids, logs = subject.reference[f"{kind}.ids"].long(), subject.reference[f"{kind}.logs"]
        distances, same, start = {}, {}, 0
        for number, row in enumerate(rows):
            subject.progress(number, len(rows))
            apart, equal = [], []
            for piece in logits_in_pieces(subject.model, row[None].to(subject.model.device), chunked):
                here = slice(start, start + len(piece))
                piece, start = piece.log_softmax(-1).cpu(), here.stop
                apart.append(divergence(logs[here], piece.gather(1, ids[here])))
                equal.append(piece.argmax(-1) == ids[here, 0])
            distances[str(number)] = float(torch.cat(apart).mean())
            same[str(number)] = float(torch.cat(equal).float().mean())
        if not all(map(_is_number, distances.values())):
            raise NumericsError(f"the predictions on {kind} are NaN; evaluate in bfloat16 or float32")
        found[f"KL, {kind}"], found[f"same first choice, {kind}"] = MetricResult.of(distances), MetricResult.of(same)
    return found


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """Return KL in nats between two distributions that are known on some tokens, the rest taken as one.

    Args:
        dense: logarithms of probabilities, [positions, tokens].
        other: those of the other distribution for the same tokens.

    Returns:
        [positions], in float64.
    """
    dense, other = dense.double(), other.double()
    known = (dense.exp() * (dense - other)).sum(-1)
    left, right = ((1 - logs.exp().sum(-1)).clamp_min(1e-9) for logs in (dense, other))
    return known + left * (left / right).log()


def _texts(subject: Subject, length: int, sequences: int) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield kind, rows [sequences, length] and whether the head stands alone, of the texts that there are."""
    for kind in KINDS:
        if (text := subject.texts.get(kind)) is not None:
            rows = cut_rows(text, min(length, subject.context))[:sequences]
            yield kind, rows, head_stands_alone(subject.model, rows)


def _is_number(value: float) -> bool:
    return value == value
