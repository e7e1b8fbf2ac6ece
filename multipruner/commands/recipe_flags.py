"""The flags of a recipe, shared by the commands that prune. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.core.costs import COSTS
from multipruner.core.errors import ConfigError, did_you_mean

from .base import evaluation_values, nested

if TYPE_CHECKING:
    from multipruner.config.recipe import Recipe


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which model, by which recipe; the recipe's fields follow under the same heading
    (:func:`.add_fields`).
    """
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="recipe, Hub id, local folder or .gguf file; 'list' lists")
    model.add_argument("--recipe", type=Path, metavar="FILE", help="a recipe of your own (YAML)")


def set_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag for any key of a recipe (:func:`taken_settings` reads it)."""
    parser.add_argument("--set", dest="set", action="append", metavar="KEY=VALUE",
                       help="any key of a recipe, dotted, with a YAML value, such as calibration.seed=3 or "
                       "stages=[mlp,heads,blocks]; may be given several times")  # fmt: skip


def taken_settings(typed: dict[str, Any]) -> None:
    """Put what ``--set KEY=VALUE`` says among the flags, whose destinations are keys as well.

    Args:
        typed: flags by dotted destination; changed.

    Raises:
        ConfigError: for what is no KEY=VALUE, a key that no recipe has, or one that is said twice.
    """
    from multipruner.config.fields import BUDGETS, keys_of
    from multipruner.config.recipe import Recipe
    from multipruner.config.spellings import old_flags
    from multipruner.recipes import value_of

    known = [*keys_of(Recipe), *(f"{BUDGETS}.{name}" for name in COSTS)]
    accepted = {*known, *(old for old, _ in old_flags("recipe"))}
    for text in typed.pop("set", None) or ():
        key, given, written = (part.strip() for part in text.partition("="))
        if not given:
            raise ConfigError(f"--set {text!r}: give KEY=VALUE, such as calibration.seed=3")
        if key not in accepted:
            raise ConfigError(f"--set {text}: a recipe has no key {key!r}{did_you_mean(key, known)}")
        value = value_of(written, f"--set {text}")
        for name, part in (_flat(key, value) if isinstance(value, dict) else {key: value}).items():
            said = [other for other in typed if other == name or f"{other}.".startswith(f"{name}.")
                    or f"{name}.".startswith(f"{other}.")]  # fmt: skip
            if said:
                raise ConfigError(f"--set {text}: {said[0]} is said twice (each flag is a key, too); say it once")
            typed[name] = part


def _flat(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a mapping's values by dotted keys."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(f"{key}.{name}", value) if isinstance(value, dict) else {f"{key}.{name}": value}
    return found


Amend = Callable[[dict[str, Any], Sequence[Mapping[str, Any]]], None]
"""Changes the fields that were typed, given the mappings of lower precedence."""


def recipe_of(typed: dict[str, Any], *fixed: dict[str, Any], amend: Amend | None = None) -> Recipe:
    """Return the recipe that typed flags make: flags and --set over the --recipe file over the catalogue over the
    defaults.

    Args:
        typed: flags by dotted destination, nothing else left in it.
        fixed: mappings that win over everything.
        amend: called before anything is merged.

    Raises:
        ConfigError: when no model is named, or a value cannot be meant.
    """
    from multipruner.config.recipe import Recipe
    from multipruner.recipes import mapping_for, read_file

    taken_settings(typed)
    recipe_file, model = typed.pop("recipe", None), typed.pop("model", None)
    sources = [read_file(recipe_file)] if recipe_file else []
    if model is not None:
        named = mapping_for(model)
        # what the model is goes with the flag; everything else of the catalogue gives way to the file
        sources = [named, *sources, {key: named.get(key) for key in ("model", "name", "revision", "fallback")}]
    elif not sources:
        raise ConfigError("which model? give --model NAME (see --model list), a Hub id, a folder or a .gguf file")
    flags = nested(typed)
    evaluation_values(flags)
    if amend is not None:
        amend(flags, sources)
    return Recipe.build(*sources, flags, *fixed)
