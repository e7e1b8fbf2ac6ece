"""Repaired output projections of candidates, and what a model has a place for."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from multipruner.core.axes import PAIRS
from multipruner.core.errors import ConfigError
from multipruner.core.plan import Ranking
from multipruner.core.structure import Size
from multipruner.engine.cutting import Projection, kept_columns
from multipruner.engine.layer_calls import gain_of, gained
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Prunable

from .columns import RIDGE, How, repaired
from .errors import nested_errors


def has_output_bias(prunable: Prunable) -> dict[str, bool]:
    """Tell which kinds of blocks have an output projection with a bias."""
    first = {place.kind: number for number, place in reversed(list(enumerate(prunable.anatomy)))}
    kinds = [kind for kind in prunable.anatomy.kinds if prunable.spec.block(kind).output]
    return {kind: Projection.of(prunable.dense_output(first[kind])).bias is not None for kind in kinds}


def check_repair(how: str, prunable: Prunable) -> None:
    """Refuse a repair that a model has no place for.

    Raises:
        ConfigError: for ``"bias"`` where no output projection has one.
    """
    if how == "bias" and not any(has_output_bias(prunable).values()):
        spec = prunable.spec
        raise ConfigError(
            f"repair bias: the output projections of this {spec.model_type} model "
            f"({', '.join(block.output for block in spec.blocks if block.output)}) have no bias that could take the "
            "mean of what leaves; use --repair lstsq"
        )


def unrepaired(how: str, prunable: Prunable) -> str | None:
    """Return what to tell where ``"bias"`` finds a bias in one kind of block only."""
    there = has_output_bias(prunable)
    if how != "bias" or all(there.values()):
        return None
    names = [prunable.spec.block(kind).output for kind, has in there.items() if not has]
    return f"repair bias: {', '.join(names)} has no bias and is cut without repair (lstsq repairs it)"


class Repair:
    """Repaired output projections of narrowed blocks, for scoring candidates *with* their repair.

    Args:
        prunable: the dense model.
        statistics: its moments.
        ranking: the order in which widths are cut.
        ridge: see :func:`repaired_columns`.
        how: see :func:`repaired`.
        pairs: block -> RoPE pairs that its KV groups keep -> the squared error of what it then adds, in which no
            moments of its output have a say.
    """

    def __init__(
        self, prunable: Prunable, statistics: Statistics, ranking: Ranking, ridge: float = RIDGE, how: How = "lstsq",
        pairs: Mapping[int, Mapping[int, float]] | None = None,
    ) -> None:  # fmt: skip
        self._prunable, self._statistics, self.ridge = prunable, statistics, ridge
        self.how: How = how
        self._pairs = pairs or {}
        self._orders = [ranking.all_of(number, place.kind) for number, place in enumerate(prunable.anatomy)]
        self._weights: MutableMapping[tuple[int, Size], Tensor] = statistics.place()
        self._biases: dict[tuple[int, Size], Tensor | None] = {}

    @torch.no_grad()
    def __call__(self, block: int, size: Size, whole: Projection) -> Projection:
        """Return the output projection of a block of some size.

        Args:
            block, size: which block, and what it keeps.
            whole: the projection with all its columns, in ranked order.

        Returns:
            The projection with the kept columns, in the dtype of ``whole``.
        """
        key = (block, size)
        if key not in self._biases:
            prunable, dense = self._prunable, self._prunable.counts(block)
            columns = prunable.block_spec(block).columns
            gram, mean = self._moments(block)
            kept = kept_columns(columns, prunable.counts(block, size), dense).to(gram.device)
            weight, bias = repaired(self.how, whole, gram, mean, kept, self.ridge)
            self._weights[key] = prunable.as_stored(weight)
            self._biases[key] = None if bias is None else prunable.as_stored(bias)
        return Projection(self._weights[key], self._biases[key])

    def _moments(self, block: int) -> tuple[Tensor, Tensor | None]:
        """Return second moments and means of the input of a block's output projection, in ranked order."""
        dense, columns = self._prunable.counts(block), self._prunable.block_spec(block).columns
        order = kept_columns(columns, self._orders[block], dense)
        gram, mean = self._statistics.grams[block], self._statistics.means.get(block)
        gram = gram[order.to(gram.device)][:, order.to(gram.device)]
        return gram, None if mean is None else mean[order.to(mean.device)]

    @torch.no_grad()
    def errors(self, block: int, sizes: Sequence[Size]) -> list[float]:
        """Return the squared errors of what a block adds at some sizes (inside :meth:`.Prunable.in_order`): what the
        moments say, nothing is run.

        Args:
            block: which block.
            sizes: what it keeps, the smallest first, along one axis.

        Raises:
            NumericsError: see :func:`.nested_errors`.
        """
        prunable, spec = self._prunable, self._prunable.block_spec(block)
        gram, mean = self._moments(block)
        whole = Projection.of(prunable.dense_output(block), spec.transposed)
        counts = [prunable.counts(block, size) for size in sizes if size]
        kept = [kept_columns(spec.columns, one, prunable.counts(block)) for one in counts]
        none = [kept[0][:0] if kept else torch.arange(0)] * (len(sizes) - len(kept))
        taken = mean if whole.bias is not None else None
        weight = gained(whole.weight.detach().float(), gain_of(spec, prunable.layer_of(block)))
        left = nested_errors(weight, gram, taken, [*none, *kept], self.how, self.ridge)
        without = self._pairs.get(block, {})
        more = [*([0.0] * len(none)), *(without.get(one.get(PAIRS, 0), 0.0) for one in counts)]
        return [error + other for error, other in zip(left, more, strict=True)]
