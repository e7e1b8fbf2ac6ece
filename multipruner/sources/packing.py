"""Rows of text as sequences of token ids of equal length."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, Literal

import torch

from multipruner.config.recipe import CalibrationSpec
from multipruner.core.errors import CalibrationError

from .rows import Rows

Split = Literal["calibration", "heldout", "moments"]
ORDER: tuple[Split, ...] = ("calibration", "heldout", "moments")
LOWER = "lower --sequences or --length, or give more text"


class Packing:
    """All parts of a text, one after another from one shuffled pass over its rows, so that none shares a row.

    Attributes:
        rows: that are packed.
        used: rows that were taken so far.
        short: rows that were passed over because they do not fill a sequence.
        tokens: of the rows that were taken.
        kept: of these, how many are in sequences; the others were cut off.
    """

    def __init__(self, rows: Rows, spec: CalibrationSpec, tokenizer: Any) -> None:
        self.rows, self.used, self.short, self.tokens, self.kept = rows, 0, 0, 0, 0
        self._spec, self._tokenizer = spec, tokenizer
        self._remaining = iter(_shuffled(rows, spec.seed))
        self._done: dict[Split, torch.Tensor | CalibrationError] = {}

    def part(self, split: Split) -> torch.Tensor:
        """Return the sequences of a part, int64 [sequences, length]; the parts before it are packed first.

        Raises:
            CalibrationError: when the text ends before.
        """
        for one in ORDER[: ORDER.index(split) + 1]:
            if one not in self._done:
                try:
                    self._done[one] = self._packed(one)
                except CalibrationError as error:
                    self._done[one] = error
            if isinstance(failed := self._done[one], CalibrationError):
                raise failed
        found = self._done[split]
        assert isinstance(found, torch.Tensor)
        return found

    @property
    def cut_off(self) -> float:
        """The share of the tokens of all rows that were taken which is in no sequence."""
        return 1 - self.kept / self.tokens if self.tokens else 0.0

    def _packed(self, split: Split) -> torch.Tensor:
        cut = self._concatenated if self._spec.packing == "concat" else self._one_per_row
        ids = cut(self._remaining, split)
        self.kept += ids.numel()
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _concatenated(self, rows: Iterator[str], split: Split) -> torch.Tensor:
        """Join rows by blank lines and tokenise them at once, as many as are needed."""
        spec = self._spec
        wanted = wanted_sequences(spec, split) * spec.length
        taken: list[str] = []
        ids: list[int] = []
        count = 0
        for row in rows:
            taken.append(row)
            count += len(self._encode(row))
            if count >= wanted:
                ids = self._encode("\n\n".join(taken))
                if len(ids) >= wanted:
                    break
        else:
            ids = self._encode("\n\n".join(taken))
        sequences = min(len(ids) // spec.length, wanted_sequences(spec, split))
        if sequences < (at_least := _needed(spec, split)):
            part = "" if split == "calibration" else " after the calibration part"
            raise CalibrationError(
                f"{spec.source} holds {len(ids)} tokens{part}, {at_least * spec.length} are needed ({at_least} "
                f"sequences of {spec.length}); {LOWER}"
            )
        self.used += len(taken)
        self.tokens += len(ids)
        return torch.tensor(ids[: sequences * spec.length]).reshape(sequences, spec.length)

    def _one_per_row(self, rows: Iterator[str], split: Split) -> torch.Tensor:
        """Return the beginning of every row that is long enough."""
        spec = self._spec
        kept: list[list[int]] = []
        tokens = whole = skipped = 0
        while len(kept) < wanted_sequences(spec, split) and (row := next(rows, None)) is not None:
            ids = self._encode(row)
            tokens += len(ids)
            if len(ids) >= spec.length:
                kept.append(ids[: spec.length])
                whole += len(ids)
            else:
                skipped += 1
        if len(kept) < (at_least := _needed(spec, split)):
            raise CalibrationError(
                f"{spec.source} has {len(kept)} rows of {spec.length} tokens or more left, {at_least} are needed "
                f"({skipped} shorter ones, {tokens} tokens in all); {LOWER}, or use --packing concat"
            )
        self.used += len(kept)
        self.short += skipped
        self.tokens += whole
        return torch.tensor(kept)


def _shuffled(rows: Rows, seed: int) -> list[str]:
    """Return all rows, those that were read for moments only after the others."""
    first, later = rows[: rows.first], rows[rows.first :]
    random.Random(seed).shuffle(first)
    random.Random(seed).shuffle(later)
    return [*first, *later]


def _needed(spec: CalibrationSpec, split: Split) -> int:
    """Tell how many sequences there must be: all for calibration, one of held-out text or for moments."""
    return spec.sequences if split == "calibration" else 1


def wanted_sequences(spec: CalibrationSpec, split: Split) -> int:
    """Tell how many sequences a part has where there is text enough."""
    return spec.moments_sequences if split == "moments" else spec.sequences
