"""What the stages of a run share: what was loaded, what is asked, what the search found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from multipruner.config.amounts import frozen_blocks
from multipruner.config.recipe import Recipe
from multipruner.core.axes import AXES, STREAM, VALUES, Axis, ranges_of, up_to_last
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Size, Structure
from multipruner.engine.fingerprint import configuration
from multipruner.engine.moments import Statistics, positions_of
from multipruner.engine.objective import Work
from multipruner.engine.precision import Held, Precision, Together
from multipruner.engine.processes import Team
from multipruner.engine.prunable import Outputs, Prunable
from multipruner.importance.energies import TOKENS, first_tables, sensitivities
from multipruner.importance.errors_as_run import errors_as_run, sizes_run
from multipruner.importance.stream_bases import BASIS
from multipruner.repair.scoring import Repair, has_output_bias
from multipruner.search import Grid, Problem, Round, Step, Task
from multipruner.search.grid import aligned
from multipruner.search.options import FIRST, FIRST_ON_CURVES
from multipruner.search.program import Table
from multipruner.sources.calibration import CalibrationSet
from multipruner.sources.pictures import PictureFiles
from multipruner.sources.resolve import ResolvedModel

from .limits import Timed, latency_table_of, limits_of


def grid_in(recipe: Recipe, **settings: int) -> Grid:
    """Tell how finely a recipe cuts any model, alignment aside.

    Args:
        recipe: names the steps.
        **settings: keys of the recipe with other values.
    """
    cut = (axis for axis in AXES.values() if axis.setting and axis.dimension in recipe.dimensions)
    values = {axis.name: settings.get(axis.setting, getattr(recipe, axis.setting)) for axis in cut}
    partial = (axis.name for axis in AXES.values() if axis.partial and getattr(recipe, axis.partial))
    steps = {name: step for name, step in values.items() if step is not None}
    return Grid(steps, frozenset(partial), {}, frozen_blocks(recipe.freeze), "blocks" in recipe.dimensions)


def along_in(recipe: Recipe) -> tuple[str, ...]:
    """Return the axes that a recipe has sizes name besides those that every size does."""
    return up_to_last([axis.name for axis in unsaid_in(recipe)])


def unsaid_in(recipe: Recipe) -> list[Axis]:
    """Return the axes that a recipe cuts of those that not every size names."""
    return [axis for axis in AXES.values() if axis.unsaid and getattr(recipe, axis.setting) is not None]


def grid_of(recipe: Recipe, prunable: Prunable) -> Grid:
    """Tell how finely a recipe cuts a model.

    Raises:
        ConfigError: when the model's widths cannot be aligned as the recipe asks.
    """
    grid = grid_in(recipe).of_model(prunable.anatomy)
    return grid if recipe.align is None else aligned(grid, prunable.anatomy, recipe.align)


def task_of(recipe: Recipe, prunable: Prunable, latency: Timed | None = None, repair: Repair | None = None) -> Task:
    """Return the integer program that a recipe asks for; its latency table is read where it is not given.

    Args:
        recipe: what is asked.
        prunable: the dense model.
        latency: the recipe's table and the workload that counts.
        repair: of the candidates, whose errors losses follow; without one they are on straight lines.
    """
    return Task(
        prunable.anatomy,
        grid_of(recipe, prunable),
        limits_of(recipe, prunable, latency),
        recipe.layout == "uniform",
        recipe.rounds,
        60 * recipe.refine,
        (() if recipe.estimated else FIRST_ON_CURVES) if recipe.on_curves else FIRST,
        None if repair is None else repair.errors,
        frozenset(n for n in range(len(prunable.anatomy)) if not prunable.block_spec(n).output),
    )


def problem_of(recipe: Recipe, prunable: Prunable) -> Problem:
    """Return the search problem that a recipe asks for."""
    assert recipe.ratio is not None, "checked by the recipe"
    return Problem(prunable.costs, recipe.ratio, recipe.stages, recipe.shares, grid_of(recipe, prunable), recipe.stop)


@dataclass(frozen=True)
class Setting:
    """What the stages of a run share; ``texts`` is what :meth:`.CalibrationText.record` gives, ``forecast`` what was
    foretold (:class:`multipruner.jobs.forecast.run.Forecast`), if anything was, ``sensitivities`` those of the blocks
    (:func:`multipruner.importance.energies.sensitivities`), computed when first tables need them, ``ran`` the errors of
    blocks that no moments tell (:mod:`multipruner.importance.errors_as_run`), ``pictures`` what an image classifier is
    judged on.
    (:func:`multipruner.importance.energies.sensitivities`), computed when first tables need them, ``pictures`` what an
    image classifier is judged on, ``basis`` that in which dimensions of the residual stream leave, where they do not as
    they lie (:func:`multipruner.importance.stream_bases.basis_of_stream`).

    What follows from these values is computed when it is first asked for, once; a setting with another recipe
    (:func:`dataclasses.replace`) computes its own.
    """

    recipe: Recipe
    source: ResolvedModel
    prunable: Prunable
    tokenizer: Any
    calibration: CalibrationSet
    held_out: CalibrationSet | None
    statistics: Statistics | None
    statistics_ids: Tensor | None
    ranking: Ranking
    repair: Repair | None
    fingerprint: str
    precision: Precision
    held: Held | Together
    texts: Mapping[str, Any] = field(default_factory=dict)
    team: Team = field(default_factory=Team, repr=False)
    forecast: Any = field(default=None, repr=False)
    sensitivities: list[float] = field(default_factory=list, repr=False)
    ran: dict[int, dict[Size, float]] = field(default_factory=dict, repr=False)
    pictures: PictureFiles | None = field(default=None, repr=False)
    basis: Tensor | None = field(default=None, repr=False)

    @property
    def search_repair(self) -> Repair | None:
        """What candidates are repaired with while they are scored."""
        return self.repair if self.recipe.repair_stage == "search" else None

    @property
    def repairs_all(self) -> bool:
        """Whether all output projections are refitted at the end to what has added up: a part of ``lstsq``."""
        return self.repair is not None and self.repair.how == "lstsq" and self.recipe.accumulate > 0

    def plan_of(self, structure: Structure) -> PruningPlan:
        """Tell which parts of the dense model a structure keeps, in the orders of this setting."""
        prunable, source = self.prunable, self.source
        narrower = None if prunable.wider is None else len(prunable.wider.kept)
        return PruningPlan.from_structure(
            replace(structure, hidden=narrower),
            self.ranking,
            prunable.original.anatomy,
            model=source.name,
            revision=source.revision,
            fingerprint=self.fingerprint,
            model_type=prunable.spec.model_type,
            bases=self.bases,
        )

    @property
    def bases(self) -> tuple[str, ...]:
        """The axes whose units are those of bases worked out of text; see :class:`.PruningPlan`."""
        wider, values = self.prunable.wider, (VALUES,) if self.prunable.bases else ()
        return values if wider is None or wider.basis is None else (*values, STREAM.axes[0].name)

    @cached_property
    def grid(self) -> Grid:
        """How finely the recipe cuts the model."""
        return grid_of(self.recipe, self.prunable)

    @cached_property
    def latency(self) -> Timed | None:
        """The recipe's latency table and the workload that counts; ``None`` without a table."""
        return latency_table_of(self.recipe, self.prunable) if self.recipe.latency_table is not None else None

    @cached_property
    def problem(self) -> Problem:
        """The search problem that the recipe asks for."""
        return problem_of(self.recipe, self.prunable)

    @cached_property
    def task(self) -> Task:
        """The integer program that the recipe asks for."""
        return task_of(self.recipe, self.prunable, self.latency, self.search_repair)

    def estimate(self, display: Callable[[str, int, int], None]) -> Callable[[Task], Table] | None:
        """Return what estimates the first tables (inside :meth:`Prunable.in_order`); ``None`` where they are measured.

        Args:
            display: called with ("energies", sequences done, sequences in all) in the backward pass, which is made once
                for all recipes, and with ("errors", blocks done, blocks in all) where blocks are run at several sizes.
        """
        if not self.recipe.estimated:
            return None

        def estimated(task: Task) -> Table:
            assert self.statistics_ids is not None, "there are no errors without moments"
            few = self.statistics_ids[: max(1, TOKENS // positions_of(self.prunable, self.statistics_ids))]
            if not self.sensitivities:
                seed, shown = self.recipe.calibration.seed, partial(display, "energies")
                self.sensitivities.extend(sensitivities(self.prunable, few, seed=seed, progress=shown))
            sizes = {b: [size for size in row if size not in self.ran.get(b, ())] for b, row in sizes_run(task).items()}
            if any(sizes.values()):
                for block, row in errors_as_run(self.prunable, few, sizes, partial(display, "errors")).items():
                    self.ran.setdefault(block, {}).update(row)
            return first_tables(task, self.sensitivities, self.ran)

        return estimated

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that losses and decisions depend on, except the ratio.

        In the words of version 1 (:mod:`multipruner.config.spellings`): what was measured stays valid.
        """
        recipe, grid = self.recipe, self.grid
        identity = {
            "model": self.fingerprint,
            "configuration": configuration(self.prunable.model),
            "calibration": self.calibration.hash,
            "ignored_label": self.calibration.ignore_id,
            "batch_size": recipe.calibration.batch_size,
            "strategy": "sequential" if recipe.greedy else "milp",
            "objective": recipe.objective,
            **{AXES[name].setting: step for name, step in grid.steps.items()},
            **{axis.partial: axis.name in grid.partial for axis in AXES.values() if axis.partial},
            "importance": recipe.importance,
            "compensation": recipe.repair if recipe.repair_stage == "search" else "none",
            "dtype": str(self.prunable.head_weight.dtype),
            "device": self.prunable.model.device.type,
        }
        if self.statistics is not None:
            identity |= {"statistics": self.statistics.hash, "ridge": recipe.ridge}
        if self.repair is not None and any(has_output_bias(self.prunable).values()):
            identity["output_biases"] = "repaired"  # losses of versions that left them alone are others
        if self.prunable.wider is not None:
            identity["hidden_dimensions"] = ranges_of(sorted(self.prunable.wider.kept.tolist()))
            identity |= {} if self.prunable.wider.basis is None else {"hidden_basis": BASIS}
        if recipe.greedy:
            identity |= {
                "width_sequences": min(recipe.calibration.width_sequences, len(self.calibration.ids)),
                "order": ",".join(recipe.stages),
                "shares": recipe.shares_text(),
                "stop": recipe.stop,
            } | ({} if recipe.shortlist is None else {"shortlist": recipe.shortlist})
            identity |= {"freeze": ",".join(f"{kind}:{n}" for kind, n in sorted(grid.frozen))} if grid.frozen else {}
        return identity


@dataclass(frozen=True)
class Found:
    """What a strategy found.

    Attributes:
        structure: what stays.
        loss: its calibration loss in nats, by the recipe's objective.
        hidden_sizes: the losses at the widths of the residual stream that were tried, where several were.
        predicted_sizes: those that the program predicted there, where a latency table knows them.
        outputs: output projections that were refitted at the end, or none.
        gain: of the last norm, refitted after them, [hidden_size].
        by: what found it, where it is not the recipe's method.
        searched_to: the ratio of the search that found it.
        work: what this process computed for it.
        steps: of the greedy path, where there is one.
        rounds: of the integer program, where there is one.
    """

    structure: Structure
    loss: float
    searched_to: float
    work: Mapping[str, Work]
    steps: list[Step] = field(default_factory=list)
    rounds: tuple[Round, ...] = ()
    hidden_sizes: Mapping[int, float] = field(default_factory=dict)
    predicted_sizes: Mapping[int, float] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)
    gain: Tensor | None = None
    loss_before_outputs: float | None = None
    by: str | None = None
