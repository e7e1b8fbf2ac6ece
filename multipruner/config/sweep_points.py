"""Which budgets a sweep tries: read from text, ordered, and put into a recipe; where a run goes. Needs no model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.core.costs import COSTS
from multipruner.core.errors import ConfigError, did_you_mean

from .amounts import amount_of
from .recipe import Recipe


def budgets() -> dict[str, str]:
    """Return what a sweep calls the budgets (as their flags do), and what a recipe calls them."""
    return {"ratio": "ratio", **{cost.word: name for name, cost in COSTS.items()}}


@dataclass(frozen=True, slots=True)
class SweepPoints:
    """The values that one budget takes, one after another.

    Attributes:
        budget: ``"ratio"``, or the name of a recipe's budget.
        values: as typed, loosest first, each once.
    """

    budget: str
    values: tuple[str, ...]

    def overrides(self, value: str) -> dict[str, Any]:
        """Return the recipe fields of one point."""
        return {"ratio": float(value)} if self.budget == "ratio" else {"budgets": {self.budget: value}}

    def recipe(self, base: Recipe, value: str) -> Recipe:
        """Return a recipe with this budget at one of the values; its other budgets stay.

        Raises:
            ConfigError: when the recipe cannot have that budget.
        """
        return Recipe.build(base.model_dump(), self.overrides(value))

    def folder(self, recipe: Recipe) -> Path:
        """Tell where a sweep goes when no folder is named."""
        called = next(name for name, budget in budgets().items() if budget == self.budget)
        return Path("runs") / f"{recipe.name}-sweep-{called}"


def default_output(recipe: Recipe) -> Path:
    """Return ``runs/NAME-RATIO``, where a run goes when no folder is named."""
    limits = [f"{recipe.ratio:g}"] if recipe.ratio is not None else []
    limits += [f"{name}-{amount}" for name, amount in recipe.budgets.items()]
    return Path("runs") / "-".join((recipe.name, *limits))


def parse_sweep(text: str, *, timed: bool = False) -> SweepPoints:
    """Read ``latency=0.9x,0.8x``, ``ratio=0.1,0.2``, ``memory=200MiB,150MiB``, or bare shares: ``0.9,0.8``.

    Args:
        text: as typed. Values after ``BUDGET=`` are what the budget's own flag takes. Bare values are shares of the
            dense model that may stay: of its latency where there is a latency table, else of its parameters.
        timed: whether there is a latency table.

    Raises:
        ConfigError: for an unknown budget, no values, values that are none, or shares mixed with amounts.
    """
    name, given, listed = text.partition("=")
    if not given:
        name, listed = "latency" if timed else "params", text
    name = name.strip()
    known = budgets()
    if name not in known:
        raise ConfigError(f"--sweep {text!r}: no budget {name!r}{did_you_mean(name, known)}; {', '.join(known)}")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    if not given:
        values = [value if value.endswith("x") else f"{value}x" for value in values]
    if not values:
        raise ConfigError(f"--sweep {text!r} names no value; give some, such as 0.9,0.8,0.7")
    sizes = _sizes(known[name], values)
    return SweepPoints(known[name], tuple(sorted(sizes, key=lambda value: -sizes[value])))


def _sizes(budget: str, values: list[str]) -> dict[str, float]:
    """Tell how much each value leaves, on one scale; equal ones once."""
    if budget == "ratio":
        sizes = {value: 1 - _ratio(value) for value in values}
    else:
        if len({value.endswith("x") for value in values}) > 1:
            raise ConfigError(
                f"--sweep: {', '.join(values)} mixes shares of the dense model with amounts; give one kind"
            )
        sizes = {value: amount_of(budget, value, 1.0) for value in values}
    return {value: size for value, size in sizes.items() if value == _first(sizes, size)}


def _first(sizes: Mapping[str, float], size: float) -> str:
    return next(value for value, other in sizes.items() if other == size)


def _ratio(value: str) -> float:
    try:
        ratio = float(value)
    except ValueError:
        ratio = 0.0
    if not 0 < ratio < 1:
        raise ConfigError(f"--sweep ratio={value}: a ratio lies between 0 and 1")
    return ratio
