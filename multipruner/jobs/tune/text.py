"""The text that a pruned model is trained on after the cut, and text held out from it, as token ids."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from multipruner.config.precedence import TRUST_KEY
from multipruner.core.errors import CalibrationError, ConfigError
from multipruner.engine.fingerprint import fingerprint
from multipruner.engine.precision import Precision
from multipruner.jobs.record import recorded_recipe
from multipruner.sources.calibration import SEED_STEP
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve
from multipruner.sources.rows import Rows, kind_of, rows_of
from multipruner.sources.sampled_text import self_text
from multipruner.sources.text.chat import Chat
from multipruner.storage.hub import HubUnreachable

SELF = "self"
HELD_OUT = 16
"""Sequences kept out of the training, for a perplexity on text of the same kind."""


@dataclass(frozen=True, eq=False)
class TuningText:
    """What to train on.

    Attributes:
        train: int64 [sequences, length], shuffled.
        held_out: int64 [sequences, length]; no row of it is in ``train``.
        name: where it is from, such as ``"alpaca"`` or a file's name.
        rows: what of the source was taken; none where a model wrote it.
    """

    train: Tensor
    held_out: Tensor
    name: str
    rows: Rows | None = None

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hexadecimal) over shape and int64 bytes of the training ids."""
        digest = hashlib.sha256(repr(tuple(self.train.shape)).encode())
        digest.update(self.train.contiguous().numpy().tobytes())
        return digest.hexdigest()


def tuning_text(
    source: str,
    tokenizer: Any,
    report: Mapping[str, Any],
    folder: Path = Path(),
    *,
    sequences: int,
    length: int,
    seed: int,
    column: str | None = None,
    trust: bool = False,
    template: str | None = None,
    written: int | None = None,
    dense: Any = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | None = None,
) -> TuningText:
    """Load, shuffle and pack text to train on.

    Rows are followed by the tokenizer's EOS, so that the model keeps learning where a text ends (running text, whose
    rows are only stretches of it, is not), put one after another, and cut to ``length``.

    Args:
        source: ``alpaca``, ``wikitext2``, ``c4``, a data set of the Hub, a local file or folder, or ``self``: text that
            the dense model of the report samples.
        report, folder: of the pruned model.
        sequences: that the training will take; fewer where the text ends before.
        length: tokens per sequence.
        seed: of the shuffling, and of the sampling.
        column: of a table.
        trust: whether code that the dense model brings may be run; the report does not decide that.
        template: what conversations are rendered with (:class:`.Chat`).
        written: how many sequences the dense model writes at most; default: all.
        dense: the dense model where it is in memory already.
        say: told which model writes, where one does, and else what of the source was taken.
        progress: of the sampling: called with (tokens done, tokens in all).

    Raises:
        CalibrationError: when the text is missing, damaged or too short, or the Hub cannot be reached for it.
        ConfigError: for a file of token ids, or when the dense model has other weights now.
    """
    row = kind_of(source)
    if row.by is None:
        count = min(sequences, written or sequences) + HELD_OUT
        model = dense or dense_model(report, folder, trust, say)
        with Precision.of(model, recorded_recipe(report, folder).compute_dtype).computing(model):
            ids = self_text(model, tokenizer, count, length, seed + 2 * SEED_STEP, progress)
        return TuningText(ids[HELD_OUT:], ids[:HELD_OUT], SELF)
    if row.ids:
        raise ConfigError(f"--data {source}: text is needed, not token ids")
    try:
        chat = Chat(tokenizer, template)
        rows = rows_of(source, column, (sequences + HELD_OUT) * length, length, chat)
    except HubUnreachable as error:
        raise CalibrationError(
            f"cannot reach the Hub for {source} ({error}); give --data FILE or --data self"
        ) from None
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    end = [] if rows.running or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    remaining = iter(shuffled)
    # the held-out part comes first, so that it is the same text for any number of steps
    held_out, train = (_packed(remaining, tokenizer, end, count, length) for count in (HELD_OUT, sequences))
    if len(train) < 1:
        raise CalibrationError(
            f"{source} holds less than {(HELD_OUT + 1) * length} tokens ({HELD_OUT} sequences are held out): give "
            "more text or a smaller --length"
        )
    name = Path(source).name
    say(f"text: {name}: {rows.line()}; tokens: {train.numel():,} to train on, {held_out.numel():,} held out")
    return TuningText(train, held_out, name, rows)


def _packed(rows: Iterator[str], tokenizer: Any, end: list[int], count: int, length: int) -> Tensor:
    """Return at most ``count`` sequences from the rows, which are taken one by one; int64 [sequences, length]."""
    ids: list[int] = []
    while len(ids) < count * length and (row := next(rows, None)) is not None:
        ids += [*tokenizer(row, add_special_tokens=False, verbose=False)["input_ids"], *end]
    found = min(len(ids) // length, count)
    return torch.tensor(ids[: found * length], dtype=torch.int64).reshape(found, length)


def dense_model(report: Mapping[str, Any], folder: Path, trust: bool, say: Callable[[str], None]) -> Any:
    """Return the dense model that a run was pruned from, in evaluation mode.

    Args:
        report, folder: of the run.
        trust: whether code that it brings may be run.
        say: told which model it is.

    Raises:
        MultiprunerError: when it cannot be had, or has other weights now.
    """
    recipe = recorded_recipe(report, folder, {TRUST_KEY: trust})
    about = report["model"]
    dense, _ = load_dense(resolve(recipe, say), recipe)
    if fingerprint(dense) != about["fingerprint"]:
        raise ConfigError(f"{about['description']} has other weights now than when it was pruned; give --data FILE")
    return dense
