"""The main job: one pruning run from recipe to folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from multipruner.config.recipe import Recipe
from multipruner.config.sweep_points import default_output
from multipruner.console.say import teller
from multipruner.engine.processes import Team
from multipruner.jobs.finish import Run, finish
from multipruner.jobs.prepare import prepared
from multipruner.jobs.prune.greedy import lend_a_hand
from multipruner.jobs.prune.program import by_hidden_size
from multipruner.jobs.prune.strategies import find
from multipruner.jobs.record import Clock, timed
from multipruner.jobs.workspace import Workspace
from multipruner.recipes import mapping_for


def prune_recipe(
    recipe: Recipe,
    output: Path,
    *,
    console: Console | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> Run:
    """Prune a model as a recipe says and write the result to a folder.

    A run that was interrupted goes on where it was; a smaller ratio of a finished run in the same folder is cut
    from its path without searching again.

    Args:
        recipe: what to do.
        output: the folder; it appears only when everything is there.
        console: where progress and summary go; default: nowhere.
        command: the command line, for the record.
        overwrite: give up what another run left in the folder.

    Raises:
        MultiprunerError: see :mod:`multipruner.core.errors`; nothing half-written is left.
    """
    recipe.check_bounded()
    console = console or Console(quiet=True)
    team = Team.from_environment()
    recipe = recipe.model_copy(update={"device": team.device(recipe.device)})
    if team.rank:  # computes what rank 0 asks for, and writes nothing
        lend_a_hand(prepared(recipe, team, Console(quiet=True), {}, pictures=True))
        raise SystemExit(0)
    with Workspace(output, recipe.model) as workspace:
        run = _run(recipe, team, workspace, console, command, overwrite)
        workspace.close()
    return run


def _run(
    recipe: Recipe, team: Team, workspace: Workspace, console: Console, command: str | None, overwrite: bool
) -> Run:
    say = teller(console)
    seconds = Clock(console)
    walks = team.size == 1
    setting = prepared(recipe, team, console, seconds, workspace.output, walks=walks, pictures=True)
    with timed(seconds, "search"):
        if recipe.hidden_size == "auto":
            setting, found = by_hidden_size(setting, workspace, console, say, overwrite)
        else:
            found = find(setting, workspace, console, say, overwrite)
    team.stop()
    return finish(setting, found, workspace, console, command, seconds)


def prune(
    model: str | Recipe,
    *,
    output: str | Path | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    **overrides: Any,
) -> Run:
    """Prune a model, as ``python -m multipruner`` does.

    Args:
        model: a recipe name, Hub id, local folder or ``.gguf`` file, or a whole recipe.
        output: the folder to write; default ``runs/NAME-RATIO``.
        overwrite: give up what another run left there.
        console: where progress and summary go; default: nowhere.
        **overrides: recipe fields, such as ``ratio=0.3`` or ``calibration={"source": "self"}``.

    Returns:
        The finished run, with the pruned model in memory.

    Raises:
        MultiprunerError: a subclass that says what to do, such as :class:`ConfigError` for an unknown key,
            :class:`UnknownModelError`, :class:`CalibrationError` or :class:`InfeasibleError`. Nothing half-written is
            left, and the same call goes on where an interrupted one was.
    """
    base = model.model_dump(exclude_unset=True) if isinstance(model, Recipe) else mapping_for(model)
    recipe = Recipe.build(base, overrides)
    return prune_recipe(recipe, Path(output or default_output(recipe)), console=console, overwrite=overwrite)
