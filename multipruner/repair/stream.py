"""Repair of what has added up: every output projection refitted, first layer to last, on the pruned model's own stream.

Narrowing a block changes the inputs of all blocks after it. Going through the pruned model block by block, with x the
input of an output projection there and h' the residual stream before the block, its columns become

    argmin_W'  E |t - W' x|^2 + r |W' - W_S|^2,      t = (h_after - h_before) + m (h_before - h'),

h the dense model's stream: the block gives what it gave in the dense model and makes good for a share m of what the
blocks before it, removed ones included, have got wrong. Of two blocks that run side by side, both read the layer's
beginning, and the second makes good for the first as well, since both add to one stream. Closed form, nothing is added
to the model. It needs much text: on too little of it, it learns the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multipruner.core.errors import NumericsError
from multipruner.core.structure import Structure
from multipruner.engine.cutting import Projection
from multipruner.engine.layer_calls import Inputs, State, gain_of, stream_of, ungained
from multipruner.engine.moments import add_moments, embedded, mirrored, products_of
from multipruner.engine.prunable import Outputs, Prunable

from .columns import ridge_of

RIDGE = 0.2
"""Of the mean squared input: what adds up is noisier than one block's loss, so it is held closer to what there was."""
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""That every row of a matrix chooses from, where it chooses."""
HELD_OUT = 4
"""Of the batches, one in so many is held out while ridges are compared."""


@torch.inference_mode()
def accumulated(
    prunable: Prunable,
    structure: Structure,
    ids: Tensor,
    *,
    share: float = 1.0,
    ridge: float | None = RIDGE,
    progress: Callable[[int, int], None] | None = None,
    ends: Callable[[Tensor, Tensor], None] | None = None,
) -> Outputs:
    """Return output projections of the blocks that stay, from the first on that is not as it was.

    Args:
        prunable: the dense model, or one with a narrower residual stream, inside :meth:`Prunable.in_order` (with the
            repair of single blocks, if any).
        structure: what stays.
        ids: token ids, [sequences, length]; hidden states of all of them are kept twice, and one block's inputs.
        share: of the error of the blocks before that each block takes on, 0 to 1.
        ridge: relative to the mean squared input; ``None``: every row of a matrix takes that of ``RIDGES`` with which
            three quarters of the text tell the rest best, or stays as it is where none of them helps there; text of
            fewer batches than ``HELD_OUT`` takes ``RIDGE``.
        progress: called with (blocks done, blocks in all).
        ends: called with the hidden states after the last block, of the dense and of the repaired model, [sequences,
            length, hidden_size], batch by batch.

    Returns:
        Block -> a projection, columns in ranked order, as it will be stored; a bias stays as it is.

    Raises:
        NumericsError: when the equations cannot be solved.
    """
    batches, source = embedded(prunable, ids), prunable.original
    wide = batches if source is prunable else embedded(source, ids)
    dense, pruned, untouched = _begun(wide), _begun(batches), source is prunable
    outputs: Outputs = {}
    for number, (size, full) in enumerate(zip(structure, prunable.dense, strict=True)):
        untouched, spec = untouched and size == full, prunable.block_spec(number)
        fits = bool(size and spec.after and spec.output and not untouched)
        with outputs_of(source.dense_output(number)) if fits else nullcontext([]) as given:
            after = [source.block(h, b, number, full) for h, b in zip(dense, wide, strict=True)]
        if untouched:  # nothing has been lost yet, so there is nothing to make good
            pruned = list(after)
        elif size and not spec.output:  # there is nothing to refit: the blocks after it make good for it
            pruned = [prunable.block(now, batch, number, size) for now, batch in zip(pruned, batches, strict=True)]
        elif size:
            fit = Fit()
            output = Projection.of(prunable.output_of(number, size), spec.transposed)
            bias = torch.zeros((), device=output.weight.device) if output.bias is None else output.bias.float()
            for row, (before, now, target, batch) in enumerate(zip(dense, pruned, after, batches, strict=True)):
                x = prunable.output_input(now, batch, number, size)
                if spec.after:  # what adds up does not go back through a norm: the block gives what it gave
                    wanted = prunable.narrowed(given[row]).float() - bias
                else:
                    begun, end = (prunable.narrowed(stream_of(state)).float() for state in (before, target))
                    wanted = (end - begun) + share * (begun - stream_of(now).float())
                    # the bias is added whatever the columns are
                    wanted = ungained(wanted, gain_of(spec, prunable.layer_of(number))) - bias
                fit.add(x, wanted, ridge is None and row % HELD_OUT == HELD_OUT - 1)
            fitted = prunable.keep(prunable.as_stored(fit.solve(output.weight.float(), ridge)))
            outputs[number] = Projection(fitted, output.bias)
            told = zip(pruned, fit.inputs, strict=True)
            pruned = [prunable.after(now, F.linear(x, *outputs[number]), number) for now, x in told]
        else:  # gone: the stream passes, on to a block that may read it as it was before
            pruned = [prunable.after(now, None, number) for now in pruned]
        dense = after
        if progress is not None:
            progress(number + 1, len(structure))
    if ends is not None:
        for states in zip(dense, pruned, strict=True):
            ends(*map(stream_of, states))
    return outputs


def _begun(batches: Sequence[Inputs]) -> list[State]:
    """Return the residual streams before the first block."""
    return [batch.hidden for batch in batches]


@contextmanager
def outputs_of(linear: nn.Module) -> Iterator[list[Tensor]]:
    """Gather what a linear layer gives while it is entered."""
    given: list[Tensor] = []
    hook = linear.register_forward_hook(lambda module, args, output: given.append(cast(Tensor, output)))
    try:
        yield given
    finally:
        hook.remove()


@dataclass
class _Equations:
    """The normal equations of one projection on some text, float32: moments [n, n], target [n, hidden_size]."""

    moments: Tensor
    target: Tensor

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> _Equations:
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, outputs, device=device))

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add inputs [tokens, n] and what they should give, [tokens, hidden_size]."""
        add_moments(self.moments, x)
        self.target.addmm_(x.T, target)

    def missing(self, weight: Tensor) -> Tensor:
        """Return what a projection [hidden_size, n] leaves to explain, [n, hidden_size]; the moments are whole."""
        return self.target - self.moments @ weight.T

    def change(self, missing: Tensor, ridge: float) -> Tensor:
        """Tell by how much to change a projection that leaves so much to explain, [n, hidden_size]: solved for the
        change, so that nothing to repair changes nothing.
        """
        damped = self.moments.clone()
        damped.diagonal().add_(ridge_of(self.moments, ridge))
        factor, status = torch.linalg.cholesky_ex(damped)
        if int(status) or not bool(torch.isfinite(missing).all()):
            raise NumericsError("the repair cannot be solved: raise --accumulate-ridge, or check the weights for NaN")
        return torch.cholesky_solve(missing, factor)


