"""Text that a model writes itself: calibration without any data set, for machines that cannot reach one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from multipruner.core.identity import digest
from multipruner.engine.fingerprint import configuration, fingerprint
from multipruner.engine.grouped_attention import grouped_attention
from multipruner.engine.prunable import Prunable
from multipruner.engine.sampling import drawn
from multipruner.storage.cache import cache_folder, work_folder
from multipruner.storage.files import publish

SAMPLING = 6
"""Raised when the same seed gives other text."""
BATCH_TOKENS = 32768
BATCH_BYTES, MOST_BATCH_BYTES = 3 << 29, 4 << 30
"""Sampled side by side: so many tokens, or more where their keys and values take no more memory than the first amount,
or less where they would take more than the second. Independent of the machine, so that the text is."""
ROOM = 64
"""Positions by which the cache grows: every step attends to all that there is room for."""
PARAMETERS_PER_THREAD = 50_000_000
"""A step of a small model is hundreds of small multiplications, whose threads mostly wait for each other."""

Progress = Callable[[int, int], None]


def self_text(
    model: Any, tokenizer: Any, sequences: int, length: int, seed: int, progress: Progress | None = None
) -> torch.Tensor:
    """Sequences sampled from a model, from the cache where they were sampled before.

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
    """Where a sampling is kept: whole, and batch by batch until it is."""
    dense = [fingerprint(model), configuration(model), str(model.device.type)]
    settings = [SAMPLING, *dense, sequences, length, seed, *_starts(tokenizer)]
    target = cache_folder() / "self-text" / f"{digest(settings)[:32]}.safetensors"
    return target, target.with_suffix(".parts")


def unsampled(model: Any, tokenizer: Any, sequences: int, length: int, seed: int) -> int:
    """How many sequences :func:`self_text` would still have to sample."""
    target, parts = _places(model, tokenizer, sequences, length, seed)
    kept = [int(path.stem.rpartition("-")[2]) for path in parts.glob("*-*.safetensors")] if parts.is_dir() else []
    return 0 if target.exists() else max(0, sequences - sum(kept))


def side_by_side(kv_bytes_per_token: int, length: int) -> int:
    """Sequences of a length that are sampled together."""
    tokens = max(min(BATCH_TOKENS, MOST_BATCH_BYTES // kv_bytes_per_token), BATCH_BYTES // kv_bytes_per_token)
    return tokens // length or 1


def cache_for(model: Any, room: int) -> StaticCache | None:
    """Keys and values for so many positions, as sampling has them; ``None`` for what a model makes itself."""
    return _roomier(None, model.config, room, 0) if getattr(model, "_can_compile_fullgraph", False) else None


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
    dense = Prunable.of(model)
    rows = side_by_side(dense.costs.kv_bytes_per_token(dense.dense), length)
    batches = []
    with threads_for(sum(weight.numel() for weight in model.parameters())), grouped_attention(model):
        for begin in range(0, sequences, rows):
            chosen = slice(begin, begin + rows)
            kept = parts and parts / f"{begin}-{len(first[chosen])}.safetensors"
            if kept is not None and kept.exists():
                batches.append(_load(kept))
                continue

            def tell(position: int, begin: int = begin, now: int = len(first[chosen])) -> None:
                if progress is not None:
                    progress(begin * length + now * position, sequences * length)

            batches.append(_continue(model, first[chosen], draws[chosen], tell))
            if kept is not None:
                _save(batches[-1], kept)
    return torch.cat(batches).clone()


@contextmanager
def threads_for(parameters: int) -> Iterator[None]:
    """As many threads as a step keeps busy; not chosen by timing, since rounding may depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, 1 + parameters // PARAMETERS_PER_THREAD))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _continue(model: Any, first: torch.Tensor, draws: torch.Tensor, tell: Callable[[int], None]) -> torch.Tensor:
    """Grow sequences [sequences, given tokens] token by token: each draw in [0, 1) picks from the cumulated
    probabilities."""
    ids = [first[:, :1]]
    # a cache that grows in every step is copied in every step, which took half of the time with 256 tokens
    static, cache, room, length = getattr(model, "_can_compile_fullgraph", False), None, 1, draws.shape[1]
    for position in range(1, length):
        if static and position == room:
            cache = _roomier(cache, model.config, room := min(length, room + ROOM), position - 1)
            # layers with a window know only the last positions
            if not all(isinstance(layer, StaticLayer) and not layer.is_sliding for layer in cache.layers):
                cache, room = _roomier(None, model.config, length, 0), length
        out = model(input_ids=ids[-1].to(model.device), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        tell(position + 1)
        if position < first.shape[1]:
            ids.append(first[:, position : position + 1])
            continue
        ids.append(drawn(out.logits[:, -1].float().softmax(-1), draws[:, position, None]).cpu())
    return torch.cat(ids, dim=1)


def _roomier(cache: StaticCache | None, config: Any, room: int, filled: int) -> StaticCache:
    """A cache with room for so many positions, the filled ones copied."""
    larger = StaticCache(config=config, max_cache_len=room)
    for index, layer in enumerate(cache.layers if cache is not None else ()):
        assert isinstance(layer, StaticLayer) and layer.keys is not None and layer.values is not None
        larger.update(layer.keys[:, :, :filled], layer.values[:, :, :filled], index)
        layer.keys = layer.values = None  # both caches as a whole would be twice the memory
    return larger


def _starts(tokenizer: Any) -> tuple[list[int], int]:
    """What the tokenizer puts before ordinary text, and the number of ordinary tokens."""
    with_special, without = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    count = next((n for n in range(len(with_special)) if with_special[n : n + len(without)] == without), 0)
    return with_special[:count], len(tokenizer)


def _first_tokens(tokenizer: Any, sequences: int, generator: torch.Generator) -> torch.Tensor:
    """What sequences start with, [sequences, tokens]: the same tokens before all, and one that is drawn."""
    before, size = _starts(tokenizer)
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(size) if token not in special])
    drawn = ordinary[torch.randint(len(ordinary), (sequences, 1), generator=generator)]
    return torch.cat([torch.tensor([before] * sequences, dtype=torch.int64).reshape(sequences, -1), drawn], dim=1)
