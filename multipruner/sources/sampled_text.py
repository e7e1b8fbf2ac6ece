"""Text that a model writes itself: calibration without any data set, for machines that cannot reach one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import Cache

from multipruner.core.families import cache_argument
from multipruner.core.identity import digest
from multipruner.engine.fingerprint import configuration, fingerprint
from multipruner.engine.grouped_attention import grouped_attention, narrow_cache, stored_in
from multipruner.engine.prunable import Prunable
from multipruner.engine.token_losses import drawn
from multipruner.storage.cache import cache_folder, work_folder
from multipruner.storage.files import publish

from .filled_cache import cache_for

SAMPLING = 8
"""Raised when the same seed gives other text."""
BATCH_TOKENS = 32768
BATCH_BYTES, MOST_BATCH_BYTES = 3 << 29, 4 << 30
"""Sampled side by side: so many tokens, or more where their keys and values take no more memory than the first amount,
or less where they would take more than the second. Independent of the machine, so that the text is."""
_ROWS = 8
"""Sequences whose probabilities are in memory together on a CPU: more do not fit the processor's cache."""
PARAMETERS_PER_THREAD = 50_000_000
"""A step of a small model is hundreds of small multiplications, whose threads mostly wait for each other."""

Progress = Callable[[int, int], None]


def self_text(
    model: Any, tokenizer: Any, sequences: int, length: int, seed: int, progress: Progress | None = None
) -> torch.Tensor:
    """Sample sequences from a model, or take them from the cache where they were sampled before.

    Args:
        model: the dense causal language model.
        tokenizer: its tokenizer.
        sequences: how many.
        length: tokens per sequence, the first token included.
        seed: of the sampling.
        progress: called with (tokens done, tokens in all).

    Returns:
        Token ids, int64 [sequences, length], on the CPU.
    """
    target, parts = _places(model, tokenizer, sequences, length, seed)
    if target.exists():
        ids = _load(target)
    else:
        ids = sample(model, tokenizer, sequences, length, seed, progress, parts)
        _save(ids, target)
    shutil.rmtree(parts, ignore_errors=True)
    return ids


def _places(model: Any, tokenizer: Any, sequences: int, length: int, seed: int) -> tuple[Path, Path]:
    """Tell where a sampling is kept: whole, and batch by batch until it is."""
    dense = [fingerprint(model), configuration(model), str(model.device.type), str(stored_in(model))]
    settings = [SAMPLING, *dense, sequences, length, seed, *_starts(tokenizer)]
    target = cache_folder() / "self-text" / f"{digest(settings)[:32]}.safetensors"
    return target, target.with_suffix(".parts")


def unsampled(model: Any, tokenizer: Any, sequences: int, length: int, seed: int) -> int:
    """Tell how many sequences :func:`self_text` would still have to sample."""
    target, parts = _places(model, tokenizer, sequences, length, seed)
    kept = [int(path.stem.rpartition("-")[2]) for path in parts.glob("*-*.safetensors")] if parts.is_dir() else []
    return 0 if target.exists() else max(0, sequences - sum(kept))


