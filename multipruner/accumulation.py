"""Repair of what has added up: every output projection refitted, first layer to last, on the pruned model's own stream.

Narrowing a block changes the inputs of all blocks after it. Going through the pruned model block by block, with x the
input of an output projection there and h' the residual stream before the block, its columns become

    argmin_W'  E |t - W' x|^2 + r |W' - W_S|^2,      t = (h_after - h_before) + m (h_before - h'),

h the dense model's stream: the block gives what it gave in the dense model and makes good for a share m of what the
blocks before it, removed ones included, have got wrong. Closed form, nothing is added to the model. It needs much
text: on too little of it, it learns the text.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import NumericsError
from .model_costs import KINDS, weight_of
from .plan import PruningPlan, Ranking
from .prunable import Outputs, Prunable, as_kept
from .statistics import add_moments, embedded, mirrored
from .structure import Structure
from .surgery import kept_rows, leading_columns, output_part, surviving_layers

RIDGE = 1e-1
"""Of the mean squared input: what adds up is noisier than one block's loss, so it is held closer to what there was."""


@torch.inference_mode()
def accumulated(
    prunable: Prunable,
    structure: Structure,
    ids: Tensor,
    *,
    share: float = 1.0,
    ridge: float = RIDGE,
    progress: Callable[[int, int], None] | None = None,
) -> Outputs:
    """Output projections of all blocks that stay.

    Args:
        prunable: the dense model, inside :meth:`Prunable.in_order` (with the repair of single blocks, if any).
        structure: what stays.
        ids: token ids, [sequences, length]; hidden states of all of them are kept twice, and one block's inputs.
        share: of the error of the blocks before that each block takes on, 0 to 1.
        ridge: relative to the mean squared input.
        progress: called with (blocks done, blocks in all).

    Returns:
        (layer, kind) -> [hidden_size, kept columns], columns in ranked order, in the model's dtype.

    Raises:
        NumericsError: when the equations cannot be solved.
    """
    batches = embedded(prunable, ids)
    dense = [batch.hidden for batch in batches]
    pruned = list(dense)
    outputs: Outputs = {}
    for layer, size in enumerate(structure):
        for place, kind in enumerate(KINDS):
            after = [
                prunable.block(h, b, layer, kind, prunable.dense[layer]) for h, b in zip(dense, batches, strict=True)
            ]
            if size.has(kind):
                fit = _Fit()
                for before, now, target, batch in zip(dense, pruned, after, batches, strict=True):
                    x = prunable.output_input(now, batch, layer, kind, size)
                    fit.add(x, (target.float() - before.float()) + share * (before.float() - now.float()))
                output = prunable.output_of(layer, kind, size)
                weight = fit.solve(weight_of(output).float(), ridge).to(dense[0].dtype)
                outputs[layer, kind] = weight
                bias = output.bias if isinstance(output.bias, Tensor) else None
                pruned = [now + F.linear(x, weight, bias) for now, x in zip(pruned, fit.inputs, strict=True)]
            dense = after
            if progress is not None:
                progress(2 * layer + place + 1, 2 * len(structure))
    return outputs


class _Fit:
    """The normal equations of one projection, float32."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self._moments: Tensor | None = None
        self._target: Tensor | None = None

    def add(self, x: Tensor, target: Tensor) -> None:
        """Inputs [sequences, length, n] and what they should give [sequences, length, hidden_size]."""
        self.inputs.append(x)
        rows, wanted = x.flatten(0, 1).float(), target.flatten(0, 1)
        if self._moments is None or self._target is None:
            self._moments = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            self._target = torch.zeros(rows.shape[1], wanted.shape[1], device=rows.device)
        add_moments(self._moments, rows)
        self._target.addmm_(rows.T, wanted)

    def solve(self, weight: Tensor, ridge: float) -> Tensor:
        """The projection [hidden_size, n] that fits best and stays near ``weight``."""
        assert self._moments is not None and self._target is not None
        moments = mirrored(self._moments)
        r = ridge * float(moments.diagonal().mean())
        # solved for the change, so that nothing to repair changes nothing
        missing = self._target - moments @ weight.T
        moments.diagonal().add_(r)
        factor, status = torch.linalg.cholesky_ex(moments)
        if int(status) or not bool(torch.isfinite(missing).all()):
            raise NumericsError("the repair cannot be solved: raise --ridge, or check the weights for NaN")
        return weight + torch.cholesky_solve(missing, factor).T


@torch.no_grad()
def write_outputs(
    pruned: torch.nn.Module, prunable: Prunable, plan: PruningPlan, ranking: Ranking, outputs: Outputs
) -> None:
    """Put refitted output projections, columns in ranked order, into a pruned model."""
    spec = prunable.spec
    for new, old in enumerate(surviving_layers(plan)):
        rank, full = ranking.layers[old], plan.dense[old]
        ranked = kept_rows(as_kept(rank, full), prunable.head_dim)
        for kind in KINDS:
            if (old, kind) not in outputs:
                continue
            block, weight = spec.block(kind), outputs[old, kind]
            columns = ranked[output_part(block)]
            assert isinstance(columns, Tensor)
            leading = leading_columns(block, plan.layers[old].size, full, prunable.head_dim)
            place = torch.argsort(columns[leading]).to(weight.device)
            path = f"{spec.decoder}.{spec.layers}.{new}.{block.path}.{block.output}"
            weight_of(pruned.get_submodule(path)).copy_(weight[:, place])
