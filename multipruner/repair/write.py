"""Repaired output projections, written into a pruned model."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from multipruner.core.axes import VALUES
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.engine.cutting import Projection, kept_columns, scaled_norm
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Outputs, Prunable
from multipruner.engine.values.bases import turned_columns, turned_rows

from .columns import How, repaired


@torch.no_grad()
def repair_outputs(
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
    done = 0
    for block, (place, kept) in enumerate(zip(plan.anatomy, plan.blocks, strict=True)):
        spec = prunable.block_spec(block)
        if not kept.axes or not spec.output or kept.size == place.dense:
            continue
        columns = kept_columns(spec.columns, plan.kept(block), prunable.counts(block))
        gram = statistics.grams[block]
        whole = Projection.of(prunable.dense_output(block), spec.transposed)
        if block in prunable.bases:
            whole = whole._replace(weight=turned_columns(whole.weight, prunable.bases[block]))
        if how == "bias" and whole.bias is None:
            continue
        mean = statistics.means.get(block)
        fitted = repaired(how, whole, gram, mean, columns.to(gram.device), ridge)
        fitted.write(_output_in(pruned, prunable, plan, block), spec.transposed)
        done += 1
    return done


def _output_in(pruned: nn.Module, prunable: Prunable, plan: PruningPlan, block: int) -> nn.Module:
    """Return the output projection of a block in a pruned model, whose layers are numbered anew."""
    return _module_in(pruned, prunable, plan, block).get_submodule(prunable.block_spec(block).output)


def _module_in(pruned: nn.Module, prunable: Prunable, plan: PruningPlan, block: int) -> nn.Module:
    """Return a block of a pruned model."""
    spec, layer = prunable.spec, plan.layers.index(plan.anatomy[block].layer)
    return pruned.get_submodule(f"{spec.decoder}.{spec.layers}.{layer}").get_submodule(prunable.block_spec(block).path)


@torch.no_grad()
def write_values(pruned: nn.Module, prunable: Prunable, plan: PruningPlan, refitted: Collection[int] = ()) -> None:
    """Put values in their bases, and output projections that read them there, into a pruned model, block by block.

    Args:
        pruned: what :func:`multipruner.apply_plan` made of the dense model by ``plan``, which takes the first rows of
            every basis.
        prunable: the dense model, not in order.
        plan: what stays; the value dimensions of a block are numbers of rows of its bases.
        refitted: blocks whose output projections are written in their bases afterwards. Others that stay whole keep
            their weights as they are.
    """
    for block, basis in prunable.bases.items():
        size = plan.structure[block]
        if not size or (size == plan.anatomy[block].dense and block not in refitted):
            continue
        kept, dense, spec = plan.kept(block), prunable.counts(block), prunable.block_spec(block)
        parameters = dict(prunable.module(block).named_parameters())
        target = dict(_module_in(pruned, prunable, plan, block).named_parameters())
        for tensor in spec.tensors:
            sides = [side for side, layout in enumerate(tensor.dims) if VALUES in layout.axes]
            if sides and tensor.path in parameters:
                turn = turned_columns if sides == [1] else turned_rows
                whole = turn(parameters[tensor.path].detach(), basis)
                index = tensor.dims[sides[0]].index(kept, dense)
                rows = torch.arange(index.stop) if isinstance(index, slice) else torch.tensor(index)
                target[tensor.path].copy_(whole.index_select(sides[0], rows.to(whole.device)))


@torch.no_grad()
def write_outputs(
    pruned: torch.nn.Module,
    prunable: Prunable,
    plan: PruningPlan,
    ranking: Ranking,
    outputs: Outputs,
    gain: Tensor | None = None,
) -> None:
    """Put refitted output projections, columns in ranked order, and the gain of the last norm into a pruned model."""
    spec = prunable.spec
    if gain is not None:
        norm = pruned.get_submodule(f"{spec.decoder}.{spec.final_norm}")
        norm.load_state_dict(scaled_norm(norm, gain, spec.norm_offset).state_dict())
    for block, (weight, bias) in outputs.items():
        own, dense = prunable.block_spec(block), prunable.counts(block)
        whole = kept_columns(own.columns, ranking.all_of(block, plan.anatomy[block].kind), dense)
        first = kept_columns(own.columns, prunable.counts(block, plan.structure[block]), dense)
        place = torch.argsort(whole[first]).to(weight.device)
        target = _output_in(pruned, prunable, plan, block)
        Projection(weight[:, place], bias).write(target, own.transposed)
