"""One dense decoder layer, as importances see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from multipruner.core.structure import BlockKind, LayerSize, queries_per_group
from multipruner.engine.cutting import Projection
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Prunable


@dataclass(frozen=True)
class LayerView:
    """One dense decoder layer, as importances see it."""

    prunable: Prunable
    number: int
    statistics: Statistics | None
    within_groups: bool = False
    """Whether query heads are to be ordered inside the KV groups as well."""

    @property
    def orders_heads(self) -> bool:
        """Whether that is wanted, and the family has such query heads."""
        return self.within_groups and "queries" in self.prunable.spec.attention.columns.axes

    @property
    def full(self) -> LayerSize:
        return self.prunable.dense[self.number]

    def input_norms(self, kind: BlockKind, axis: str) -> list[Tensor]:
        """Return L1 norms of the rows that feed every unit of an axis, float32 [units, rows of each], matrix by
        matrix.
        """
        block, found = self.prunable.spec.block(kind), []
        module = self.prunable.layers[self.number].get_submodule(block.path)
        for tensor in block.inputs:
            weight = module.get_parameter(tensor.path).detach()
            side = next(side for side, layout in enumerate(tensor.dims) if layout.axes)
            units = tensor.dims[side].units(axis, self.prunable.counts(self.number))
            if units and units[0]:
                norms = weight.float().abs().sum(dim=1 - side)
                found.append(norms[torch.tensor(units, device=norms.device)])
        return found

    def output(self, kind: BlockKind) -> Tensor:
        """Return the output projection of a block, float32 [hidden_size, columns]."""
        block = self.prunable.spec.block(kind)
        module = self.prunable.layers[self.number].get_submodule(f"{block.path}.{block.output}")
        return Projection.of(module, block.transposed).weight.detach().float()

    def gram(self, kind: BlockKind) -> Tensor:
        """Return second moments of the output projection's input, [columns, columns]."""
        assert self.statistics is not None
        return self.statistics.grams[self.number, kind]

    def by_unit(self, kind: BlockKind, axis: str, columns: Tensor) -> Tensor:
        """Sum of the scores of the columns that leave with every unit of an axis, [units]."""
        units = self.prunable.spec.block(kind).columns.units(axis, self.prunable.counts(self.number))
        return columns[torch.tensor(units, device=columns.device)].sum(dim=1)

    def nested(self, order: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Return for every KV group its query heads, in the order in which all of the layer's stand; empty if not
        wanted.
        """
        if not self.orders_heads:
            return ()
        per_group = queries_per_group(self.full)
        return tuple(tuple(head for head in order if head // per_group == group) for group in range(self.full.kv_heads))
