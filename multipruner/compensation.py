"""Closed-form repair: what stays of an output projection takes over what it can of what left (no gradients).

When the columns S of an output projection W stay, the columns that reproduce its output best on calibration text are

    W' = ((W G)[:, S] + r W[:, S]) (G[S, S] + r I)^-1,     G = mean of x x^T,

the minimiser of ``E |W x - W' x_S|^2 + r |W' - W_S|^2``: all columns kept give W itself, and a large ridge r gives
plain slicing. Nothing is added to the model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import NumericsError
from .model_costs import KINDS, weight_of
from .plan import PruningPlan, Ranking
from .prunable import Prunable, as_kept
from .statistics import Statistics
from .structure import BlockKind, LayerSize
from .surgery import kept_rows, leading_columns, output_part, surviving_layers

RIDGE = 1e-2
"""Of the mean diagonal of G."""


def repaired_columns(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The columns that stay, refitted to the output of all of them.

    Args:
        weight: output projection, [hidden_size, n].
        gram: second moments of its input, [n, n].
        kept: indices of the columns that stay, [k].
        ridge: relative to the mean of the diagonal of ``gram``.

    Returns:
        float32 [hidden_size, k].

    Raises:
        NumericsError: when the statistics are not finite, or singular in spite of the ridge.
    """
    full, dense = gram.float(), weight.detach().float()
    r = ridge * float(full.diagonal().mean())
    among = full[kept][:, kept]
    among.diagonal().add_(r)
    # W_S + (what the lost columns say about the kept ones): exact for all columns kept, whatever the rounding
    lost = torch.ones(full.shape[0], dtype=torch.bool, device=full.device)
    lost[kept] = False
    if not bool(lost.any()):
        return dense[:, kept]
    target = dense[:, lost] @ full[lost][:, kept]
    factor, status = torch.linalg.cholesky_ex(among)
    if int(status) or not bool(torch.isfinite(target).all()):
        raise NumericsError(
            "the calibration statistics cannot be inverted: raise --ridge, give more calibration text, or check the "
            "weights for NaN"
        )
    return dense[:, kept] + torch.cholesky_solve(target.T, factor).T


class Repair:
    """Repaired output projections of narrowed blocks, for scoring candidates *with* their repair.

    Args:
        prunable: the dense model.
        statistics: its second moments.
        ranking: the order in which widths are cut.
        ridge: see :func:`repaired_columns`.
    """

    def __init__(self, prunable: Prunable, statistics: Statistics, ranking: Ranking, ridge: float = RIDGE) -> None:
        self._prunable, self._statistics, self.ridge = prunable, statistics, ridge
        self._orders = [
            kept_rows(as_kept(rank, full), prunable.head_dim)
            for rank, full in zip(ranking.layers, prunable.dense, strict=True)
        ]
        self._made: dict[tuple[int, BlockKind, LayerSize], Tensor] = {}

    @torch.no_grad()
    def __call__(self, layer: int, kind: BlockKind, size: LayerSize, weight: Tensor) -> Tensor:
        """The output projection of a block of some size.

        Args:
            layer, kind, size: which block, and what it keeps.
            weight: the whole projection with its columns in ranked order, [hidden_size, n].

        Returns:
            [hidden_size, kept columns], in the dtype of ``weight``.
        """
        key = (layer, kind, size.without("mlp" if kind == "attention" else "attention"))
        if key not in self._made:
            prunable, block = self._prunable, self._prunable.spec.block(kind)
            order = self._orders[layer][output_part(block)]
            assert isinstance(order, Tensor)
            gram = self._statistics.grams[layer, kind]
            gram = gram[order.to(gram.device)][:, order.to(gram.device)]
            kept = leading_columns(block, size, prunable.dense[layer], prunable.head_dim).to(gram.device)
            self._made[key] = repaired_columns(weight, gram, kept, self.ridge).to(weight.dtype)
        return self._made[key]


@torch.no_grad()
def compensate(pruned: nn.Module, prunable: Prunable, plan: PruningPlan, statistics: Statistics, ridge: float) -> int:
    """Refit the output projections of a pruned model's narrowed blocks, in place.

    Args:
        pruned: what :func:`multipruner.apply_plan` made of the dense model by ``plan``.
        prunable: the dense model.
        statistics: its second moments.
        ridge: see :func:`repaired_columns`.

    Returns:
        How many projections were refitted.
    """
    spec, done = prunable.spec, 0
    for new, old in enumerate(surviving_layers(plan)):
        kept, full = plan.layers[old], plan.dense[old]
        rows = kept_rows(kept, prunable.head_dim)
        for kind in KINDS:
            if not kept.size.has(kind) or kept.size.same_block(full, kind):
                continue
            block = spec.block(kind)
            columns, gram = rows[output_part(block)], statistics.grams[old, kind]
            assert isinstance(columns, Tensor)
            weight = weight_of(prunable.layers[old].get_submodule(f"{block.path}.{block.output}"))
            target = weight_of(pruned.get_submodule(f"{spec.decoder}.{spec.layers}.{new}.{block.path}.{block.output}"))
            target.copy_(repaired_columns(weight, gram, columns.to(gram.device), ridge))
            done += 1
    return done
