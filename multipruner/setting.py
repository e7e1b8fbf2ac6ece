"""What the stages of a run share: what was loaded, what is asked, what the search found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .calibration import CalibrationSet
from .objective import Work
from .plan import Ranking
from .prunable import Prunable
from .recipe import Recipe
from .search import Grid, Problem, Step
from .sources import ResolvedModel


def problem_of(recipe: Recipe, prunable: Prunable) -> Problem:
    """The search problem that a recipe asks for."""
    grid = Grid(recipe.channel_group, recipe.kv_group_step, recipe.partial_groups)
    return Problem(prunable.costs, recipe.ratio, recipe.order, recipe.shares, grid, recipe.stop)


@dataclass(frozen=True)
class Setting:
    """What the stages of a run share."""

    recipe: Recipe
    source: ResolvedModel
    prunable: Prunable
    tokenizer: Any
    calibration: CalibrationSet
    held_out: CalibrationSet | None
    ranking: Ranking
    fingerprint: str

    @property
    def problem(self) -> Problem:
        """The search problem that the recipe asks for."""
        return problem_of(self.recipe, self.prunable)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the decisions depend on, except the ratio."""
        recipe = self.recipe
        return {
            "model": self.fingerprint,
            "calibration": self.calibration.hash,
            "ignored_label": self.calibration.ignore_id,
            "width_sequences": min(recipe.calibration.width_sequences, len(self.calibration.ids)),
            "batch_size": recipe.calibration.batch_size,
            "order": ",".join(recipe.order),
            "shares": recipe.shares_text(),
            "stop": recipe.stop,
            "channel_group": recipe.channel_group,
            "partial_groups": recipe.partial_groups,
            "kv_group_step": recipe.kv_group_step,
            "importance": recipe.importance,
            "dtype": str(self.prunable.head_weight.dtype),
            "device": self.prunable.model.device.type,
        }


@dataclass(frozen=True)
class Found:
    """The steps to take, the ratio of the search that found them, and what this process computed for it."""

    steps: list[Step]
    searched_to: float
    work: Mapping[str, Work]
