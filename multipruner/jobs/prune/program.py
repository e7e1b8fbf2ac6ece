"""Tables and the exact program as a method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from multipruner.console.events import tell
from multipruner.console.progress import counting_display
from multipruner.console.say import Say
from multipruner.jobs.narrow import narrowed
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
    """Solve for ever narrower residual streams, from the model's own on, until the measured loss rises.

    Args:
        setting: of the dense model.
        workspace: where losses are kept, of all widths in one file.
        console: for progress.
        say: tells what every width comes to.
        overwrite: give up what another run left there.

    Returns:
        The setting of the best width, and what was found in it.
    """
    path, step = workspace.open_measurements(setting.identity, overwrite), setting.recipe.hidden_step
    whole = setting.prunable.anatomy.constants["hidden"]
    here, best, losses = setting, (setting, allocated(setting, path, console, say)), dict[int, float]()
    losses[whole] = best[1].loss
    for hidden in range((whole - 1) // step * step, whole // 2, -step):
        say(f"hidden size {min(losses)}: {losses[min(losses)]:.4f} nats")
        with counting_display(console, "hidden size") as display:
            here = narrowed(replace(setting, ranking=here.ranking), hidden, display)
        found = allocated(here, path, console, say)
        losses[hidden] = found.loss
        if found.loss >= best[1].loss:
            break
        best = here, found
    say(f"hidden size {min(losses)}: {losses[min(losses)]:.4f} nats")
    return best[0], replace(best[1], hidden_sizes=losses)


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
