"""Calibration text as token ids: loaded, shuffled, packed, and told apart from the held-out text.

Protocol (the official code's, but for the shuffle): rows joined by blank lines, tokenised together without special
tokens (no BOS), cut into sequences of equal length. Rows are always shuffled, by the recipe's seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from multipruner.config.recipe import CalibrationSpec
from multipruner.core.errors import CalibrationError
from multipruner.storage.hub import HubUnreachable

from .rows import IDS, rows_of
from .sampled_text import self_text

Split = Literal["calibration", "heldout", "statistics"]
SEED_STEP = 1_000_003
"""Between the seed of the text that scores and of the text that statistics are of, where the model writes both."""
LOWER = "lower --sequences or --length, or give more text"


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
            found.append((ids[: _wanted(part, split)] if part is not spec else ids, Path(part.source).name))
    if own:
        if model is None:
            raise CalibrationError("text sampled from the model needs the model")
        found.append((_sampled(_together(own), tokenizer, model, split, progress), "self"))
    if len({ids.shape[1] for ids, _ in found}) > 1:
        raise CalibrationError(f"the sources of {spec.source} hold sequences of different lengths")
    ids = _interleaved([ids for ids, _ in found])
    return CalibrationSet(ids, "+".join(name for _, name in found), tokenizer.eos_token_id)


def mixture(spec: CalibrationSpec) -> list[CalibrationSpec]:
    """A calibration section per source: ``alpaca+self`` shares the sequences evenly, ``alpaca:1+self:3`` one to three.

    Raises:
        CalibrationError: when there are too few sequences for every source to have one.
    """
    if "+" not in spec.source or Path(spec.source).expanduser().exists():
        return [spec]
    named = [_weighted(part) for part in spec.source.split("+")]
    total = sum(weight for _, weight in named)
    score = _shared(spec.sequences, [weight / total for _, weight in named])
    statistics = _shared(spec.statistics_sequences, [weight / total for _, weight in named])
    if min(*score, *statistics) < 1:
        raise CalibrationError(
            f"{spec.sequences} sequences are too few for every source of {spec.source}: raise --sequences"
        )
    return [
        spec.model_copy(update={"source": name, "sequences": few, "statistics_sequences": many})
        for (name, _), few, many in zip(named, score, statistics, strict=True)
    ]


def _weighted(text: str) -> tuple[str, float]:
    """``self:3`` is a source and its weight; without a number the weight is 1."""
    name, colon, number = text.strip().rpartition(":")
    try:
        weight = float(number) if colon else 1.0
    except ValueError:
        return text.strip(), 1.0
    if not 0 < weight < float("inf"):
        raise CalibrationError(f"the weight in {text!r} must be more than 0")
    return (name if colon else number), weight


def _shared(count: int, shares: list[float]) -> list[int]:
    """Whole numbers that add up to ``count``, by largest remainders."""
    exact = [count * share for share in shares]
    whole = [int(number) for number in exact]
    for place in sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))[: count - sum(whole)]:
        whole[place] += 1
    return whole


def _together(parts: list[CalibrationSpec]) -> CalibrationSpec:
    """One section for all that the model has to write: also what a source that is out of reach would have given."""
    sums = {key: sum(getattr(part, key) for part in parts) for key in ("sequences", "statistics_sequences")}
    return parts[0].model_copy(update=sums)


def _interleaved(sets: list[torch.Tensor]) -> torch.Tensor:
    """All sequences in an order in which every beginning holds the sets in about their shares."""
    places = [((i + 0.5) / len(ids), number, i) for number, ids in enumerate(sets) for i in range(len(ids))]
    return torch.stack([sets[number][i] for _, number, i in sorted(places)])


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
        ready = _ready_ids(Path(spec.source).expanduser(), split, tokenizer, model)
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
    return _pack(rows, spec, tokenizer, split)


def _pack(rows: list[str], spec: CalibrationSpec, tokenizer: Any, split: Split) -> torch.Tensor:
    """Shuffle and pack; both splits draw from one iterator over the rows, one after the other."""
    shuffled = rows.copy()
    random.Random(spec.seed).shuffle(shuffled)
    pack = _concatenated if spec.packing == "concat" else _one_per_row
    remaining = iter(shuffled)
    order: tuple[Split, ...] = ("calibration", "heldout", "statistics")
    packed = [pack(remaining, spec, tokenizer, part) for part in order[: order.index(split) + 1]]
    return packed[-1]


def _needed(spec: CalibrationSpec, split: Split) -> int:
    """How many sequences there must be: all for calibration, one of held-out text or for statistics."""
    return spec.sequences if split == "calibration" else 1


def _wanted(spec: CalibrationSpec, split: Split) -> int:
    return spec.statistics_sequences if split == "statistics" else spec.sequences


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _concatenated(rows: Iterator[str], spec: CalibrationSpec, tokenizer: Any, split: Split) -> torch.Tensor:
    """Rows joined by blank lines and tokenised at once, as many as are needed; int64 [sequences, length]."""
    wanted = _wanted(spec, split) * spec.length
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
    sequences = min(len(ids) // spec.length, _wanted(spec, split))
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
    while len(kept) < _wanted(spec, split) and (row := next(rows, None)) is not None:
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


def _ready_ids(path: Path, split: Split, tokenizer: Any, model: Any) -> torch.Tensor | None:
    """Token ids from a file: the tensor ``input_ids`` (or the only one), held-out ``heldout_ids`` (or none)."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise CalibrationError(f"there is no file {path}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error
    heldout, statistics = tensors.pop("heldout_ids", None), tensors.pop("statistics_ids", None)
    if split == "statistics" and statistics is not None:
        return _checked(path, statistics, tokenizer, model)
    if split == "heldout":
        return None if heldout is None else _checked(path, heldout, tokenizer, model)
    if "input_ids" not in tensors and len(tensors) != 1:
        raise CalibrationError(f"{path} needs a tensor input_ids; it holds {', '.join(sorted(tensors)) or 'none'}")
    return _checked(path, tensors.get("input_ids", next(iter(tensors.values()))), tokenizer, model)


def _checked(path: Path, ids: torch.Tensor, tokenizer: Any, model: Any) -> torch.Tensor:
    vocabulary = model.config.vocab_size if model is not None else len(tokenizer)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"{path}: token ids must be integers, not {ids.dtype}")
    if ids.ndim != 2 or len(ids) < 1 or ids.shape[1] < 2:
        raise CalibrationError(f"{path}: token ids must be [sequences, length >= 2], not {list(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise CalibrationError(f"{path}: token id {low if low < 0 else high} is outside 0..{vocabulary - 1}")
    return ids.to(torch.int64)
