"""Orders of what can go, and a narrower residual stream: which dimensions stay, and the model that is left of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import ceil, inf

import torch

from multipruner.checkpoint.config import check_narrower
from multipruner.checkpoint.cut import apply_plan
from multipruner.config.counts import narrower_sizes
from multipruner.config.recipe import Recipe
from multipruner.console.progress import Show, named
from multipruner.core.axes import AXES, PAIRS, VALUES
from multipruner.core.errors import ConfigError, InfeasibleError, UnsupportedModelError
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Size, Structure
from multipruner.engine.moments import gather
from multipruner.engine.precision import Held, Together
from multipruner.engine.prunable import Prunable, Wider
from multipruner.importance.hidden_dims import order_of_stream
from multipruner.importance.rope_pairs import few_of, pair_errors, with_pairs
from multipruner.importance.stream_bases import basis_of_stream
from multipruner.importance.table import rank
from multipruner.importance.value_bases import turn_values
from multipruner.repair.narrowing import fit_to_wider
from multipruner.repair.rotation import hindrance, write_turned
from multipruner.repair.scoring import Repair
from multipruner.search import Grid
from multipruner.sources.calibration import CalibrationSet
from multipruner.storage.tensors_on_disk import OnDisk

from .limits import latency_table_of
from .reachable import check_reachable
from .setting import Setting, grid_of, unsaid_in


def check_asked(recipe: Recipe, prunable: Prunable) -> None:
    """Refuse a width that the residual stream of a model cannot have, and what cannot be reached with it, before
    anything is measured.

    Where ``--hidden-size auto`` tries the widths of a latency table, one that can keep the budgets is enough.

    Raises:
        ConfigError: naming what is allowed.
        InfeasibleError: naming the nearest budget that can be kept.
        UnsupportedModelError: when the family's configuration cannot say it.
    """
    if (within := unsaid_in(recipe)) and (recipe.latency_table is not None or recipe.layout == "uniform"):
        raise ConfigError(
            f"{within[0].setting} = {getattr(recipe, within[0].setting)}: latency tables and stock checkpoints "
            "(--layout uniform) know heads of one width; give none of these with it"
        )
    hidden, whole, step = recipe.hidden_size, prunable.anatomy.constants["hidden"], recipe.hidden_step
    if hidden is not None:
        check_narrower(prunable.spec)
        turns(recipe, prunable)
    if hidden is None or (hidden == "auto" and recipe.latency_table is None):
        check_reachable(recipe, prunable)
    elif hidden == "auto":
        sizes_in_reach(recipe, prunable)
    elif hidden > whole or (hidden % step and hidden != whole):
        raise ConfigError(f"hidden_size = {hidden}: give a multiple of hidden_step = {step} below the model's {whole}")
    else:
        check_reachable(recipe, _as_if(prunable, hidden))


def turns(recipe: Recipe, prunable: Prunable) -> bool:
    """Tell whether dimensions of the residual stream leave in a basis of their own.

    Raises:
        UnsupportedModelError: when that is asked for, and the model is not the same in another basis.
    """
    if recipe.rotate == "off":
        return False
    reason = hindrance(prunable)
    if reason is not None and recipe.rotate == "on":
        raise UnsupportedModelError(
            f"rotate = on: {reason}; its dimensions can leave as they lie in the weights: give --rotate off"
        )
    return reason is None


def unturned(recipe: Recipe, prunable: Prunable) -> str | None:
    """Return the line that says why dimensions of the residual stream leave as they lie; ``None`` where nothing is to
    be said.
    """
    if recipe.hidden_size is None or recipe.rotate != "auto" or (reason := hindrance(prunable)) is None:
        return None
    return f"hidden dimensions leave as they lie in the weights, in no basis of their own: {reason}"


def _as_if(prunable: Prunable, hidden: int) -> Prunable:
    """Return what costs and budgets read of a model whose residual stream has another width; its weights are whole."""
    if hidden == prunable.anatomy.constants["hidden"]:
        return prunable
    return Prunable.narrower(prunable.model, Wider(prunable, torch.arange(hidden)))


def as_bounded(recipe: Recipe, prunable: Prunable) -> Prunable:
    """Return what budgets read of the model at the hidden size that is asked for, or, where a latency table offers
    several, at the first one at which they can be kept.

    Raises:
        ConfigError, InfeasibleError: as :func:`check_asked` does.
    """
    if recipe.hidden_size is None or (recipe.hidden_size == "auto" and recipe.latency_table is None):
        return prunable
    auto = recipe.hidden_size == "auto"
    return _as_if(prunable, sizes_in_reach(recipe, prunable)[0][0] if auto else int(recipe.hidden_size))


def sizes_in_reach(recipe: Recipe, prunable: Prunable) -> tuple[list[int], list[InfeasibleError]]:
    """Return the hidden sizes of a latency table at which the budgets can be kept, and why they cannot at the others.

    Raises:
        ConfigError: when the table knows one hidden size alone.
        InfeasibleError: when they can be kept at none; it is of the one that comes nearest.
    """
    sizes, errors = list[int](), list[InfeasibleError]()
    for hidden in sizes_tried(recipe, prunable):
        try:
            check_reachable(recipe, _as_if(prunable, hidden))
        except InfeasibleError as error:
            errors.append(InfeasibleError(f"hidden size {hidden}: {error}", error.nearest))
        else:
            sizes.append(hidden)
    if not sizes:
        raise min(errors, key=lambda error: error.nearest or inf)
    return sizes, errors


def sizes_tried(recipe: Recipe, prunable: Prunable) -> tuple[int, ...]:
    """Return the widths of the residual stream that ``--hidden-size auto`` tries, the dense model's own first: those
    of the latency table where there is one.

    Raises:
        ConfigError: when that knows no narrower one.
    """
    whole = prunable.original.anatomy.constants["hidden"]
    if recipe.latency_table is None:
        return (whole, *narrower_sizes(whole, recipe.hidden_step))
    table, _ = latency_table_of(recipe, prunable.original)
    if not table.narrower:
        raise ConfigError(
            f"hidden_size = auto: {recipe.latency_table} knows hidden size {whole} alone; measure others too "
            "(multipruner latency --hidden-sizes auto), or give no --hidden-size"
        )
    return table.hidden_sizes


def refuse_hidden_size(recipe: Recipe, what: str) -> None:
    """Refuse a recipe that asks for a narrower residual stream, where nothing is made for it.

    Raises:
        ConfigError: naming what can.
    """
    if recipe.hidden_size is not None:
        raise ConfigError(f"hidden_size = {recipe.hidden_size}: {what} keeps the hidden size; prune without it can")


def ordered(setting: Setting, display: Show) -> Setting:
    """Return the same setting with moments of its text, if anything needs them, orders of all blocks and the repair."""
    recipe, prunable, ids = setting.recipe, setting.prunable, setting.statistics_ids
    place = OnDisk if recipe.moments == "disk" else dict
    shown = named(display, "moments")
    statistics = None if ids is None else gather(prunable, _for_order(recipe, ids, setting.calibration), shown, place)
    finer = [name for name in grid_of(recipe, prunable).steps if AXES[name].within]
    if VALUES in finer and statistics is not None:  # in bases in which the order is the one that they lie in
        turn_values(prunable, statistics)
        finer.remove(VALUES)
    ranking = rank(recipe.importance, prunable, statistics, named(display, "order"), within=finer)
    errors, few = None, None if ids is None else few_of(prunable, ids)
    if PAIRS in finer:
        ranking = with_pairs(prunable, ranking, few, named(display, "order of pairs"))
        if few is not None and recipe.repair != "none":
            kept = partial(fewer_pairs, prunable, grid_of(recipe, prunable))
            errors = pair_errors(prunable, ranking, few, kept, named(display, "errors of pairs"))
    repair = None
    if statistics is not None and recipe.repair != "none":
        repair = Repair(prunable, statistics, ranking, recipe.ridge, recipe.repair, errors)
    ranking = replace(ranking, stream=setting.ranking.stream)
    return replace(setting, statistics=statistics, ranking=ranking, repair=repair)


def fewer_pairs(prunable: Prunable, grid: Grid, block: int) -> list[Size]:
    """Return the sizes of a block that keep all but some of its RoPE pairs."""
    place = prunable.anatomy[block]
    names = [axis.name for axis in place.axes]
    return [(*place.dense[:-1], count) for count in grid.of(place)[-1][:-1]] if PAIRS in names else []


def _for_order(recipe: Recipe, ids: torch.Tensor, of: CalibrationSet) -> torch.Tensor:
    """Return the rows that the order takes: of pictures, which are no sequences, the same share."""
    wanted = recipe.text.order_sequences
    if wanted is not None and of.each > 1:
        wanted = ceil(len(ids) * min(1, wanted / recipe.text.moments_sequences))
    return ids[:wanted]


def narrowed(setting: Setting, hidden: int, display: Show, stream: Sequence[int] | None = None) -> Setting:
    """Return the same setting for a model whose residual stream keeps so many dimensions, chosen, cut and repaired.

    Args:
        setting: of the dense model, not ordered yet.
        hidden: how many stay; all of them leave the model as it is.
        display: of progress.
        stream: which ones, where that is known.
    """
    dense, recipe = setting.prunable, setting.recipe
    whole = dense.anatomy.constants["hidden"]
    if hidden == whole:
        return ordered(setting, display)
    ids = setting.calibration.ids if setting.statistics_ids is None else setting.statistics_ids
    order = setting.ranking.stream
    if stream is not None:
        order = (*stream, *sorted(set(range(whole)) - set(stream)))
    elif turns(recipe, dense):
        order = tuple(range(whole))
    elif not order:
        keep = min(sizes_tried(recipe, dense)) if recipe.hidden_size == "auto" else hidden  # narrower ones may follow
        order = order_of_stream(dense, ids, keep, named(display, "hidden order"))
    ranking, basis = replace(setting.ranking, stream=order), setting.basis
    if basis is None and turns(recipe, dense):
        basis = basis_of_stream(dense, ids, named(display, "hidden order"))
    setting = replace(setting, ranking=ranking, basis=basis)
    prunable, held = _cut(setting, hidden)
    fit_to_wider(prunable, ids, refit=recipe.repair == "lstsq", progress=named(display, "hidden repair"))
    return ordered(replace(setting, prunable=prunable, held=held, sensitivities=[], ran={}), display)


def _cut(setting: Setting, hidden: int) -> tuple[Prunable, Together]:
    """Return a model with the first dimensions of the order alone, and what holds it and the dense one."""
    dense = setting.prunable
    structure = Structure(dense.dense.blocks, hidden)
    plan = PruningPlan.from_structure(
        structure, setting.ranking, dense.anatomy, model=setting.source.name, model_type=dense.spec.model_type
    )
    with setting.held.released():
        model = apply_plan(dense.model, plan)
    assert isinstance(setting.held, Held)
    held = Together(setting.held, setting.precision.held(model))
    assert plan.stream is not None, "it is narrower"
    basis = None if setting.basis is None else setting.basis[:, list(plan.stream)]
    narrower = Prunable.narrower(model, Wider(dense, torch.tensor(plan.stream), basis))
    if basis is not None:
        write_turned(narrower)
    return narrower, held
