"""One dense residual block, as importances see it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from multipruner.core.axes import Axis
from multipruner.core.blocks import STATES
from multipruner.core.plan import BlockUnits, Units
from multipruner.core.structure import Place, total
from multipruner.engine.cutting import Projection
from multipruner.engine.layer_calls import gain_of, gained
from multipruner.engine.moments import Routes, Statistics
from multipruner.engine.prunable import Prunable
from multipruner.engine.values.bases import turned_columns


@dataclass(frozen=True)
class BlockView:
    """One dense residual block, as importances see it."""

    prunable: Prunable
    number: int
    statistics: Statistics | None
    within: Collection[str] = ()
    """The axes within others whose units are to be ordered as well, such as the query heads of every KV group."""

    @property
    def place(self) -> Place:
        return self.prunable.anatomy[self.number]

    def input_norms(self, axis: str) -> Tensor:
        """Return L1 norms of the rows that feed every unit of an axis, float32 [units, rows of all matrices]."""
        module, found = self.prunable.module(self.number), []
        for tensor in self.prunable.block_spec(self.number).feeding:
            weight = module.get_parameter(tensor.path).detach()
            if len(tensor.dims) == 3:  # a stack: one matrix for every unit
                read = next(side for side, layout in enumerate(tensor.dims) if STATES & set(layout.names))
                found.append(weight.float().abs().sum(dim=read))
                continue
            side = next(side for side, layout in enumerate(tensor.dims) if layout.axes)
            units = tensor.dims[side].units(axis, self.prunable.counts(self.number))
            if units and units[0]:
                norms = weight.float().abs().sum(dim=1 - side)
                found.append(norms[torch.tensor(units, device=norms.device)])
        return torch.cat(found, dim=1)

    @property
    def output(self) -> Tensor:
        """The output projection, float32 [hidden_size, columns], with the gain of what it gives."""
        spec, layer = self.prunable.block_spec(self.number), self.prunable.layer_of(self.number)
        weight = Projection.of(self.prunable.dense_output(self.number), spec.transposed).weight.detach().float()
        weight = gained(weight, gain_of(spec, layer))
        basis = self.prunable.bases.get(self.number)
        return weight if basis is None else turned_columns(weight, basis)

    @property
    def gram(self) -> Tensor:
        """Second moments of the output projection's input, [columns, columns]."""
        assert self.statistics is not None
        return self.statistics.grams[self.number]

    @property
    def routes(self) -> Routes | None:
        """What the experts of the block did on the calibration text; ``None`` where it has no experts."""
        if not self.prunable.block_spec(self.number).routed:
            return None
        assert self.statistics is not None
        return self.statistics.routes[self.number]

    def side_by_side(self, axis: str) -> Tensor | slice:
        """Return the columns of the output projection in an order in which those of every unit of an axis are
        neighbours, unit by unit: as indices, and as a slice where they lie so.
        """
        units = self.prunable.block_spec(self.number).columns.units(axis, self.prunable.counts(self.number))
        flat = torch.tensor(units).flatten()
        return slice(None) if torch.equal(flat, torch.arange(len(flat))) else flat.to(self.gram.device)

    def by_unit(self, axis: str, columns: Tensor) -> Tensor:
        """Sum of the scores of the columns that leave with every unit of an axis, [units]."""
        units = self.prunable.block_spec(self.number).columns.units(axis, self.prunable.counts(self.number))
        return columns[torch.tensor(units, device=columns.device)].sum(dim=1)

    def units(self, axis: str) -> int:
        """Tell how many units of an axis there are in all."""
        return total(self.place.kind, self.place.dense, axis)

    def ordered(self, order: Callable[[str], tuple[int, ...]]) -> BlockUnits:
        """Return the units of every axis in an order; those within others as they are, unless they are to be ordered.

        Args:
            order: the name of an axis -> all its units, counted through where they are within others.
        """
        found: list[Units] = []
        for axis, whole in zip(self.place.axes, BlockUnits.whole(self.place).axes, strict=True):
            if axis.within and not self._orders(axis):
                found.append(whole)
            elif axis.within:
                found.append(self._nested(axis, order(axis.name)))
            else:
                found.append(order(axis.name) if axis.setting and self.units(axis.name) > 1 else whole)
        return BlockUnits(tuple(found))

    def _orders(self, axis: Axis) -> bool:
        """Tell whether that is wanted, and the block has such units in its output, or among its experts."""
        spec = self.prunable.block_spec(self.number)
        return axis.name in self.within and (bool(spec.routed) or axis.name in spec.columns.axes)

    def _nested(self, axis: Axis, order: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Return for every unit of the axis that an axis is within, its units in the order in which all of them
        stand.
        """
        outer = self.units(axis.within)
        each = self.units(axis.name) // outer
        return tuple(tuple(unit % each for unit in order if unit // each == number) for number in range(outer))
