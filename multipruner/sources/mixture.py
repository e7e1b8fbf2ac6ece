"""Several sources of text in one calibration set."""

from __future__ import annotations

from pathlib import Path

import torch

from multipruner.config.recipe import CalibrationSpec
from multipruner.core.errors import CalibrationError


def mixture(spec: CalibrationSpec) -> list[CalibrationSpec]:
    """Return a calibration section per source: ``alpaca+self`` shares the sequences evenly, ``alpaca:1+self:3`` one to
    three.

    Raises:
        CalibrationError: when there are too few sequences for every source to have one.
    """
    if "+" not in spec.source or Path(spec.source).expanduser().exists():
        return [spec]
    named = [_weighted(part) for part in spec.source.split("+")]
    total = sum(weight for _, weight in named)
    score = _shared(spec.sequences, [weight / total for _, weight in named])
    moments = _shared(spec.moments_sequences, [weight / total for _, weight in named])
    if min(*score, *(moments if spec.moments_sequences else ())) < 1:
        raise CalibrationError(
            f"{spec.sequences} sequences are too few for every source of {spec.source}: raise --sequences"
        )
    return [
        spec.model_copy(update={"source": name, "sequences": few, "moments_sequences": many})
        for (name, _), few, many in zip(named, score, moments, strict=True)
    ]


def _weighted(text: str) -> tuple[str, float]:
    """Split ``self:3`` into a source and its weight; without a number the weight is 1."""
    name, colon, number = text.strip().rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        return text.strip(), 1.0
    if not 0 < weight < float("inf"):
        raise CalibrationError(f"the weight in {text!r} must be more than 0")
    return (name if colon else number), weight


def _shared(count: int, shares: list[float]) -> list[int]:
    """Return whole numbers that add up to ``count``, by largest remainders."""
    exact = [count * share for share in shares]
    whole = [int(number) for number in exact]
    for place in sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))[: count - sum(whole)]:
        whole[place] += 1
    return whole


def together(parts: list[CalibrationSpec]) -> CalibrationSpec:
    """Return one section for all that the model has to write: also what a source that is out of reach would have
    given.
    """
    sums = {key: sum(getattr(part, key) for part in parts) for key in ("sequences", "moments_sequences")}
    return parts[0].model_copy(update=sums)


def interleaved(sets: list[torch.Tensor]) -> torch.Tensor:
    """Return all sequences in an order in which every beginning holds the sets in about their shares."""
    places = [((i + 0.5) / len(ids), number, i) for number, ids in enumerate(sets) for i in range(len(ids))]
    return torch.stack([sets[number][i] for _, number, i in sorted(places)])
