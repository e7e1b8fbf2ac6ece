"""What is said on a console."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from .events import tell

Say = Callable[[str], None]
"""Tells a person something, a line each."""


def teller(console: Console) -> Say:
    """Print messages on a console, a line each, as they are; each is an event, too."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
        tell(console, "message", text=text)

    return say
