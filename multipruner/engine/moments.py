"""What calibration text says about the inputs of output projections: means and second moments, one pass over the text.

The matrices drive the order in which channels and heads go (:mod:`multipruner.importance`) and the closed-form repair
of what stays (:mod:`multipruner.repair.columns`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from multipruner.core.structure import Anatomy

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
        routes: block of experts -> what its experts did with the tokens that were routed to them.
    """

    grams: MutableMapping[int, Tensor] = field(default_factory=dict)
    tokens: int = 0
    hash: str = ""
    means: dict[int, Tensor] = field(default_factory=dict)
    place: Place = dict
    routes: dict[int, Routes] = field(default_factory=dict)


@dataclass(frozen=True)
class Routes:
    """What the experts of one block did on a text, [experts] each, in the dense numbering.

    With ``s = g |f(x)|``, the weight that a token gives to an expert times the norm of what the expert returns:

    Attributes:
        tokens: how many tokens were routed to each.
        mean: of ``s`` over those tokens, the saliency of REAP (arXiv 2510.13999, equation 9); 0 where there were none.
        squares: mean of ``s^2`` over all tokens of the text.
    """

    tokens: Tensor
    mean: Tensor
    squares: Tensor


FEW = 32
"""Tokens of which fewer leave it to chance what an expert is worth."""


def seldom_routed(moments: Statistics, anatomy: Anatomy) -> str | None:
    """Return one line that names the layers with experts that saw few tokens, and how many; ``None`` where none did."""
    found = {}
    for block, routes in moments.routes.items():
        if few := int((routes.tokens < FEW).sum()):
            found[anatomy[block].layer] = f"{few} of {len(routes.tokens)} (one of them {int(routes.tokens.min())})"
    if not found:
        return None
    layers = "; ".join(f"layer {layer}: {text}" for layer, text in sorted(found.items()))
    return (
        f"experts that saw fewer than {FEW} tokens, so that their place in the order is a guess: {layers}; more text "
        "helps (calibration.moments_sequences)"
    )


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
    moments = Statistics(place(), len(ids) * positions_of(prunable, ids), hashed, place=place)
    for block, found in stream(prunable, ids):
        if isinstance(found, Moments):
            moments.grams[block], moments.means[block] = found.second(), found.first()
        else:
            moments.routes[block] = found.routes()
        if progress is not None:
            progress(block + 1, len(prunable.anatomy))
    return moments


@torch.inference_mode()
def stream(prunable: Prunable, ids: Tensor) -> Iterator[tuple[int, Moments | Routing]]:
    """Yield one block after another: (its number, what was gathered), so that one matrix is in memory at a time.

    Args:
        prunable: the dense model.
        ids: token ids, [sequences, length]; the hidden states of all of them are kept, in the model's dtype.
    """
    on_cpu = prunable.model.device.type == "cpu"
    batches = embedded(prunable, ids, min(_PASS_TOKENS, BATCH_TOKENS) if on_cpu else BATCH_TOKENS)
    states: list[State] = [batch.hidden for batch in batches]
    for block, size in enumerate(prunable.dense):
        with _gathering(prunable, block) as gathered:
            states = [prunable.block(state, batch, block, size) for state, batch in zip(states, batches, strict=True)]
        yield block, gathered


def _gathering(prunable: Prunable, block: int) -> Moments | Routing:
    spec = prunable.block_spec(block)
    if spec.output:
        return Moments(prunable.dense_output(block))
    experts = spec.inputs[0].dims[0].size(prunable.counts(block))
    return Routing(prunable.module(block).get_submodule(spec.routed), experts)


def embedded(prunable: Prunable, ids: Tensor, tokens: int | None = None) -> list[Inputs]:
    """Return token ids as batches that are ready for the first block, of ``BATCH_TOKENS`` or so many tokens each."""
    rows = max(1, (tokens or BATCH_TOKENS) // positions_of(prunable, ids))
    return [prunable.inputs(batch.to(prunable.model.device)) for batch in ids.split(rows)]


@torch.no_grad()
def positions_of(prunable: Prunable, ids: Tensor) -> int:
    """Return how many positions one row of what a model reads has: the tokens of a text, or what stands for a
    picture.
    """
    if prunable.spec.task.reads_text:
        return ids.shape[1]
    return prunable.inputs(ids[:1].to(prunable.model.device)).hidden.shape[1]


class _Gathering:
    """Sees what a module is called with, as long as it is entered."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._tokens = module, 0

    def __enter__(self) -> Self:
        self._hook = self._module.register_forward_pre_hook(self._add)
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise NotImplementedError


class Moments(_Gathering):
    """Sums ``x`` and ``x x^T`` over the inputs of a linear layer while it is entered; float32."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__(linear)
        self._squares: Tensor | None = None
        self._sum: Tensor | None = None

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


class Routing(_Gathering):
    """Follows the tokens of a text to the experts of a block while it is entered.

    The module of experts is asked once more for what every token gets from each of its experts alone, with weight one.
    """

    def __init__(self, module: nn.Module, experts: int) -> None:
        super().__init__(module)
        self._sums = torch.zeros(3, experts, dtype=torch.float64)

    def _add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        tokens, chosen, weights = args
        rows = tokens.flatten(0, -2).repeat_interleave(chosen.shape[-1], dim=0)
        alone = chosen.reshape(-1, 1)
        returned = module.forward(rows, alone, torch.ones_like(alone, dtype=weights.dtype))
        saliency = (weights.reshape(-1).float() * returned.float().norm(dim=-1)).double().cpu()
        found = torch.stack([torch.ones_like(saliency), saliency, saliency.square()])
        self._sums.index_add_(1, alone[:, 0].cpu(), found)
        self._tokens += len(rows) // chosen.shape[-1]

    def routes(self) -> Routes:
        """Return what was gathered."""
        assert self._tokens, "nothing ran"
        tokens, sums, squares = self._sums
        return Routes(tokens.long(), (sums / tokens.clamp(min=1)).float(), (squares / self._tokens).float())


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
