"""Closed-form repair: what stays of an output projection takes over what it can of what left (no gradients).

When the columns S of an output projection W stay, the columns that reproduce its output best on calibration text are

    W' = ((W G)[:, S] + r W[:, S]) (G[S, S] + r I)^-1,     G = mean of x x^T,

the minimiser of ``E |W x - W' x_S|^2 + r |W' - W_S|^2``: all columns kept give W itself, and a large ridge r gives
plain slicing. Where the projection has a bias b, columns and bias are fitted together: G is then the covariance of x,
and ``b' = b + W m - W' m_S`` with m the mean of x. The repair ``bias`` leaves the columns alone: ``W' = W_S`` in that
formula gives what left its mean (FLAP, arXiv 2312.11983). Nothing is added to the model.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Literal

import torch
from torch import Tensor, nn

from multipruner.core.errors import ConfigError, NumericsError
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import BlockKind, LayerSize
from multipruner.engine.coefficients import KINDS
from multipruner.engine.cutting import Projection, kept_rows, leading_columns, output_part, surviving_layers
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Prunable, as_kept

How = Literal["lstsq", "bias"]
RIDGE = 1e-2
"""Of the mean diagonal of G."""
_CANCELLATION = 1e-5
"""What float32 leaves uncertain of a covariance, relative to the mean second moment it is the small difference of."""


def repaired_columns(weight: Tensor, gram: Tensor, kept: Tensor, ridge: float, *, least: float = 0.0) -> Tensor:
    """The columns that stay, refitted to the output of all of them.

    Args:
        weight: output projection, [hidden_size, n].
        gram: second moments of its input, [n, n].
        kept: indices of the columns that stay, [k].
        ridge: relative to the mean of the diagonal of ``gram``.
        least: the smallest ridge, not relative to anything.

    Returns:
        float32 [hidden_size, k].

    Raises:
        NumericsError: when the statistics are not finite, or singular in spite of the ridge.
    """
    full, dense = gram.float(), weight.detach().float()
    r = max(ridge * float(full.diagonal().mean()), least)
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


def repaired(
    how: How, whole: Projection, gram: Tensor, mean: Tensor | None, kept: Tensor, ridge: float = RIDGE
) -> Projection:
    """An output projection without some of its columns, repaired.

    Args:
        how: ``"lstsq"`` refits the columns, and the bias where there is one; ``"bias"`` the bias alone.
        whole: the projection with all its columns.
        gram: second moments of its input, [n, n].
        mean: means of its input, [n]; without them a bias stays as it is.
        kept: indices of the columns that stay, [k].
        ridge: of ``"lstsq"``, see :func:`repaired_columns`.

    Returns:
        What was repaired in float32; the columns of the repair ``"bias"`` as they were.

    Raises:
        NumericsError: see :func:`repaired_columns`.
    """
    if whole.bias is None or mean is None:
        return Projection(
            whole.weight[:, kept] if how == "bias" else repaired_columns(whole.weight, gram, kept, ridge), whole.bias
        )
    centre = mean.float()
    if how == "bias":
        weight = whole.weight[:, kept]
    else:
        moments = gram.float()
        # where means are far larger than deviations, the difference is no more exact than this
        noise = _CANCELLATION * float(moments.diagonal().mean())
        weight = repaired_columns(whole.weight, moments - torch.outer(centre, centre), kept, ridge, least=noise)
    dense, lost = whole.weight.detach().float(), torch.ones(len(centre), dtype=torch.bool, device=centre.device)
    lost[kept] = False
    # b + W m - W' m_S, without the difference of what stayed the same
    missing = dense[:, lost] @ centre[lost] - (weight.float() - dense[:, kept]) @ centre[kept]
    return Projection(weight, whole.bias.detach().float() + missing)


def has_output_bias(prunable: Prunable) -> dict[BlockKind, bool]:
    """Which blocks' output projections have a bias."""
    layer, found = prunable.layers[0], dict[BlockKind, bool]()
    for kind in KINDS:
        block = prunable.spec.block(kind)
        found[kind] = Projection.of(layer.get_submodule(f"{block.path}.{block.output}")).bias is not None
    return found


