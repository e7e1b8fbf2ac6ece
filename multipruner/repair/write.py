"""Repaired output projections, written into a pruned model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multipruner.core.families import leading, ranked, units
from multipruner.core.plan import PruningPlan, Ranking, surviving_layers
from multipruner.core.structure import KINDS
from multipruner.engine.cutting import Projection, kept_columns, scaled_norm
from multipruner.engine.moments import Statistics
from multipruner.engine.prunable import Outputs, Prunable

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
    spec, done = prunable.spec, 0
    for new, old in enumerate(surviving_layers(plan)):
        kept, full = plan.layers[old], plan.dense[old]
        for kind in KINDS:
            if not kept.size.has(kind) or kept.size.same_block(full, kind):
                continue
            block = spec.block(kind)
            columns = kept_columns(block.columns, units(kept, full), prunable.counts(old))
            gram = statistics.grams[old, kind]
            dense = prunable.layers[old].get_submodule(f"{block.path}.{block.output}")
            whole = Projection.of(dense, block.transposed)
            if how == "bias" and whole.bias is None:
                continue
            target = pruned.get_submodule(f"{spec.decoder}.{spec.layers}.{new}.{block.path}.{block.output}")
            mean = statistics.means.get((old, kind))
            repaired(how, whole, gram, mean, columns.to(gram.device), ridge).write(target, block.transposed)
            done += 1
    return done


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
        norm.load_state_dict(scaled_norm(norm, gain).state_dict())
    for new, old in enumerate(surviving_layers(plan)):
        order = ranked(ranking.layers[old], plan.dense[old])
        for kind in KINDS:
            if (old, kind) not in outputs:
                continue
            block, (weight, bias) = spec.block(kind), outputs[old, kind]
            whole = kept_columns(block.columns, order, prunable.counts(old))
            first = kept_columns(block.columns, leading(plan.layers[old].size), prunable.counts(old))
            place = torch.argsort(whole[first]).to(weight.device)
            path = f"{spec.decoder}.{spec.layers}.{new}.{block.path}.{block.output}"
            Projection(weight[:, place], bias).write(pruned.get_submodule(path), block.transposed)
