"""The strategies by name."""

from __future__ import annotations

from rich.console import Console

from multipruner.config.choices import STRATEGIES, loaded, row_of
from multipruner.console.say import Say
from multipruner.jobs.setting import Found, Setting
from multipruner.jobs.workspace import Workspace


def find(setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool) -> Found:
    """Search as the recipe says, go on with an interrupted search, or use a finished one that covers the ratio."""
    strategy = loaded(row_of(STRATEGIES, setting.recipe.strategy, "strategy"))
    return strategy(setting, workspace, console, say, overwrite)
