"""One dense decoder layer, as importances see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from multipruner.core.families import BlockSpec, rows_per_part
from multipruner.core.structure import BlockKind, LayerSize, queries_per_group
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
    def full(self) -> LayerSize:
        return self.prunable.dense[self.number]

    def parts(self, kind: BlockKind) -> dict[str, Tensor]:
        """Weight rows of every part of a block: part -> [rows, hidden_size], views."""
        block = self.prunable.spec.block(kind)
        module = self.prunable.layers[self.number].get_submodule(block.path)
        weights: dict[str, Tensor] = {}
        for projection in block.inputs:
            lengths = [rows_per_part(part, self.full, self.prunable.head_dim) for part in projection.parts]
            stacked = module.get_submodule(projection.path).weight
            assert isinstance(stacked, Tensor)
            weights.update(zip(projection.parts, stacked.detach().split(lengths), strict=True))
        return weights

    def output(self, kind: BlockKind) -> Tensor:
        """The output projection of a block, float32 [hidden_size, columns]."""
        block: BlockSpec = self.prunable.spec.block(kind)
        weight = self.prunable.layers[self.number].get_submodule(f"{block.path}.{block.output}").weight
        assert isinstance(weight, Tensor)
        return weight.detach().float()

    def gram(self, kind: BlockKind) -> Tensor:
        """Second moments of the output projection's input, [columns, columns]."""
        assert self.statistics is not None
        return self.statistics.grams[self.number, kind]

    def by_group(self, columns: Tensor) -> Tensor:
        """Sum of the scores of a KV group's columns (its query heads side by side), [kv_heads]."""
        return columns.reshape(self.full.kv_heads, -1).sum(dim=1)

    def nested(self, order: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """For every KV group its query heads, in the order in which all of the layer's stand; empty if not wanted."""
        if not self.within_groups:
            return ()
        per_group = queries_per_group(self.full)
        return tuple(tuple(head for head in order if head // per_group == group) for group in range(self.full.kv_heads))
