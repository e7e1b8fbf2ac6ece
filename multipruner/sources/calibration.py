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

from multipruner.config.choices import loaded
from multipruner.config.recipe import CalibrationSpec, Recipe
from multipruner.core.errors import CalibrationError
from multipruner.eval.scoring import context_length
from multipruner.storage.hub import HubUnreachable, hub_answers

from .mixture import interleaved, mixture, together
from .packing import Packing, Split, wanted_sequences
from .rows import kind_of, rows_of
from .sampled_text import self_text
from .text.chat import Chat

SEED_STEP = 1_000_003
"""Between the seeds of texts that a model writes for different ends."""
MOST_SAMPLED = 1 << 31
"""Tokens that a model is asked to write at most; their ids alone take 16 GiB."""


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Token ids that losses are measured on.

    Attributes:
        ids: int64 [sequences, length], on the CPU.
        name: where the text is from, such as ``"alpaca"`` or a file's name.
        ignore_id: label that is not scored (the official code's: EOS), or ``None``.
        each: how many rows of ``ids`` count as one sequence of a recipe.
    """

    ids: torch.Tensor
    name: str
    ignore_id: int | None = None
    each: int = 1

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.ids.numel()

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) over shape and int64 bytes of the ids."""
        digest = hashlib.sha256(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.to(torch.int64).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def head(self, rows: int) -> CalibrationSet:
        """Return the first rows only (all, where there are fewer)."""
        return replace(self, ids=self.ids[:rows])


class CalibrationText:
    """The text of a recipe in its three parts, from one pass over every source.

    ``"calibration"`` is what structures are judged on. ``"heldout"`` is as many sequences of the text after it, and
    ``"moments"`` ``spec.moments_sequences`` after both; fewer where the text ends. No part shares a row with
    another.

    Sources joined by ``+`` are mixed (:func:`mixture`). ``alpaca`` becomes text sampled from the model where the Hub
    cannot be reached. A file of ready token ids may have tensors ``heldout_ids`` and ``moments_ids``; without the
    first, text sampled from the model takes its place, without the second, moments are of the calibration part.
    """

    def __init__(
        self,
        spec: CalibrationSpec,
        tokenizer: Any,
        model: Any = None,
        *,
        say: Callable[[str], None] = lambda text: None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Remember what is asked; nothing is read before a part is asked for.

        Args:
            spec: the recipe's calibration section; its length is cut to the model's context.
            tokenizer: the model's.
            model: the dense model; needed for text sampled from it.
            say: told when something else than asked for is used.
            progress: of the sampling: called with (tokens done, tokens in all).
        """
        self._context = spec.length if model is None else context_length(model.config)
        if spec.length > self._context:
            say(f"calibration.length = {spec.length}: cut to {self._context:,} tokens, the context of the model")
            spec = spec.model_copy(update={"length": self._context})
        self.spec, self._tokenizer, self._model, self._say, self._progress = spec, tokenizer, model, say, progress
        self._packed: dict[CalibrationSpec, Packing | None] = {}
        self._parts: dict[Split, CalibrationSet] = {}

    def part(self, split: Split) -> CalibrationSet:
        """Return one part of the text.

        Raises:
            CalibrationError: naming what is missing or too short, and what to do.
        """
        if split not in self._parts:
            self._parts[split] = self._load(split)
        return self._parts[split]

    def _load(self, split: Split) -> CalibrationSet:
        found: list[tuple[torch.Tensor, str]] = []
        own: list[CalibrationSpec] = []
        parts = mixture(self.spec)
        for part in parts:
            ids = self._given_ids(part, split)
            if ids is None:
                own.append(part)
            else:
                found.append((ids if len(parts) == 1 else ids[: wanted_sequences(part, split)], _name(part.source)))
        if own:
            found.append((self._sampled(together(own), split), "self"))
        if len({ids.shape[1] for ids, _ in found}) > 1:
            raise CalibrationError(f"the sources of {self.spec.source} hold sequences of different lengths")
        ids = interleaved([ids for ids, _ in found])
        return CalibrationSet(ids, "+".join(name for _, name in found), self._tokenizer.eos_token_id)

    def _given_ids(self, spec: CalibrationSpec, split: Split) -> torch.Tensor | None:
        """Return what the source gives; ``None`` where text sampled from the model is wanted or has to take its
        place.
        """
        row = kind_of(spec.source)
        if row.by is None:
            return None
        if row.ids:
            return self._ready_ids(loaded(row.by), spec, split)
        if spec not in self._packed:
            self._packed[spec] = self._read(spec)
        packing = self._packed[spec]
        return packing and packing.part(split)

    def _ready_ids(self, by: Callable[..., Any], spec: CalibrationSpec, split: Split) -> torch.Tensor | None:
        ready = by(Path(spec.source).expanduser(), split, self._tokenizer, self._model)
        if ready is None:
            self._say(f"{spec.source} has no heldout_ids: held-out text is sampled from the model itself")
        elif self._model is not None and ready.shape[1] > self._context:
            self._say(f"{spec.source}: sequences cut to {self._context:,} tokens, the context of the model")
            ready = ready[:, : self._context]
        return ready

    def _read(self, spec: CalibrationSpec) -> Packing | None:
        """Return the rows of a source, read once for all parts."""
        wanted, more = 2 * spec.sequences * spec.length, spec.moments_sequences * spec.length
        try:
            chat = Chat(self._tokenizer, spec.chat_template)
            rows = rows_of(spec.source, spec.text_column, wanted, spec.length, chat, more)
        except HubUnreachable as error:
            if not kind_of(spec.source).or_own or self._model is None:
                raise CalibrationError(
                    f"cannot reach the Hub for {spec.source} ({error}); give --calibration self or a local file"
                ) from None
            self._say(f"calibration: text sampled from the model itself, in place of {spec.source} (no Hub: {error})")
            return None
        return Packing(rows, spec, self._tokenizer)

    def _sampled(self, spec: CalibrationSpec, split: Split) -> torch.Tensor:
        if self._model is None:
            raise CalibrationError("text sampled from the model needs the model")
        count = 2 * spec.sequences + spec.moments_sequences  # side by side, whichever part is asked for first
        if count * spec.length > MOST_SAMPLED:
            raise CalibrationError(
                f"{count} sequences of {spec.length} tokens are more than a model writes here ({MOST_SAMPLED:,} "
                "tokens); lower --sequences, --moments-sequences or --length"
            )
        ids = self_text(self._model, self._tokenizer, count, spec.length, spec.seed, self._progress)
        parts = ids.split([spec.sequences, spec.sequences, spec.moments_sequences])
        return dict(zip(("calibration", "heldout", "moments"), parts, strict=True))[split]

    def record(self) -> dict[str, Any]:
        """Return what a report says of the text, beside the part for scores.

        Tokens of the other parts, and for every source that is rows of text the columns that were taken, rows, exact
        duplicates, rows used and the share of their tokens that was cut off.
        """
        sources = []
        for spec, packing in self._packed.items():
            if packing is not None:
                used = {"rows_used": packing.used, "rows_too_short": packing.short, "truncated": packing.cut_off}
                sources.append({"source": spec.source, **packing.rows.to_json(), **used})
        there = {split: part.ids.numel() for split, part in self._parts.items()}
        tokens = {"moments_tokens": there.get("moments", 0), "held_out_tokens": there.get("heldout", 0)}
        return {"sources": sources, **tokens}

    def line(self) -> str:
        """Return what a person is told of the text that was taken, in one line."""
        about = []
        for spec, packing in self._packed.items():
            if packing is not None:
                short = f", {packing.short:,} too short" if packing.short else ""
                used = f"{packing.used:,} used{short}, {packing.cut_off:.1%} of their tokens cut off"
                about.append(f"{_name(spec.source)}: {packing.rows.line()}, {used}")
        told = [f"{part.ids.numel():,} {_WORDS[split]}" for split, part in self._parts.items()]
        return f"calibration: {'; '.join([*about, 'tokens: ' + ', '.join(told)])}"


_WORDS: dict[Split, str] = {
    "calibration": "for scores",
    "moments": "for moments (order and repair)",
    "heldout": "held out",
}


def _name(source: str) -> str:
    """Return what a source is called: a file by its name, a data set as it was asked for."""
    path = Path(source).expanduser()
    return path.name if path.exists() or path.is_absolute() else source


def load_calibration(
    spec: CalibrationSpec,
    tokenizer: Any,
    model: Any = None,
    *,
    split: Split = "calibration",
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """Return one part of the text of a recipe; who needs several takes them from one :class:`CalibrationText`.

    Raises:
        CalibrationError: naming what is missing or too short, and what to do.
    """
    return CalibrationText(spec, tokenizer, model, say=say, progress=progress).part(split)


def held_out_text(recipe: Recipe, text: CalibrationText) -> CalibrationSet | None:
    """Return text for perplexity in place of WikiText-2, found before the search so that no search ends without it."""
    spec = recipe.evaluation
    if "ppl" not in spec.tasks or spec.text is not None:
        return None
    try:
        return text.part("heldout")
    except CalibrationError:
        if hub_answers():
            return None
        raise
