"""``--sweep`` and ``--plan``: many budgets in one command, and a plan that is there already made into a model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.config.spellings import old_flags, respelled
from multipruner.core.costs import COSTS
from multipruner.core.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from multipruner.config.recipe import Recipe
    from multipruner.config.sweep_points import SweepPoints


def sweep_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags; absent means "not given" (the parser's default must be ``argparse.SUPPRESS``)."""
    words = " ".join(f"{cost.word}=" for cost in COSTS.values() if not cost.needs_table)
    many = parser.add_argument_group("many budgets, or none")
    many.add_argument("--sweep", metavar="[BUDGET=]VALUES",
                      help="one budget at many values, figures and a plan for each, no model: latency=0.9x,0.8x "
                      f"ratio=0.1,0.2 {words}; bare shares such as 0.9,0.8 are of the latency where there is a "
                      "--latency-table, else of the parameters")  # fmt: skip
    many.add_argument("--sweep-greedy", action="store_true",
                      help="with the points of the greedy path, which takes much longer")  # fmt: skip
    for old, _ in old_flags("sweep"):
        many.add_argument(f"--{old.replace('_', '-')}", action="store_true", help=argparse.SUPPRESS)
    many.add_argument("--plan", type=Path, metavar="FILE",
                      help="make the model of this plan, such as SWEEP/plans/0.8x.json; give the sweep's other "
                      "flags again")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What was typed of these flags.

    Attributes:
        sweep: text of ``--sweep``.
        greedy: whether the greedy path is walked too.
        plan: file of ``--plan``.
    """

    sweep: str | None
    greedy: bool
    plan: Path | None

    def __bool__(self) -> bool:
        return self.sweep is not None or self.plan is not None

    def to_json(self) -> dict[str, Any]:
        """Return what was given, by the names of the flags."""
        said = {"sweep": self.sweep, "sweep_greedy": self.greedy or None, "plan": self.plan and str(self.plan)}
        return {name: value for name, value in said.items() if value is not None}

    def put_into(self, flags: dict[str, Any], sources: Sequence[Mapping[str, Any]]) -> None:
        """Give the recipe the budget it needs to be a whole one: the loosest of the sweep, or none that binds.

        Args:
            flags: recipe fields that were typed; changed.
            sources: mappings of lower precedence.

        Raises:
            ConfigError: for a sweep that cannot be read.
        """
        if self.plan is not None:
            from multipruner.jobs.prune.given_plan import NO_BUDGET

            flags.update(NO_BUDGET)
        elif self.sweep is not None:
            from multipruner.config.sweep_points import parse_sweep

            timed = any(one.get("latency_table") is not None for one in (*sources, flags))
            points = parse_sweep(self.sweep, timed=timed)
            given = points.overrides(points.values[0])
            flags["budgets"] = flags.get("budgets", {}) | given.pop("budgets", {})
            flags.update(given)
            if not flags["budgets"]:
                del flags["budgets"]

    def folder(self, recipe: Recipe) -> Path:
        """Tell where the result goes when no folder is named."""
        if self.plan is not None:
            return Path("runs") / f"{recipe.name}-{self.plan.stem}"
        return self._points(recipe).folder(recipe)

    def _points(self, recipe: Recipe) -> SweepPoints:
        from multipruner.config.sweep_points import parse_sweep

        return parse_sweep(self.sweep or "", timed=recipe.latency_table is not None)

    def run(self, recipe: Recipe, folder: Path, console: Console, command: str, overwrite: bool) -> None:
        """Run the sweep, or make the plan's model."""
        if self.plan is not None:
            from multipruner.jobs.prune.given_plan import apply_given_plan

            apply_given_plan(recipe, self.plan, folder, console=console, command=command, overwrite=overwrite)
        else:
            from multipruner.jobs.sweep.run import sweep

            sweep(recipe, self._points(recipe), folder, console=console, command=command, overwrite=overwrite,
                  greedy=self.greedy)  # fmt: skip


def take(typed: dict[str, Any]) -> Asked:
    """Take these flags out of what was typed.

    Raises:
        ConfigError: when they contradict each other.
    """
    names = ("sweep", "sweep_greedy", "plan", *(old for old, _ in old_flags("sweep")))
    said = respelled("sweep", {name: typed.pop(name) for name in names if name in typed})
    asked = Asked(said.get("sweep"), said.get("sweep_greedy", False), said.get("plan"))
    if asked.sweep is not None and asked.plan is not None:
        raise ConfigError("--sweep finds plans, --plan makes one into a model: give one of them")
    if asked.greedy and asked.sweep is None:
        raise ConfigError("--sweep-greedy adds to a --sweep")
    return asked
