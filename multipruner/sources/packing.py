"""Rows of text as sequences of token ids of equal length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

import torch

from multipruner.config.recipe import CalibrationSpec
from multipruner.core.errors import CalibrationError

Split = Literal["calibration", "heldout", "statistics"]
LOWER = "lower --sequences or --length, or give more text"


def pack(rows: list[str], spec: CalibrationSpec, tokenizer: Any, split: Split) -> torch.Tensor:
    """Shuffle and pack; both splits draw from one iterator over the rows, one after the other."""
    shuffled = rows.copy()
    random.Random(spec.seed).shuffle(shuffled)
    cut = _concatenated if spec.packing == "concat" else _one_per_row
    remaining = iter(shuffled)
    order: tuple[Split, ...] = ("calibration", "heldout", "statistics")
    packed = [cut(remaining, spec, tokenizer, part) for part in order[: order.index(split) + 1]]
    return packed[-1]


def _needed(spec: CalibrationSpec, split: Split) -> int:
    """How many sequences there must be: all for calibration, one of held-out text or for statistics."""
    return spec.sequences if split == "calibration" else 1


def wanted_sequences(spec: CalibrationSpec, split: Split) -> int:
    return spec.statistics_sequences if split == "statistics" else spec.sequences


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _concatenated(rows: Iterator[str], spec: CalibrationSpec, tokenizer: Any, split: Split) -> torch.Tensor:
    """Rows joined by blank lines and tokenised at once, as many as are needed; int64 [sequences, length]."""
    wanted = wanted_sequences(spec, split) * spec.length
    taken: list[str] = []
    ids: list[int] = []
    count = 0
    for row in rows:
        taken.append(row)
        count += len(_encode(tokenizer, row))
        if count >= wanted:
            ids = _encode(tokenizer, "\n\n".join(taken))
            if len(ids) >= wanted:
                break
    else:
        ids = _encode(tokenizer, "\n\n".join(taken))
    sequences = min(len(ids) // spec.length, wanted_sequences(spec, split))
    if sequences < (at_least := _needed(spec, split)):
        part = "" if split == "calibration" else " after the calibration part"
        raise CalibrationError(
            f"{spec.source} holds {len(ids)} tokens{part}, {at_least * spec.length} are needed ({at_least} sequences "
            f"of {spec.length}); {LOWER}"
        )
    return torch.tensor(ids[: sequences * spec.length]).reshape(sequences, spec.length)


def _one_per_row(rows: Iterator[str], spec: CalibrationSpec, tokenizer: Any, split: Split) -> torch.Tensor:
    """The beginning of every row that is long enough; int64 [sequences, length]."""
    kept: list[list[int]] = []
    tokens = skipped = 0
    while len(kept) < wanted_sequences(spec, split) and (row := next(rows, None)) is not None:
        ids = _encode(tokenizer, row)
        tokens += len(ids)
        if len(ids) >= spec.length:
            kept.append(ids[: spec.length])
        else:
            skipped += 1
    if len(kept) < (at_least := _needed(spec, split)):
        raise CalibrationError(
            f"{spec.source} has {len(kept)} rows of {spec.length} tokens or more left, {at_least} are needed "
            f"({skipped} shorter ones, {tokens} tokens in all); {LOWER}, or use --packing concat"
        )
    return torch.tensor(kept)
