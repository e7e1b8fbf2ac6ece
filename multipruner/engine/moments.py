"""What calibration text says about the inputs of output projections: means and second moments, one pass over the text.

The matrices drive the order in which channels and heads go (:mod:`multipruner.importance`) and the closed-form repair
of what stays (:mod:`multipruner.repair.columns`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .layer_calls import Inputs, State
from .prunable import Prunable

Progress = Callable[[int, int], None]
Place = Callable[[], MutableMapping[Any, Tensor]]
"""Makes what large matrices are kept in: ``dict`` for memory, for a file
:class:`multipruner.storage.tensors_on_disk.OnDisk`."""
BATCH_TOKENS = 4096
"""Tokens that run together."""
_PASS_TOKENS = 1024  # of a pass on a CPU: what blocks make in between then stays in the processor's cache
_BLOCK = 256  # columns whose products are taken together: a symmetric matrix needs little more than half of them


@dataclass
class Statistics:
    """Moments of the dense model.

    Attributes:
        grams: block -> mean over tokens of ``x x^T``, float32 [n, n], x the input of the block's output projection
            (query heads side by side, or MLP channels), in the dense numbering.
        tokens: how many tokens the means are of.
        hash: of the token ids.
        means: block -> mean over tokens of x, float32 [n]; empty where nobody gathered them, and then biases
            stay as they are.
        place: what ``grams`` is of, for what is made from it.
    """

    grams: MutableMapping[int, Tensor] = field(default_factory=dict)
    tokens: int = 0
    hash: str = ""
    means: dict[int, Tensor] = field(default_factory=dict)
    place: Place = dict


def gather(prunable: Prunable, ids: Tensor, progress: Progress | None = None, place: Place = dict) -> Statistics:
    """Gather all moments: 4 bytes times the squared columns of every output projection, in memory or where ``place``
    says.

    Args:
        prunable: the dense model.
        ids: token ids, [sequences, length].
        progress: called with (blocks done, blocks in all).
        place: where second moments, and what is repaired with them, are kept.
    """
    hashed = hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()
    moments = Statistics(place(), ids.numel(), hashed, place=place)
    for block, gram, mean in stream(prunable, ids):
        moments.grams[block], moments.means[block] = gram, mean
        if progress is not None:
            progress(block + 1, len(prunable.anatomy))
    return moments


@torch.inference_mode()
def stream(prunable: Prunable, ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield one block after another: (its number, second moments, means), so that one matrix is in memory at a time.

    Args:
        prunable: the dense model.
        ids: token ids, [sequences, length]; the hidden states of all of them are kept, in the model's dtype.
    """
    on_cpu = prunable.model.device.type == "cpu"
    batches = embedded(prunable, ids, min(_PASS_TOKENS, BATCH_TOKENS) if on_cpu else BATCH_TOKENS)
    states: list[State] = [batch.hidden for batch in batches]
    for block, size in enumerate(prunable.dense):
        with Moments(prunable.dense_output(block)) as moments:
            states = [prunable.block(state, batch, block, size) for state, batch in zip(states, batches, strict=True)]
        yield block, moments.second(), moments.first()


def embedded(prunable: Prunable, ids: Tensor, tokens: int | None = None) -> list[Inputs]:
    """Return token ids as batches that are ready for the first block, of ``BATCH_TOKENS`` or so many tokens each."""
    rows = max(1, (tokens or BATCH_TOKENS) // ids.shape[1])
    return [prunable.inputs(batch.to(prunable.model.device)) for batch in ids.split(rows)]


class Moments:
    """Sums ``x`` and ``x x^T`` over the inputs of a linear layer while it is entered; float32."""

    def __init__(self, linear: nn.Module) -> None:
        self._linear = linear
        self._squares: Tensor | None = None
        self._sum: Tensor | None = None
        self._tokens = 0

    def __enter__(self) -> Moments:
        self._hook = self._linear.register_forward_pre_hook(self._add)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows = args[0].flatten(0, -2)
        if self._squares is None or self._sum is None:
            self._squares = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self._sum = torch.zeros(rows.shape[1], device=rows.device)
        with products_of(rows.dtype):
            add_moments(self._squares, rows.float())
        self._sum += rows.sum(dim=0, dtype=torch.float32)
        self._tokens += len(rows)

    def first(self) -> Tensor:
        """Return mean of ``x`` over the tokens, [n]."""
        assert self._sum is not None, "nothing ran"
        return self._sum / self._tokens

    def second(self) -> Tensor:
        """Return mean of ``x x^T`` over the tokens, [n, n]."""
        assert self._squares is not None, "nothing ran"
        return mirrored(self._squares) / self._tokens


@contextmanager
def products_of(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 matrices that hold bfloat16 numbers at bfloat16's speed; undone on leaving.

    Products of two such numbers are exact and sums stay in float32, so that only other numbers lose digits.

    Args:
        dtype: of the numbers; nothing changes unless it is bfloat16.
    """
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for single backends, by newer means
        before = None
    if dtype is not torch.bfloat16 or before is None:
        yield
        return
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def add_moments(total: Tensor, rows: Tensor) -> None:
    """Add ``rows^T rows`` to the upper triangle of ``total`` in blocks; what is below the diagonal is not meant.

    Args:
        total: float32 [n, n].
        rows: float32 [tokens, n].
    """
    for begin in range(0, rows.shape[1], _BLOCK):
        block = slice(begin, begin + _BLOCK)
        total[block, begin:].addmm_(rows[:, block].T, rows[:, begin:])


def mirrored(total: Tensor) -> Tensor:
    """Return the whole symmetric matrix of which only the upper triangle is meant."""
    return total.triu() + total.triu(1).T
