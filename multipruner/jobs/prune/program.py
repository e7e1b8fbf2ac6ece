"""Tables and the exact program as a method."""

from __future__ import annotations

from rich.console import Console

from multipruner.console.events import tell
from multipruner.console.progress import counting_display
from multipruner.console.say import Say
from multipruner.jobs.estimates import estimate_of
from multipruner.jobs.remembered import remembered, rough_of
from multipruner.jobs.setting import Found, Setting
from multipruner.jobs.workspace import Workspace
from multipruner.search import allocate


def program(setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool) -> Found:
    """Find by tables and the exact program; losses measured for one budget serve every other."""
    path = workspace.open_measurements(setting.identity, overwrite)
    in_order = setting.prunable.in_order(setting.ranking, setting.search_repair)
    with in_order, counting_display(console, "dense model") as display:
        losses, rough = remembered(setting, path), rough_of(setting, path)
        known = len(losses.memo) + (len(rough.memo) if rough is not None else 0)
        if known:
            say(f"{known} losses were measured before and are not measured again")
        estimate = estimate_of(setting, display)
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
