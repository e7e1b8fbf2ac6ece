"""What is said on a console."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

Say = Callable[[str], None]
"""Tells a person something, a line each."""


def teller(console: Console) -> Say:
    """Print messages on a console, a line each, as they are."""
    return lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True)
