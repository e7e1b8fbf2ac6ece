"""Bits per byte of one model, whatever its tokens: what models of two vocabularies can be compared by."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from multipruner.core.errors import CalibrationError
from multipruner.eval.inference import inference
from multipruner.eval.scoring import bytes_predicted, context_length, head_stands_alone, token_losses
from multipruner.sources.rows import stretches

_PIECE = 2000
"""Characters of a piece of text."""


def pieces_of(rows: Sequence[str], most: int) -> list[str]:
    """Return pieces of a text, spread over all of it.

    Args:
        rows: of the text, which are joined with blank lines.
        most: how many pieces.

    Raises:
        CalibrationError: when there is no text.
    """
    found = [piece for piece in stretches("\n\n".join(rows), _PIECE) if piece.strip()]
    if not found:
        raise CalibrationError("no text is left to compare losses on; give a longer one")
    return found[:: max(1, len(found) // most)][:most]


def bits_per_byte(
    model: PreTrainedModel, tokenizer: Any, pieces: Sequence[str], progress: Callable[[int, int], None]
) -> float:
    """Return the bits that a model needs for a byte of a text (UTF-8).

    Every piece follows the token that begins a text, or else the one that ends one, so that all of its bytes are
    predicted, whatever the tokens are; where a tokenizer has neither, the bytes of the first token are not counted.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        pieces: of text.
        progress: called with (pieces done, pieces in all).

    Raises:
        NumericsError: when a loss is not finite.
    """
    begin = next((one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id) if one is not None), None)
    longest, nats, size = context_length(model.config), 0.0, 0
    with inference(model):
        chunked = None
        for done, piece in enumerate(pieces):
            progress(done, len(pieces))
            ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
            ids = ([] if begin is None else [begin]) + ids
            row = torch.tensor([ids[:longest]], device=model.device)
            if row.shape[1] < 2:
                continue
            chunked = head_stands_alone(model, row) if chunked is None else chunked
            nats += float(token_losses(model, row, chunked).sum())
            size += bytes_predicted(tokenizer, row[0].tolist())
    progress(len(pieces), len(pieces))
    return nats / math.log(2) / max(size, 1)
