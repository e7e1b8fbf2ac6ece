"""Tables and the exact program as a method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from multipruner.console.events import tell
from multipruner.console.progress import counting_display
from multipruner.console.say import Say
from multipruner.jobs.narrow import narrowed, sizes_in_reach, sizes_tried
from multipruner.jobs.remembered import remembered, rough_of
from multipruner.jobs.setting import Found, Setting
from multipruner.jobs.workspace import Workspace
from multipruner.search import allocate


def program(setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool) -> Found:
    """Find by tables and the exact program; losses measured for one budget serve every other."""
    return allocated(setting, workspace.open_measurements(setting.identity, overwrite), console, say)


def by_hidden_size(
    setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool
) -> tuple[Setting, Found]:
    """Solve for ever narrower residual streams, from the model's own on, until the measured loss rises; with a latency
    table for all that it knows (:func:`_in_table`).

    Args:
        setting: of the dense model.
        workspace: where losses are kept, of all widths in one file.
        console: for progress.
        say: tells what every width comes to.
        overwrite: give up what another run left there.

    Returns:
        The setting of the best width, and what was found in it.
    """
    path = workspace.open_measurements(setting.identity, overwrite)
    if setting.latency is not None:
        return _in_table(setting, path, console, say)
    here, best, losses = setting, (setting, allocated(setting, path, console, say)), dict[int, float]()
    whole, *narrower = sizes_tried(setting.recipe, setting.prunable)
    losses[whole] = best[1].loss
    for hidden in narrower:
        say(f"hidden size {min(losses)}: {losses[min(losses)]:.4f} nats")
        here = _at(setting, here, hidden, console)
        found = allocated(here, path, console, say)
        losses[hidden] = found.loss
        if found.loss >= best[1].loss:
            break
        best = here, found
    say(f"hidden size {min(losses)}: {losses[min(losses)]:.4f} nats")
    return best[0], replace(best[1], hidden_sizes=losses)


def _at(setting: Setting, last: Setting, hidden: int, console: Console) -> Setting:
    """Return the setting of a narrower residual stream, in the order of dimensions that the last one had."""
    if hidden == setting.prunable.anatomy.constants["hidden"]:
        return setting
    with counting_display(console, "hidden size") as display:
        return narrowed(replace(setting, ranking=last.ranking, basis=last.basis), hidden, display)


def _in_table(setting: Setting, path: Path, console: Console, say: Say) -> tuple[Setting, Found]:
    """Solve for every hidden size of the latency table with the milliseconds of that size (one program per hidden
    size, as in MDP, arXiv 2504.02168), and take the answer of least measured loss; rounds are for that size alone.

    Sizes at which the budgets cannot be kept are left out, with a line.
    """
    assert setting.latency is not None
    table, workload = setting.latency
    recipe, anatomy = setting.recipe, setting.prunable.anatomy
    here, once = setting, {"rounds": 0, "refine": 0.0}
    measured, predicted = dict[int, float](), dict[int, float]()
    sizes, errors = sizes_in_reach(recipe, setting.prunable)
    for error in errors:
        say(str(error))
    best: tuple[Setting, Found] | None = None
    for hidden in sizes:
        here = _at(setting, here, hidden, console)
        found = allocated(replace(here, recipe=recipe.model_copy(update=once)), path, console, say)
        measured[hidden], predicted[hidden] = found.loss, found.rounds[0].predicted
        takes = table.milliseconds(replace(found.structure, hidden=hidden), anatomy, workload)
        losses = f"predicted {predicted[hidden]:.4f}, measured {found.loss:.4f} nats"
        say(f"hidden size {hidden}: {losses} at {takes:.4g} ms")
        if best is None or found.loss < best[1].loss:
            best = here, found
    assert best is not None, "there is a size in reach"
    chosen, found = best
    if recipe.rounds or recipe.refine:  # for the best size alone; what was measured of it is on disk
        found = allocated(chosen, path, console, say)
    return chosen, replace(found, hidden_sizes=measured, predicted_sizes=predicted)


def allocated(setting: Setting, path: Path, console: Console, say: Say) -> Found:
    """Return what the program finds; its losses are kept in a file."""
    in_order = setting.prunable.in_order(setting.ranking, setting.search_repair)
    with in_order, counting_display(console, "dense model") as display:
        losses, rough = remembered(setting, path), rough_of(setting, path)
        known = len(losses.memo) + (len(rough.memo) if rough is not None else 0)
        if known:
            say(f"{known} losses were measured before and are not measured again")
        estimate = setting.estimate(display)
        result = allocate(setting.task, losses, display, sketch=rough, estimate=estimate)
    for round_ in result.rounds:
        tell(console, "decision", what="round", **round_.to_json())
        say(
            f"round {round_.number}: predicted {round_.predicted:.4f}, measured {round_.loss:.4f} nats"
            + ("" if round_.accepted else " (not better)")
        )
    work = {"structures": losses.objective.work}
    if rough is not None:
        work["first tables"] = rough.objective.work
    reached = setting.prunable.costs.ratio(result.structure)
    return Found(result.structure, result.loss, reached, work, rounds=result.rounds)