def check_compensation(compensation: str, prunable: Prunable) -> None:
    """Refuse a repair that a model has no place for.

    Raises:
        ConfigError: for ``"bias"`` where no output projection has one.
    """
    if compensation == "bias" and not any(has_output_bias(prunable).values()):
        spec = prunable.spec
        raise ConfigError(
            f"compensation bias: the output projections of this {spec.model_type} model ({spec.attention.output}, "
            f"{spec.mlp.output}) have no bias that could take the mean of what leaves; use --compensation lstsq"
        )


def unrepaired(compensation: str, prunable: Prunable) -> str | None:
    """What to tell where ``"bias"`` finds a bias in one kind of block only."""
    there = has_output_bias(prunable)
    if compensation != "bias" or all(there.values()):
        return None
    names = [prunable.spec.block(kind).output for kind, has in there.items() if not has]
    return f"compensation bias: {', '.join(names)} has no bias and is cut without repair (lstsq repairs it)"


class Repair:
    """Repaired output projections of narrowed blocks, for scoring candidates *with* their repair.

    Args:
        prunable: the dense model.
        statistics: its moments.
        ranking: the order in which widths are cut.
        ridge: see :func:`repaired_columns`.
        how: see :func:`repaired`.
    """

    def __init__(
        self, prunable: Prunable, statistics: Statistics, ranking: Ranking, ridge: float = RIDGE, how: How = "lstsq"
    ) -> None:
        self._prunable, self._statistics, self.ridge = prunable, statistics, ridge
        self.how: How = how
        self._orders = [
            kept_rows(as_kept(rank, full), prunable.head_dim)
            for rank, full in zip(ranking.layers, prunable.dense, strict=True)
        ]
        self._weights: MutableMapping[tuple[int, BlockKind, LayerSize], Tensor] = statistics.place()
        self._biases: dict[tuple[int, BlockKind, LayerSize], Tensor | None] = {}

    @torch.no_grad()
    def __call__(self, layer: int, kind: BlockKind, size: LayerSize, whole: Projection) -> Projection:
        """The output projection of a block of some size.

        Args:
            layer, kind, size: which block, and what it keeps.
            whole: the projection with all its columns, in ranked order.

        Returns:
            The projection with the kept columns, in the dtype of ``whole``.
        """
        key = (layer, kind, size.without("mlp" if kind == "attention" else "attention"))
        if key not in self._biases:
            prunable, block = self._prunable, self._prunable.spec.block(kind)
            order = self._orders[layer][output_part(block)]
            assert isinstance(order, Tensor)
            gram, mean = self._statistics.grams[layer, kind], self._statistics.means.get((layer, kind))
            gram = gram[order.to(gram.device)][:, order.to(gram.device)]
            mean = None if mean is None else mean[order.to(mean.device)]
            kept = leading_columns(block, size, prunable.dense[layer], prunable.head_dim).to(gram.device)
            made = repaired(self.how, whole, gram, mean, kept, self.ridge).to(whole.weight.dtype)
            self._weights[key], self._biases[key] = made
        return Projection(self._weights[key], self._biases[key])


@torch.no_grad()
def compensate(
    pruned: nn.Module,
    prunable: Prunable,
    plan: PruningPlan,
    statistics: Statistics,
    ridge: float,
    how: How = "lstsq",
) -> int:
    """Refit the output projections of a pruned model's narrowed blocks, in place.

    Args:
        pruned: what :func:`multipruner.apply_plan` made of the dense model by ``plan``.
        prunable: the dense model.
        statistics: its moments.
        ridge: see :func:`repaired_columns`.
        how: see :func:`repaired`.

    Returns:
        How many projections were repaired.
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
            whole = Projection.of(prunable.layers[old].get_submodule(f"{block.path}.{block.output}"))
            if how == "bias" and whole.bias is None:
                continue
            target = pruned.get_submodule(f"{spec.decoder}.{spec.layers}.{new}.{block.path}.{block.output}")
            mean = statistics.means.get((old, kind))
            repaired(how, whole, gram, mean, columns.to(gram.device), ridge).write(target)
            done += 1
    return done