class Fit:
    """One projection's inputs and equations, some of the text held out where asked."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self._parts: dict[bool, _Equations] = {}

    def add(self, x: Tensor, target: Tensor, held_out: bool) -> None:
        """Add inputs [sequences, length, n] and what they should give, [sequences, length, hidden_size]."""
        self.inputs.append(x)
        rows, wanted = x.flatten(0, 1).float(), target.flatten(0, 1)
        if held_out not in self._parts:
            self._parts[held_out] = _Equations.empty(rows.shape[1], wanted.shape[1], rows.device)
        with products_of(x.dtype):  # what they should give is rounded: noise that the text averages out
            self._parts[held_out].add(rows, wanted)

    def solve(self, weight: Tensor, ridge: float | None) -> Tensor:
        """Return the projection [hidden_size, n] that fits best and stays near ``weight``."""
        for part in self._parts.values():
            part.moments = mirrored(part.moments)
        fitted, judge = self._parts[False], self._parts.get(True)
        if judge is None:
            return weight + fitted.change(fitted.missing(weight), RIDGE if ridge is None else ridge).T
        chosen = _best_ridges(fitted, judge, weight, RIDGES)
        whole = _Equations(fitted.moments + judge.moments, fitted.target + judge.target)
        missing, result = whole.missing(weight), weight.clone()
        for number, candidate in enumerate(RIDGES):
            if bool((rows := chosen == number).any()):
                result[rows] += whole.change(missing, candidate).T[rows]
        return result


def _best_ridges(fitted: _Equations, judge: _Equations, weight: Tensor, ridges: Sequence[float]) -> Tensor:
    """Tell which ridge has the smallest error on held-out text, for every row of a projection, [hidden_size].

    Rows are judged one by one, since a few of the hidden dimensions are so much larger than the others that they would
    decide for all. A row where every ridge does worse than no change gets ``len(ridges)``.
    """
    left, missing, errors = fitted.missing(weight), judge.missing(weight), []
    for ridge in ridges:
        change = fitted.change(left, ridge)
        # |t - (W + D) x|^2 - |t - W x|^2, summed over the text
        errors.append((change * (judge.moments @ change - 2 * missing)).sum(dim=0))
    return torch.stack([*errors, torch.zeros_like(errors[0])]).argmin(dim=0)
