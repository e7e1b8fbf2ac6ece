"""The strategies by name."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from multipruner.console.say import Say
from multipruner.jobs.setting import Found, Setting
from multipruner.jobs.workspace import Workspace

from .greedy import greedy
from .program import program


def find(setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool) -> Found:
    """Search as the recipe says, go on with an interrupted search, or use a finished one that covers the ratio."""
    return STRATEGIES[setting.recipe.strategy](setting, workspace, console, say, overwrite)


STRATEGIES: dict[str, Callable[[Setting, Workspace, Console, Say, bool], Found]] = {
    "sequential": greedy,
    "milp": program,
}
