"""Errors of what blocks add at smaller sizes where no moments tell them: the blocks are run.

Which experts a token takes instead of those that left, and with which weights, its router decides; what attention gives
without some pairs of dimensions of its queries and keys goes through a softmax. So such a block is run on what it reads
in the dense model, whole and at some sizes, and what it adds is compared: one walk over the model for all blocks, where
a measured loss takes the way from the block to the end of the model for every size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from multipruner.core.structure import GONE, Size
from multipruner.engine.layer_calls import State
from multipruner.engine.moments import embedded
from multipruner.engine.prunable import Prunable
from multipruner.search import Task

LEVELS = 8
"""Steps between sizes that are run, from the smallest to the whole block; between them errors are on straight lines."""

Progress = Callable[[int, int], None]


def sizes_run(task: Task) -> dict[int, tuple[Size, ...]]:
    """Return which sizes of which blocks are run: of those whose errors no moments tell, some of every chain."""
    dense, found = task.anatomy.dense, dict[int, tuple[Size, ...]]()
    for block in sorted(task.straight):
        sizes = dict[Size, None]()
        for chain in task.chains(block, dense):
            last = len(chain) - 1
            places = {round(last * level / LEVELS) for level in range(LEVELS + 1)} | {int(chain[0] == GONE)}
            sizes |= dict.fromkeys(chain[place] for place in sorted(places) if chain[place] != dense[block])
        found[block] = tuple(sizes)
    return found


@torch.inference_mode()
def errors_as_run(
    prunable: Prunable, ids: Tensor, sizes: Mapping[int, Sequence[Size]], progress: Progress | None = None
) -> dict[int, dict[Size, float]]:
    """Return squared errors of what blocks add at some sizes, per token, summed over the residual stream.

    Args:
        prunable: the dense model, its units in the order in which they leave (inside :meth:`.Prunable.in_order`).
        ids: token ids, [sequences, length].
        sizes: of every block that is asked for.
        progress: called with (blocks done, blocks in all).
    """
    found: dict[int, dict[Size, float]] = {}
    last = max(sizes, default=-1)
    batches = embedded(prunable, ids) if sizes else []
    states: list[State] = [batch.hidden for batch in batches]
    for block in range(last + 1):
        sums = dict.fromkeys(sizes.get(block, ()), 0.0)
        for number, (state, batch) in enumerate(zip(states, batches, strict=True)):
            whole = prunable.output(state, batch, block, prunable.dense[block])
            added = prunable.added(whole, block).float() if sums else whole
            for size in sums:
                less = prunable.output(state, batch, block, size) if size else None
                error = added if less is None else added - prunable.added(less, block).float()
                sums[size] += float(error.square().sum())
            states[number] = prunable.after(state, whole, block)
        if sums:
            found[block] = {size: total / ids.numel() for size, total in sums.items()}
        if progress is not None:
            progress(block + 1, last + 1)
    return found
