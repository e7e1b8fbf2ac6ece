"""What an evolutionary search is asked, beside the recipe: objectives, sizes, seeds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from multipruner.config.counts import MOST, MOST_UNITS, check_counts
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError
from multipruner.search.objectives import check_objectives, objectives
from multipruner.search.settings import Settings

WIDEST = 0.95
"""The largest ratio of a range that was not given."""


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """What a search is asked.

    Attributes:
        objectives: what is minimised, loss first; with costs beside it the result is a front.
        genome: what is bred: per-layer sizes, or the schedule of a greedy path.
        algorithm: ``"nsga2"``, or ``"random"`` for as many random candidates.
        population, generations, offspring, seed: see :class:`multipruner.search.settings.Settings`.
        tolerance: how much more than the ratio may be removed, as a share of all parameters; ``None``: one step.
        ratios: with several objectives, the least and the most that may be removed; ``None``: half and one and a half
            times the recipe's ratio.
        screen: sequences on which children are looked at first; 0: none, ``None``: a quarter of all.
        pick: which point of the front becomes the model; ``None``: best with one objective, knee with several.
        seeds: what is computed to start from.
        seeds_from: folders of other runs whose structures are started from.
        compare_random: whether random search runs beside it.
        channel_groups, importances, repairs: choices of the genome ``"schedule"``; empty: the recipe's.
        consent: the sentence that allows an evaluation task as an objective.
    """

    objectives: tuple[str, ...] = ("loss",)
    genome: Literal["structure", "schedule"] = "structure"
    algorithm: Literal["nsga2", "random"] = "nsga2"
    population: int = 24
    generations: int = 20
    offspring: int = 0
    seed: int = 0
    tolerance: float | None = None
    ratios: tuple[float, float] | None = None
    screen: int | None = None
    pick: Literal["knee", "best"] | int | None = None
    seeds: tuple[Literal["program", "greedy"], ...] = ("program",)
    seeds_from: tuple[Path, ...] = ()
    compare_random: bool = False
    channel_groups: tuple[int, ...] = ()
    importances: tuple[str, ...] = ()
    repairs: tuple[str, ...] = ()
    consent: str | None = None

    def __post_init__(self) -> None:
        if {"lstsq", "bias"} <= set(self.repairs):
            raise ConfigError("--repairs lstsq,bias: a schedule is with one repair or without; name one of them")
        object.__setattr__(self, "objectives", tuple(_loss_first(check_objectives(self.objectives, self.consent))))
        if "loss" not in self.objectives:
            raise ConfigError("loss must be among the objectives, also where a task is")
        if self.ratios is not None and not 0 <= self.ratios[0] < self.ratios[1] < 1:
            raise ConfigError(f"--ratio-range {self.ratios[0]:g}:{self.ratios[1]:g}: give LOW:HIGH between 0 and 1")
        if self.ratios is not None and len(self.objectives) == 1:
            raise ConfigError("--ratio-range is for several objectives; with the loss alone give --ratio")
        if self.tolerance is not None and not 0 < self.tolerance < 1:
            raise ConfigError(f"--tolerance {self.tolerance:g}: give a share of all parameters, such as 0.002")
        check_counts(self, {"screen": (0, MOST)})
        for size in self.channel_groups:
            if not 1 <= size <= MOST_UNITS:
                raise ConfigError(f"--channel-groups {size}: a group has 1 to {MOST_UNITS:,} channels in all")
        self.settings(2)

    def repair(self, recipe: Recipe) -> Literal["lstsq", "bias"]:
        """Return the repair that schedules are with or without: what was asked for, else the recipe's."""
        return "bias" if "bias" in (self.repairs or (recipe.repair,)) else "lstsq"

    @property
    def several(self) -> bool:
        """Whether the result is a front."""
        return len(self.objectives) > 1

    @property
    def cost_names(self) -> tuple[str, ...]:
        """The objectives that are exact costs of a structure."""
        return tuple(name for name in self.objectives[1:] if name in objectives())

    @property
    def task_names(self) -> tuple[str, ...]:
        """The objectives that are evaluation tasks (by consent)."""
        return tuple(name for name in self.objectives if name not in objectives())

    def settings(self, fidelities: int) -> Settings:
        """Return the settings of the search.

        Raises:
            ConfigError: when one is out of its range.
        """
        return Settings(
            population=self.population,
            generations=self.generations,
            offspring=self.offspring,
            seed=self.seed,
            fidelities=fidelities,
        )

    def screened(self, sequences: int) -> int:
        """Return sequences of the first look at a child; 0: there is none."""
        wanted = sequences // 4 if self.screen is None else self.screen
        return wanted if wanted < sequences else 0

    def range(self, ratio: float) -> tuple[float, float]:
        """Return the least and the most that a structure of the front removes."""
        return self.ratios or (ratio / 2, min(WIDEST, 1.5 * ratio))

    def to_json(self) -> dict[str, Any]:
        """Return what decisions depend on, in the words of version 1 (:mod:`multipruner.config.spellings`)."""
        seeds = {"program": "milp", "greedy": "sequential"}
        return {
            "objectives": ",".join(self.objectives),
            "genome": self.genome,
            "algorithm": self.algorithm,
            "population": self.population,
            "offspring": self.offspring,
            "search_seed": self.seed,
            "tolerance": self.tolerance,
            "ratio_range": list(self.ratios) if self.ratios else None,
            "screen": self.screen,
            "seeds": ",".join(seeds[name] for name in self.seeds),
            "seeds_from": [str(path) for path in self.seeds_from],
            "channel_groups": list(self.channel_groups),
            "importances": list(self.importances),
            "compensations": list(self.repairs),
        }


def _loss_first(names: tuple[str, ...]) -> list[str]:
    return sorted(names, key=lambda name: name != "loss")