def side_by_side(kv_bytes_per_token: int, length: int) -> int:
    """Return sequences of a length that are sampled together."""
    each = max(kv_bytes_per_token, 1)  # mixers alone keep no more for a longer text
    tokens = max(min(BATCH_TOKENS, MOST_BATCH_BYTES // each), BATCH_BYTES // each)
    return tokens // length or 1


def _save(ids: torch.Tensor, target: Path) -> None:
    from safetensors.torch import save_file

    with work_folder() as work:
        save_file({"input_ids": ids}, work / "ids")
        publish(work / "ids", target)


def _load(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(path)["input_ids"]


@torch.inference_mode()
def sample(
    model: Any,
    tokenizer: Any,
    sequences: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
    parts: Path | None = None,
) -> torch.Tensor:
    """Sample from the full distribution (temperature 1) after a random token.

    Where the tokenizer puts tokens before ordinary text (BOS), they come before it here too.
    An end-of-text token ends nothing: the model goes on after it, as in packed documents. Only a generator of its
    own is used, so torch's global random state stays as it was, and what a sequence becomes depends on its own
    row of random numbers. ``model.generate`` is not used: it would add the checkpoint's own sampling settings.
    Arguments and result are those of :func:`self_text`.

    Args:
        parts: a folder that keeps what is sampled side by side as soon as it is whole, and that a sampling which was
            stopped goes on from; it belongs to one model, tokenizer, length and seed. It may not exist yet.
    """
    generator = torch.Generator().manual_seed(seed)
    first = _first_tokens(tokenizer, sequences, generator)[:, :length]
    draws = torch.rand(sequences, length, generator=generator)
    batches = []
    with threads_for(sum(weight.numel() for weight in model.parameters())), grouped_attention(model):
        kept_in = narrow_cache(model)
        dense = Prunable.of(model, kept_in)
        rows = side_by_side(dense.costs.kv_bytes_per_token(dense.dense), length)
        for begin in range(0, sequences, rows):
            chosen = slice(begin, begin + rows)
            kept = parts and parts / f"{begin}-{len(first[chosen])}.safetensors"
            if kept is not None and kept.exists():
                batches.append(_load(kept))
                continue

            def tell(position: int, begin: int = begin, now: int = len(first[chosen])) -> None:
                if progress is not None:
                    progress(begin * length + now * position, sequences * length)

            batches.append(_continue(model, cache_for(model, length, kept_in), first[chosen], draws[chosen], tell))
            if kept is not None:
                _save(batches[-1], kept)
    return torch.cat(batches).clone()


@contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """Use as many threads as a step keeps busy; not chosen by timing, since rounding may depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 1 + parameters // PARAMETERS_PER_THREAD))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _continue(
    model: Any, cache: Cache | None, first: torch.Tensor, draws: torch.Tensor, tell: Callable[[int], None]
) -> torch.Tensor:
    """Grow sequences [sequences, given tokens] token by token: each draw in [0, 1) picks from the cumulated
    probabilities."""
    device, name = model.device, cache_argument(model)
    first, draws, rows = first.to(device), draws.to(device), _ROWS if device.type == "cpu" else len(draws)
    ids = [first[:, :1]]
    told = "position_ids" in signature(model.forward).parameters  # not every model counts what is in its cache
    for position in range(1, draws.shape[1]):
        at = {"position_ids": torch.tensor([[position - 1]], device=device)} if told else {}
        out = model(input_ids=ids[-1], use_cache=True, **{name: cache}, **at)
        cache = getattr(out, name)
        tell(position + 1)
        if position < first.shape[1]:
            ids.append(first[:, position : position + 1])
            continue
        parts = zip(out.logits[:, -1].split(rows), draws[:, position, None].split(rows), strict=True)
        ids.append(torch.cat([drawn(logits.float().softmax(-1), draw) for logits, draw in parts]))
    return torch.cat(ids, dim=1).cpu()


def _starts(tokenizer: Any) -> tuple[list[int], int]:
    """Return what the tokenizer puts before ordinary text, and the number of ordinary tokens."""
    with_special, without = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    count = next((n for n in range(len(with_special)) if with_special[n : n + len(without)] == without), 0)
    return with_special[:count], len(tokenizer)


def _first_tokens(tokenizer: Any, sequences: int, generator: torch.Generator) -> torch.Tensor:
    """Return what sequences start with, [sequences, tokens]: the same tokens before all, and one that is drawn."""
    before, size = _starts(tokenizer)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(size) if token not in special])
    drawn = ordinary[torch.randint(len(ordinary), (sequences, 1), generator=generator)]
    return torch.cat([torch.tensor([before] * sequences, dtype=torch.int64).reshape(sequences, -1), drawn], dim=1)
