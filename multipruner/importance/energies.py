"""How much the loss minds an error in a block's output: one backward pass, no gradient of a weight.

With a cotangent u on the logits whose covariance is that of the next-token distribution p (Gaussian e: ``u = sqrt(p) e
- p (sqrt(p) . e)``), the gradient g with respect to the residual stream behind a block has ``E (g . d)^2`` twice the
divergence that a small error d there causes (the Fisher information of the outputs). Where errors point anywhere,
``E (g . d)^2 = E|g|^2 E|d|^2 / hidden_size``: two energies per block, and the second follows from the moments
(:mod:`multipruner.repair.errors`). Few tokens carry most of the first, such as those that others attend to in any case;
they are cut off at a high quantile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from multipruner.core.structure import Size
from multipruner.engine.layer_calls import Beside, Inputs, State, stream_of
from multipruner.engine.moments import positions_of
from multipruner.engine.prunable import Prunable
from multipruner.engine.token_losses import tokens_at_once
from multipruner.search import Task
from multipruner.search.options import interpolated
from multipruner.search.program import Table

QUANTILE = 0.99
"""Of the tokens' energies: what is above counts as much as this."""
FACTOR = 1.3
"""By which the product of both energies was too small on SmolLM2-135M, the same for attention, MLPs and all widths."""

TOKENS = 4096
"""That sensitivities are taken from; twice as many changed two of 60 blocks on SmolLM2-135M."""

Progress = Callable[[int, int], None]


def sensitivities(prunable: Prunable, ids: Tensor, *, seed: int = 0, progress: Progress | None = None) -> list[float]:
    """Return for every block by how many nats per token, or picture, the divergence grows with the squared error of its
    output.

    The states at the input of every block are kept for one sequence at a time, and blocks run again one by one on the
    way back, so that memory holds the activations of one block. Where layers are on disk, all sequences go together,
    and their states are there, too: one walk over the model to its end, and one back.

    Args:
        prunable: the dense model.
        ids: token ids [sequences, length], or pixels [pictures, channels, height, width].
        seed: of the cotangents.
        progress: called with (sequences done, sequences in all).
    """
    generator = torch.Generator(prunable.model.device).manual_seed(seed)  # as many numbers as there are logits
    energies: list[list[Tensor]] = [[] for _ in prunable.anatomy]
    with frozen(prunable.model):
        together = len(ids) if prunable.on_disk else 1
        for number, rows in enumerate(ids.to(prunable.model.device).split(together)):
            for block, gradients in _gradients(prunable, rows.split(1), generator):
                energies[block] += [gradient.float().square().sum(dim=-1).flatten() for gradient in gradients]
            if progress is not None:
                progress(number * together + len(rows), len(ids))
    means = (_cut_off(torch.cat(one)) for one in energies)
    # errors of all positions of a picture meet in its one distribution
    met = 1 if prunable.spec.task.reads_text else positions_of(prunable, ids)
    return [FACTOR / 2 * met * mean / prunable.anatomy.constants["hidden"] for mean in means]


def first_tables(task: Task, factors: Sequence[float], ran: Mapping[int, Mapping[Size, float]]) -> Table:
    """Return loss increases of the options of all blocks whose errors can be told: sensitivity times squared error.

    Args:
        task: tells the errors that follow from moments.
        factors: the sensitivity of every block.
        ran: squared errors of the other blocks' options, some of every chain (:mod:`.errors_as_run`); between them
            errors are on straight lines.
    """
    dense, table = task.anatomy.dense, {}
    for block, factor in enumerate(factors):
        rows = []
        for chain in task.chains(block, dense):
            told = task.errors_of(block, chain)
            if told is None:
                known = {size: ran[block][size] for size in chain if size in ran[block]}
                errors = interpolated({**known, dense[block]: 0.0}, chain)
            else:
                errors = dict(zip(chain, told, strict=True))
            rows.append({size: 0.0 if size == dense[block] else factor * errors[size] for size in chain})
        table[block] = task.predicted(block, dense, rows)
    return table


def _cut_off(energies: Tensor) -> float:
    return float(energies.clamp(max=float(energies.quantile(QUANTILE))).mean())


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Compute no gradient of a weight; undone on leaving."""
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in learning:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learning:
            weight.requires_grad_(True)


def _gradients(
    prunable: Prunable, rows: Sequence[Tensor], generator: torch.Generator
) -> Iterator[tuple[int, list[Tensor]]]:
    """Yield (block, for every sequence the gradient with respect to the stream behind it, [1, length, hidden_size]),
    the last block first.
    """
    with torch.no_grad():
        batches = [prunable.inputs(ids) for ids in rows]
        states: list[list[State]] = [[batch.hidden] for batch in batches]
        for block, size in enumerate(prunable.dense):
            for own, batch in zip(states, batches, strict=True):
                own.append(prunable.block(own[-1], batch, block, size))
                own[-2] = _like(own[-2], [prunable.keep(part) for part in parts_of(own[-2])])
    gradients = [(_of_logits(prunable, stream_of(own.pop()), generator),) for own in states]
    for block in reversed(range(len(prunable.anatomy))):
        yield block, [parts[0] for parts in gradients]
        if block:  # what is before the first one is nobody's output
            pairs = zip(states, batches, gradients, strict=True)
            gradients = [gradients_before(prunable, own.pop(), batch, block, behind) for own, batch, behind in pairs]


def gradients_before(
    prunable: Prunable, before: State, inputs: Inputs, block: int, gradients: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return the gradients with respect to the parts of the state before a block, from those behind it.

    Args:
        prunable: the dense model, no weight of which asks for a gradient.
        before: the state at the input of the block.
        inputs: of the model, for the sequences of that state.
        block: its place among the residual blocks.
        gradients: with respect to the parts of the state behind it.
    """
    with torch.enable_grad():
        parts = tuple(part.detach().requires_grad_() for part in parts_of(before))
        after = parts_of(prunable.block(_like(before, parts), inputs, block, prunable.dense[block]))
    found = torch.autograd.grad(after, parts, gradients, allow_unused=True)
    pairs = zip(found, parts, strict=True)
    return tuple(torch.zeros_like(part) if one is None else one for one, part in pairs)


def parts_of(state: State) -> tuple[Tensor, ...]:
    """Return the stream as it is, and, between blocks that run side by side, as it was before them."""
    return tuple(state) if isinstance(state, Beside) else (state,)


def _like(state: State, parts: Sequence[Tensor]) -> State:
    return Beside(*parts) if isinstance(state, Beside) else parts[0]


def _of_logits(prunable: Prunable, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient behind the last block, for one draw of the cotangent at every token that is scored, or for
    the picture; same shape as hidden.
    """
    if prunable.spec.task.reads_text:
        return _at_all(prunable, hidden[0], generator)[None]
    return _at_all(prunable, hidden, generator)


def _at_all(prunable: Prunable, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Return the gradient of every row that has a distribution: a token [hidden_size], or a picture [positions,
    hidden_size].
    """
    parts = []
    for part in hidden.split(tokens_at_once(prunable.head_weight)):
        with torch.enable_grad():
            states = part.detach().requires_grad_()
            logits = prunable.head(prunable.normed(states)).float()
            if prunable.cap is not None:
                logits = prunable.cap * torch.tanh(logits / prunable.cap)
        root = logits.detach().softmax(dim=1).sqrt()
        drawn = root * torch.randn(root.shape, generator=generator, device=root.device)
        cotangent = drawn - root.square() * drawn.sum(dim=1, keepdim=True)
        parts += torch.autograd.grad(logits, states, cotangent)
    return torch.cat(parts)
