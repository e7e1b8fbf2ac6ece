"""Perplexity as published: non-overlapping sequences, mean NLL per token, exponentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from multipruner.core.errors import CalibrationError, ConfigError, NumericsError
from multipruner.eval.inference import inference
from multipruner.eval.results import Perplexity

Progress = Callable[[int, int], None]
"""Called with (sequences done, sequences in all)."""

_PROBE_TOKENS = 16
_CHUNK = {"cpu": 128}  # positions per chunk of logits: large temporaries cost a CPU more than the arithmetic
_CHUNK_ELSEWHERE = 1024


def perplexity(
    model: PreTrainedModel,
    ids: Tensor,
    *,
    length: int = 2048,
    max_tokens: int | None = None,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Perplexity:
    """Return perplexity of a causal language model on token ids.

    Args:
        model: any causal language model; its training flags are as before afterwards.
        ids: [tokens], a text to cut into non-overlapping sequences (the rest that fills none is dropped); or
            [sequences, tokens], already cut.
        length: tokens per sequence; at most the model's longest context and ``max_tokens``.
        max_tokens: use the first so many tokens only.
        batch_size: sequences per forward pass.
        progress: called before the first batch, and after every one.

    Raises:
        CalibrationError: when the text does not fill one sequence, or has ids that the model has no embedding for.
        ConfigError: when a length is below 2 or the batch size below 1.
        NumericsError: when the loss is NaN or infinite, naming the cause.
    """
    rows = cut_rows(ids, min(length, context_length(model.config)), max_tokens)
    if batch_size < 1:
        raise ConfigError(f"batch size {batch_size}: at least 1 is needed")
    _check_vocabulary(model, rows)
    losses: list[float] = []
    with inference(model):
        chunked = head_stands_alone(model, rows)
        if progress is not None:
            progress(0, len(rows))
        for batch in rows.split(batch_size):
            losses += token_losses(model, batch.to(model.device), chunked).mean(dim=1).tolist()
            if progress is not None:
                progress(len(losses), len(rows))
    return Perplexity(tuple(losses), rows.shape[1])


def context_length(config: Any) -> int:
    """Return the longest sequence a model was made for; very large where its configuration does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    names = ("max_position_embeddings", "n_positions", "model_max_length")
    known = [value for name in names if isinstance(value := getattr(text, name, None), int) and value > 1]
    return known[0] if known else 1 << 30


def cut_rows(ids: Tensor, length: int, max_tokens: int | None = None) -> Tensor:
    """Return sequences of one length, [sequences, length], of a text as :func:`perplexity` takes it.

    Raises:
        ConfigError: for a length below 2, or ids of another shape.
        CalibrationError: when the text fills no sequence.
    """
    if ids.ndim not in (1, 2):
        raise ConfigError(f"token ids of shape {tuple(ids.shape)}: [tokens] or [sequences, tokens] expected")
    if ids.ndim == 2:
        length = min(length, ids.shape[1])
    if max_tokens is not None:
        length = min(length, max_tokens)
    if length < 2:
        raise ConfigError(f"sequences of {length} tokens: at least 2 are needed, to predict one from the other")
    available = ids.numel() // length if ids.ndim == 1 else len(ids)
    if available == 0:
        raise CalibrationError(
            f"the text has {ids.numel():,} tokens and fills no sequence of {length:,}: "
            "give a longer text or a smaller evaluation.length"
        )
    rows = ids[: available * length].view(available, length) if ids.ndim == 1 else ids[:, :length]
    return rows if max_tokens is None else rows[: max_tokens // length]


def _check_vocabulary(model: PreTrainedModel, rows: Tensor) -> None:
    embeddings = model.get_input_embeddings()
    size = embeddings.num_embeddings if isinstance(embeddings, torch.nn.Embedding) else model.config.vocab_size
    low, high = rows.aminmax()
    if low < 0 or high >= size:
        raise CalibrationError(
            f"token ids from {int(low)} to {int(high)}, but the model has embeddings for 0 to {size - 1}: "
            "was the text tokenised for another model?"
        )


def _parts(model: Any) -> tuple[Any, Any] | None:
    """Return the decoder and the output projection, where a model tells them apart."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    head = model.get_output_embeddings()
    return None if decoder is None or decoder is model or head is None else (decoder, head)


def head_stands_alone(model: PreTrainedModel, rows: Tensor) -> bool:
    """Tell whether ``head(decoder(ids))`` is all that the stock forward does.

    Some families scale or cap their logits. Asking them beats a list of their names: equal to the bit on a few
    tokens, or the stock forward with all its logits is used.
    """
    parts = _parts(model)
    if parts is None:
        return False
    probe = rows[:1, :_PROBE_TOKENS].to(model.device)
    decoder, head = parts
    logits = head(decoder(input_ids=probe, use_cache=False)[0])
    return torch.equal(logits.float(), model(input_ids=probe, use_cache=False).logits.float().to(logits.device))


def logits_in_pieces(model: PreTrainedModel, batch: Tensor, chunked: bool) -> Iterator[Tensor]:
    """Yield float32 logits of every position but the last one of each sequence, some positions at a time.

    Args:
        model: in evaluation mode.
        batch: int64 [sequences, tokens], on the model's device.
        chunked: what :func:`head_stands_alone` tells.

    Yields:
        [positions, vocabulary]; the positions of all sequences one after another.
    """
    parts = _parts(model) if chunked else None
    if parts is None:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        pieces = iter(logits.flatten(0, 1).split(_chunk(logits)))
    else:
        decoder, head = parts
        pieces = _logits(head, decoder(input_ids=batch, use_cache=False)[0][:, :-1].flatten(0, 1))
    for piece in pieces:
        yield piece.float()


def token_losses(model: PreTrainedModel, batch: Tensor, chunked: bool) -> Tensor:
    """Return negative log-likelihood of every predicted token in float64, [sequences, length - 1].

    Args as for :func:`logits_in_pieces`.

    Raises:
        NumericsError: when one is NaN or infinite, naming the cause.
    """
    labels = batch[:, 1:].flatten()
    losses, start = [], 0
    for piece in logits_in_pieces(model, batch, chunked):
        wanted = labels[start : start + len(piece), None].to(piece.device)
        losses.append(piece.logsumexp(dim=-1) - piece.gather(1, wanted)[:, 0])
        start += len(piece)
    found = torch.cat(losses).double().view(len(batch), -1)
    if not found.isfinite().all():
        raise NumericsError(f"the perplexity loss is not finite: {_cause(model)}")
    return found


def bytes_predicted(tokenizer: Any, ids: Sequence[int]) -> int:
    """Return the bytes (UTF-8) that a sequence's tokens stand for, but for the first one, which nobody predicts."""
    whole, first = (len(tokenizer.decode(one, clean_up_tokenization_spaces=False).encode()) for one in (ids, ids[:1]))
    return whole - first


def _logits(head: Any, hidden: Tensor) -> Iterator[Tensor]:
    """Yield logits of a chunk of positions at a time, [chunk, vocabulary], from [positions, hidden size]."""
    for piece in hidden.split(_chunk(hidden)):
        yield head(piece)


def _chunk(tensor: Tensor) -> int:
    return _CHUNK.get(tensor.device.type, _CHUNK_ELSEWHERE)


def _cause(model: PreTrainedModel) -> str:
    """Tell why a loss is not finite: a broken weight, or activations that overflow."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            return f"weight {name!r} holds NaN or infinity; make or download the checkpoint again"
    kind = str(model.dtype).removeprefix("torch.")
    return f"all weights are finite, so activations overflow in {kind}; evaluate in bfloat16 or float32"
