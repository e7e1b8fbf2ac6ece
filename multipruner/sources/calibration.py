"""Calibration text as token ids: loaded, shuffled, packed, and told apart from the held-out text.

Protocol (the official code's, but for the shuffle): rows joined by blank lines, tokenised together without special
tokens (no BOS), cut into sequences of equal length. Rows are always shuffled, by the recipe's seed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from multipruner.config.recipe import CalibrationSpec, Recipe
from multipruner.core.errors import CalibrationError
from multipruner.storage.hub import HubUnreachable, hub_answers

from .mixture import interleaved, mixture, together
from .packing import Split, pack, wanted_sequences
from .ready_ids import ready_ids
from .rows import IDS, rows_of
from .sampled_text import self_text

SEED_STEP = 1_000_003
"""Between the seed of the text that scores and of the text that statistics are of, where the model writes both."""


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token ids that losses are measured on.

    Attributes:
        ids: int64 [sequences, length], on the CPU.
        name: where the text is from, such as ``"alpaca"`` or a file's name.
        ignore_id: label that is not scored (the official code's: EOS), or ``None``.
    """

    ids: torch.Tensor
    name: str
    ignore_id: int | None = None

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) over shape and int64 bytes of the ids."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def head(self, sequences: int) -> CalibrationSet:
        """The first sequences only (all, where there are fewer)."""
        return replace(self, ids=self.ids[:sequences])


def load_calibration(
    spec: CalibrationSpec,
    tokenizer: Any,
    model: Any = None,
    *,
    split: Split = "calibration",
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """The calibration text of a recipe, or held-out text that shares no row with it.

    Sources joined by ``+`` are mixed (:func:`mixture`). ``alpaca`` becomes text sampled from the model where the Hub
    cannot be reached. Ready token ids have no held-out part, unless the file has a tensor ``heldout_ids``: then text
    sampled from the model takes its place.

    Args:
        spec: the recipe's calibration section.
        tokenizer: the model's.
        model: the dense model; needed for text sampled from it.
        split: ``"heldout"`` gives as many sequences of the text after the calibration part, ``"statistics"``
            ``spec.statistics_sequences`` after both; fewer where the text ends. A file of ready token ids may have
            tensors ``heldout_ids`` and ``statistics_ids``; without the latter statistics are of the calibration part.
        say: told when something else than asked for is used.
        progress: of the sampling: called with (tokens done, tokens in all).

    Raises:
        CalibrationError: naming what is missing or too short, and what to do.
    """
    found: list[tuple[torch.Tensor, str]] = []
    own: list[CalibrationSpec] = []
    for part in mixture(spec):
        ids = _given_ids(part, tokenizer, model, split, say)
        if ids is None:
            own.append(part)
        else:
            found.append((ids[: wanted_sequences(part, split)] if part is not spec else ids, Path(part.source).name))
    if own:
        if model is None:
            raise CalibrationError("text sampled from the model needs the model")
        found.append((_sampled(together(own), tokenizer, model, split, progress), "self"))
    if len({ids.shape[1] for ids, _ in found}) > 1:
        raise CalibrationError(f"the sources of {spec.source} hold sequences of different lengths")
    ids = interleaved([ids for ids, _ in found])
    return CalibrationSet(ids, "+".join(name for _, name in found), tokenizer.eos_token_id)


def _sampled(
    spec: CalibrationSpec, tokenizer: Any, model: Any, split: Split, progress: Callable[[int, int], None] | None
) -> torch.Tensor:
    if split == "statistics":
        seed = spec.seed + SEED_STEP
        return self_text(model, tokenizer, spec.statistics_sequences, spec.length, seed, progress)
    both = self_text(model, tokenizer, 2 * spec.sequences, spec.length, spec.seed, progress)
    return both[: spec.sequences] if split == "calibration" else both[spec.sequences :]


def _given_ids(
    spec: CalibrationSpec, tokenizer: Any, model: Any, split: Split, say: Callable[[str], None]
) -> torch.Tensor | None:
    """What the source gives; ``None`` where text sampled from the model is wanted or has to take its place."""
    if spec.source == "self":
        return None
    if Path(spec.source).suffix == IDS:
        ready = ready_ids(Path(spec.source).expanduser(), split, tokenizer, model)
        if ready is None:
            say(f"{spec.source} has no heldout_ids: held-out text is sampled from the model itself")
        return ready
    try:
        sequences = 2 * spec.sequences + (spec.statistics_sequences if split == "statistics" else 0)
        rows = rows_of(spec.source, spec.text_column, sequences * spec.length, spec.length)
    except HubUnreachable as error:
        if spec.source != "alpaca" or model is None:
            raise CalibrationError(
                f"cannot reach the Hub for {spec.source} ({error}); give --calibration self or a local file"
            ) from None
        say(f"calibration: text sampled from the model itself, in place of alpaca (no Hub: {error})")
        return None
    return pack(rows, spec, tokenizer, split)


def held_out_text(recipe: Recipe, tokenizer: Any, model: Any) -> CalibrationSet | None:
    """Text for perplexity in place of WikiText-2, found before the search so that no search ends without it."""
    spec = recipe.evaluation
    if "ppl" not in spec.tasks or spec.text is not None:
        return None
    try:
        return load_calibration(recipe.calibration, tokenizer, model, split="heldout")
    except CalibrationError:
        if hub_answers():
            return None
        raise
