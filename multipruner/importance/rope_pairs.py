"""Which pairs of dimensions of queries and keys leave first, in every KV group.

A score is the sum of what the pairs of dimensions that rotary embeddings turn give, ``sum_p q_p . k_p``. Without the
pairs of a set S, its expected squared error is the sum over S x S of ``tr(E[q_p q_s^T]^T Cov(k_p, k_s))``, q and k
turned already, as far as queries and keys of a text do not know of each other. What is the same for all keys of a text
changes no softmax, so keys are taken less their mean. Pairs leave one after another by what each adds to that, in the
sum over the group's query heads. Without text they leave by the product of the squared norms of their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from multipruner.core.axes import AXES, PAIRS
from multipruner.core.plan import BlockUnits, Ranking
from multipruner.core.structure import Size
from multipruner.engine.layer_calls import Inputs, State
from multipruner.engine.moments import embedded, positions_of
from multipruner.engine.prunable import Prunable
from multipruner.engine.values.asked import queries_and_keys

from .errors_as_run import errors_as_run

TOKENS = 2048
"""That orders and errors are taken from."""
Progress = Callable[[int, int], None]
Errors = dict[int, dict[int, float]]
"""Block -> pairs that every KV group keeps -> the mean over tokens of the squared error of what the block adds."""


def few_of(prunable: Prunable, ids: Tensor) -> Tensor:
    """Return as many rows of a text as orders of pairs are taken from, [sequences, length]."""
    return ids[: max(1, TOKENS // positions_of(prunable, ids))]


@torch.no_grad()
def with_pairs(prunable: Prunable, ranking: Ranking, ids: Tensor | None, progress: Progress | None = None) -> Ranking:
    """Return a ranking in which the pairs of every KV group are in order.

    Args:
        prunable: the dense model, not in order.
        ranking: of all else.
        ids: token ids, [sequences, length]; ``None``: the weights alone say it.
        progress: called with (blocks done, blocks in all).
    """
    blocks, batches = list(ranking.blocks), [] if ids is None else embedded(prunable, ids)
    states: list[State] = [batch.hidden for batch in batches]
    for block, size in enumerate(prunable.dense):
        if prunable.block_spec(block).giving(PAIRS):
            orders = _by_text(prunable, block, states, batches) if batches else _by_weights(prunable, block)
            at = [axis.name for axis in prunable.anatomy[block].axes].index(PAIRS)
            blocks[block] = BlockUnits((*blocks[block].axes[:at], orders, *blocks[block].axes[at + 1 :]))
        states = [prunable.block(state, batch, block, size) for state, batch in zip(states, batches, strict=True)]
        if progress is not None:
            progress(block + 1, len(prunable.anatomy))
    return replace(ranking, blocks=tuple(blocks))


def _by_weights(prunable: Prunable, block: int) -> tuple[tuple[int, ...], ...]:
    module, counts = prunable.module(block), prunable.counts(block)
    squares = []
    for tensor in prunable.block_spec(block).giving(PAIRS):
        rows = module.get_parameter(tensor.path).detach().float().square().sum(dim=1)
        units = torch.tensor(tensor.dims[0].units(PAIRS, counts), device=rows.device)
        squares.append(rows[units].sum(dim=1).unflatten(0, (-1, counts[PAIRS])))
    scores = squares[0] * squares[1]
    return tuple(map(tuple, scores.sort(dim=1, descending=True, stable=True).indices.tolist()))


def _by_text(
    prunable: Prunable, block: int, states: Sequence[State], batches: Sequence[Inputs]
) -> tuple[tuple[int, ...], ...]:
    counts, size = prunable.counts(block), prunable.dense[block]
    keys = prunable.block_spec(block).giving(PAIRS)[1].dims[0]
    dims = torch.tensor(keys.units(PAIRS, {**counts, AXES[PAIRS].within: 1}))
    found: Tensor | None = None
    for state, batch in zip(states, batches, strict=True):
        run = lambda state=state, batch=batch: prunable.block(state, batch, block, size)  # noqa: E731
        query, key = (each.float() for each in queries_and_keys(prunable.module(block), run))
        query = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)  # [sequences, groups, heads * length, head_dim]
        key = key - key.mean(dim=2, keepdim=True)
        products = (query.mT @ query / query.shape[2]) * (key.mT @ key / key.shape[2])
        found = products.sum(dim=0) if found is None else found + products.sum(dim=0)
    assert found is not None, "there is text"
    found = found[:, dims.flatten()][:, :, dims.flatten()].double().cpu()
    shared = found.unflatten(2, dims.shape).unflatten(1, dims.shape).sum(dim=(2, 4))
    return tuple(map(elimination, shared))


def elimination(shared: Tensor) -> tuple[int, ...]:
    """Return units in the order of which the last leave first, one after another by what each adds to the error.

    Args:
        shared: [units, units]; the error without a set of them is the sum over all pairs in it.
    """
    left: list[int] = []
    added = shared.diagonal().clone()
    for _ in range(len(shared)):
        least = int(added.argmin())
        left.append(least)
        added += 2 * shared[least]
        added[least] = torch.inf
    return tuple(reversed(left))


def pair_errors(
    prunable: Prunable, ranking: Ranking, ids: Tensor, kept: Callable[[int], Sequence[Size]],
    progress: Progress | None = None,
) -> Errors:  # fmt: skip
    """Return what every attention block adds otherwise when its KV groups keep fewer pairs, measured.

    Args:
        prunable: the dense model, not in order.
        ranking: in which the pairs are in order.
        ids: token ids, [sequences, length].
        kept: block -> its sizes that differ from the dense one in pairs alone.
        progress: called with (blocks done, blocks in all).
    """
    sizes = {block: tuple(kept(block)) for block in range(len(prunable.anatomy))}
    with prunable.in_order(ranking):
        found = errors_as_run(prunable, ids, {block: row for block, row in sizes.items() if row}, progress)
    return {block: {size[-1]: error for size, error in row.items()} for block, row in found.items()}
