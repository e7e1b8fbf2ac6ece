"""In which order dimensions of the residual stream can leave when what reads the others compensates.

Every input projection reads the normed stream, and is refitted to what stays of it (optimal brain surgeon, as in
:mod:`.second_order`, with one order for all readers): removing dimension j costs reader W with inputs of second moments
G = E[x x^T] at least ``|w_j|^2 / (G + r I)^-1[j, j]``, relative to the energy ``trace(W G W^T)`` of what it gives. The
head is refitted nowhere, as it may be the embeddings too: there a dimension costs ``|w_j|^2 G[j, j]``, likewise
relative. The dimension with the smallest sum over all readers leaves; then weights and inverses are updated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from multipruner.engine.cutting import Projection
from multipruner.engine.layer_calls import State, stream_of
from multipruner.engine.moments import add_moments, embedded, mirrored
from multipruner.engine.prunable import Prunable

from .second_order import Elimination, inverse_of

Progress = Callable[[int, int], None]


@torch.inference_mode()
def order_of_stream(
    prunable: Prunable, ids: Tensor, keep: int = 0, progress: Progress | None = None
) -> tuple[int, ...]:
    """Return the dimensions of the residual stream, the last to leave first.

    Args:
        prunable: the dense model.
        ids: token ids, [sequences, length].
        keep: how many stay in any case: these come first, as they lie in the model.
        progress: called with (readers seen or dimensions gone, so many in all).

    Raises:
        NumericsError: when second moments are not finite or cannot be inverted.
    """
    states, shares = [], []
    fixed = torch.zeros(0)
    for number, (weight, gram) in enumerate(_readers(prunable, ids)):
        energy = float((weight.T @ weight * gram).sum()) or 1.0
        if number == len(prunable.anatomy):
            fixed = weight.square().sum(dim=0) * gram.diagonal() / energy
        else:
            states.append(Elimination(_square(weight), inverse_of(gram), 1))
            shares.append(energy)
        if progress is not None:
            progress(number + 1, len(prunable.anatomy) + 1)
    leaving: list[int] = []
    fewer = states[0].there - keep
    while len(leaving) < fewer:
        there = states[0].groups  # the same in all, as the same ones left
        prices = fixed[there] + sum(state.prices() / energy for state, energy in zip(states, shares, strict=True))
        numbers, places = torch.sort(there)
        out = numbers[prices[places].argmin()][None]
        leaving.append(int(out))
        for state in states:
            state.remove(out)
        if progress is not None:
            progress(len(leaving), fewer)
    return (*sorted(states[0].groups.tolist()), *reversed(leaving))


def _square(weight: Tensor) -> Tensor:
    """Return a matrix [n, n] at most with the same ``W^T W``, which is all that prices depend on."""
    return torch.linalg.qr(weight, mode="r").R if len(weight) > weight.shape[1] else weight


def _readers(prunable: Prunable, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what reads the stream, block by block and the head at last: its weights, float32 [outputs, hidden_size],
    and the second moments of what it reads, [hidden_size, hidden_size].
    """
    batches = embedded(prunable, ids)
    states: list[State] = [batch.hidden for batch in batches]
    for number, size in enumerate(prunable.dense):
        gram = second_moments([prunable.read_by(state, number) for state in states])
        yield torch.cat(list(_weights(prunable, number))), gram
        states = [prunable.block(state, batch, number, size) for state, batch in zip(states, batches, strict=True)]
    yield prunable.head_weight.float(), second_moments([prunable.normed(stream_of(state)) for state in states])


def _weights(prunable: Prunable, block: int) -> Iterator[Tensor]:
    spec, module = prunable.block_spec(block), prunable.module(block)
    for tensor in spec.inputs:
        of: nn.Module = module.get_submodule(tensor.path.rpartition(".")[0])
        yield Projection.of(of, tensor.dims[0].text == "hidden").weight.float()


def second_moments(states: list[Tensor]) -> Tensor:
    """Return mean of ``x x^T`` over tokens, float32."""
    width = states[0].shape[-1]
    total = torch.zeros(width, width, device=states[0].device)
    for each in states:
        add_moments(total, each.flatten(0, -2).float())
    return mirrored(total) / sum(each[..., 0].numel() for each in states)
