"""Quicker efforts than a run's own, for the line that says so where a run takes long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multipruner.config.effort import EFFORTS, defaults_of
from multipruner.config.precedence import merge_into
from multipruner.config.recipe import Recipe

_UNSET = object()


def quicker(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipe at every effort before its own; none for a greedy path, whose presets are not told apart.

    Args:
        recipe: of a run.

    Returns:
        Effort -> the recipe in which all that is as its own effort sets it is as that one sets it; what is otherwise
        was typed, and stays.
    """
    names = list(EFFORTS)
    return {} if recipe.greedy else {name: _at(recipe, name) for name in names[: names.index(recipe.effort)]}


def _at(recipe: Recipe, effort: str) -> Recipe:
    said, defaults = recipe.model_dump(), Recipe.model_construct().model_dump(warnings=False)
    own, other = (_whole(defaults, recipe.method, name) for name in (recipe.effort, effort))
    _follow(said, own, other)
    return Recipe.model_validate({**said, "effort": effort})


def _whole(defaults: Mapping[str, Any], method: str, effort: str) -> dict[str, Any]:
    """Return what a recipe says where nothing is typed."""
    found: dict[str, Any] = {}
    merge_into(found, defaults)
    merge_into(found, defaults_of(method, effort))
    return found


def _follow(said: dict[str, Any], own: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Turn what is as ``own`` has it into what ``other`` has, section by section."""
    for key, value in said.items():
        before, after = own.get(key, _UNSET), other.get(key, _UNSET)
        if isinstance(value, dict) and isinstance(before, Mapping) and isinstance(after, Mapping):
            _follow(value, before, after)
        elif value == before and after is not _UNSET:
            said[key] = after
