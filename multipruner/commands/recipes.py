"""``python -m multipruner recipes``: list the recipes."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Parser


def make_parser() -> Parser:
    """Make the command's parser."""
    return Parser(prog="multipruner recipes", description="List the recipes.")


def run(arguments: Sequence[str]) -> int:
    make_parser().parse_args(arguments)
    from multipruner.recipes import catalogue

    for recipe in catalogue():
        facts = f"ratio {recipe.ratio or 0:g}  shares {recipe.shares_text()}  channel groups of {recipe.channel_group}"
        print(f"{recipe.name:<15}{recipe.model}\n{'':<15}{facts}\n{'':<15}{recipe.description}\n")
    print("shares are blocks:mlp:heads; any Hub id, local folder or .gguf file of a supported family will do as well")
    return 0
