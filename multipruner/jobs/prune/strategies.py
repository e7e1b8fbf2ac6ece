"""The methods by name."""

from __future__ import annotations

from rich.console import Console

from multipruner.config.choices import METHODS, loaded, row_of
from multipruner.console.say import Say
from multipruner.jobs.setting import Found, Setting
from multipruner.jobs.workspace import Workspace


def find(setting: Setting, workspace: Workspace, console: Console, say: Say, overwrite: bool) -> Found:
    """Search as the recipe says, go on with an interrupted search, or use a finished one that covers the ratio."""
    method = loaded(row_of(METHODS, setting.recipe.method, "method").by)
    return method(setting, workspace, console, say, overwrite)
