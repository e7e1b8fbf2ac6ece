"""The schedule of a greedy path as the genome: what evolution asks about schedules, answered by walking them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.core.identity import digest
from multipruner.core.structure import Structure
from multipruner.engine.objective import Work
from multipruner.engine.processes import Team
from multipruner.importance.table import rank
from multipruner.jobs.remembered import RememberedObjective
from multipruner.jobs.setting import Found, Setting, grid_in
from multipruner.repair.columns import How
from multipruner.repair.scoring import Repair, check_repair
from multipruner.search import DIMENSIONS, Problem, Step
from multipruner.search.schedule import Schedule, ScheduleSpace, rounded
from multipruner.sources.calibration import CalibrationSet

from .budget import cost_of, one_step
from .files import evaluations
from .losses import Losses
from .options import SearchOptions
from .texts import SearchTexts
from .walk import walk

Say = Callable[[str], None]
Counting = Callable[[str, int, int], None]
CHEAP, FULL = 0, 1
"""Fidelities: paths judged on a few sequences, and paths judged as the recipe says."""
_TEXTS = {"cheap": 0, "widths": 1, "calibration": 2, "choice": 3, "held_out": 4}


@dataclass
class _Variant:
    """One importance with or without repair: a setting of its own, and losses in its order of widths."""

    setting: Setting
    losses: Losses
    memos: dict[int, RememberedObjective] = field(default_factory=dict)


def check_recipe(recipe: Recipe) -> None:
    """Refuse what a greedy path does not know.

    Raises:
        ConfigError: when there are other budgets than a ratio.
    """
    if recipe.ratio is None or recipe.budgets:
        raise ConfigError("--genome schedule searches greedy paths, which know a ratio only; give --ratio alone")


class ScheduleEngine:
    """Walks schedules; their loss is that of the structure they lead to, on held-out text that chooses.

    Args:
        setting: model and recipe; with the statistics that the choices of importance and repair need.
        options: what is asked.
        team: the processes that share the work.
    """

    fidelities = 2

    def __init__(self, setting: Setting, options: SearchOptions, team: Team) -> None:
        check_recipe(setting.recipe)
        if options.task_names:
            raise ConfigError("--genome schedule knows no evaluation tasks as objectives")
        recipe = setting.recipe
        self.setting, self.options, self.team = setting, options, team
        self._repair: How = options.repair(recipe)
        if "bias" in options.repairs:
            check_repair("bias", setting.prunable)
        self.texts = SearchTexts.of(setting)
        count = len(setting.calibration.ids)
        self.cheap = options.screened(count) or count
        self.home = CHEAP
        groups = options.channel_groups or (recipe.channel_group,)
        for group in groups:
            anatomy = setting.prunable.anatomy
            grid_in(recipe, channel_group=group).of_model(anatomy).check(anatomy)
        self.space = ScheduleSpace(
            groups,
            options.importances or (recipe.importance,),
            tuple(name != "none" for name in options.repairs or (recipe.repair,)),
        )
        self.measured = ("loss", *options.cost_names)
        self.costs: dict[str, Callable[[Schedule], float]] = {}
        tolerance = options.tolerance if options.tolerance is not None else one_step(recipe, setting.prunable)
        # a path that ends with a whole block may end far below the ratio, where losses are lower: no merit of its order
        self._least = (recipe.ratio or 0.0) - tolerance
        self._costs = [cost_of(name, recipe, setting.prunable) for name in options.cost_names]
        self._variants: dict[tuple[str, bool], _Variant] = {}
        self._on_loss: Callable[[], None] | None = None
        without = ("strategy", "order", "shares", "channel_group", "importance", "compensation", "width_sequences",
                   "freeze")  # fmt: skip
        base = {name: value for name, value in setting.identity.items() if name not in without}
        self._model = base | {"calibration": ""}
        self.identity = base | {
            "kind": "schedule",
            "cheap": self.cheap,
            "widths": recipe.calibration.width_sequences,
            "choice": self.texts.choice.hash,
            "ratio": recipe.ratio,
            "stop": recipe.stop,
            "least": self._least,
            "measured": ",".join(self.measured),
            "latency": [recipe.latency_table, recipe.workload],
        }
        if recipe.freeze is not None:
            self.identity["freeze"] = recipe.freeze
        if self._repair == "bias":  # a schedule says no more than that there is a repair
            self.identity["repair"] = "bias"
        team.handle("evaluate", self._answer)

    @property
    def losses(self) -> Losses:
        """Of the recipe's own variant."""
        return self._variant(self.setting.recipe.importance, self.setting.recipe.repair != "none").losses

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Do nothing: every variant has its own order of widths."""
        with nullcontext():
            yield

    def evaluate(self, candidates: Sequence[Schedule], fidelity: int) -> list[Any]:
        """Return loss (and costs) of the structure that each schedule leads to; infinity where it does not get
        there.
        """
        request = {"fidelity": fidelity, "candidates": [self.space.to_json(candidate) for candidate in candidates]}
        values: list[Any] = [(inf,) * len(self.measured)] * len(candidates)
        for answer in self.team.ask("evaluate", request):
            for place, value in answer:
                values[place] = tuple(value)
        return values

    def _answer(self, request: Any) -> list[tuple[int, Any]]:
        schedules = [self.space.from_json(record) for record in request["candidates"]]
        order = sorted(range(len(schedules)), key=lambda place: str(self.space.to_json(schedules[place])))
        return [(place, self._value(schedules[place], request["fidelity"])) for place in
                order[self.team.rank :: self.team.size]]  # fmt: skip

    def _value(self, schedule: Schedule, fidelity: int) -> tuple[float, ...]:
        try:
            structure, _ = self.path(schedule, fidelity)
        except InfeasibleError:
            return (inf,) * len(self.measured)
        if self.setting.prunable.costs.ratio(structure) < self._least:
            return (inf,) * len(self.measured)
        variant = self._variant(schedule.importance, schedule.compensation)
        with self._in_order(variant):
            loss = variant.losses.loss(structure, _TEXTS["choice"])
        return (loss, *(float(cost(structure)) for cost in self._costs))

    def path(self, schedule: Schedule, fidelity: int) -> tuple[Structure, list[Step]]:
        """Return the structure that a schedule leads to, and the steps there.

        Raises:
            InfeasibleError: when it does not reach the ratio.
        """
        variant = self._variant(schedule.importance, schedule.compensation)
        blocks, widths = ("cheap", "cheap") if fidelity == CHEAP else ("calibration", "widths")
        with self._in_order(variant):
            return walk(
                variant.setting, self._problem(schedule), self._memo(variant, _TEXTS[blocks]),
                self._memo(variant, _TEXTS[widths]),
            )  # fmt: skip

    def _problem(self, schedule: Schedule) -> Problem:
        recipe, decoded = self.setting.recipe, schedule.decode()
        assert recipe.ratio is not None, "checked before"
        grid = grid_in(recipe, channel_group=schedule.channel_group).of_model(self.setting.prunable.anatomy)
        return Problem(
            self.setting.prunable.costs, recipe.ratio, decoded["stages"], decoded["shares"], grid, recipe.stop
        )

    @contextmanager
    def _in_order(self, variant: _Variant) -> Iterator[None]:
        with self.setting.prunable.in_order(variant.setting.ranking, variant.setting.search_repair):
            yield

    def _variant(self, importance: str, compensation: bool) -> _Variant:
        if (importance, compensation) not in self._variants:
            self._variants[importance, compensation] = self._make_variant(importance, compensation)
        return self._variants[importance, compensation]

    def _make_variant(self, importance: str, compensation: bool) -> _Variant:
        setting, recipe = self.setting, self.setting.recipe
        ranking = setting.ranking
        if importance != recipe.importance:
            ranking = rank(importance, setting.prunable, setting.statistics)
        repair = None
        if compensation:
            if setting.statistics is None:
                raise ConfigError("repair among the choices needs --repair lstsq")
            repair = Repair(setting.prunable, setting.statistics, ranking, recipe.ridge, self._repair)
        own = recipe.model_copy(update={"importance": importance, "repair": self._repair if compensation else "none"})
        own_setting = replace(setting, recipe=own, ranking=ranking, repair=repair)
        calibration = self.texts.calibration
        texts = [
            calibration.head(self.cheap).ids, calibration.head(recipe.calibration.width_sequences).ids,
            calibration.ids, self.texts.choice.ids, self.texts.held_out.ids,
        ]  # fmt: skip
        return _Variant(own_setting, Losses(own_setting, texts, self._on_loss))

    def _memo(self, variant: _Variant, text: int) -> RememberedObjective:
        """Return losses along paths; schedules with the same beginning find each other's."""
        if text not in variant.memos:
            objective = variant.losses.objective(text)
            own = variant.setting.recipe
            ids = CalibrationSet(variant.losses.texts[text], "").hash
            what = {"text": ids, "importance": own.importance, "compensation": own.repair, "kind": "path"}
            memo = evaluations(self._model | what)
            variant.memos[text] = RememberedObjective(objective, memo, variant.losses.on_loss)
        return variant.memos[text]

    def on_loss(self, tell: Callable[[], None]) -> None:
        """Have something called after every loss."""
        self._on_loss = tell
        for variant in self._variants.values():
            variant.losses.on_loss = tell

    # What a search starts from, and what comes of it.

    def seeds(self, say: Say, counting: Counting) -> dict[str, Schedule]:
        """Return the recipe's own schedule."""
        recipe = self.setting.recipe
        if self.options.seeds_from:
            raise ConfigError("--seeds-from is for --genome structure")
        own = Schedule(
            tuple(recipe.stages), rounded([recipe.shares[name] for name in DIMENSIONS]), self.space.channel_groups[0],
            self.space.importances[0], self.space.compensations[0],
        )  # fmt: skip
        return {"recipe": own}

    def result(self, schedule: Schedule) -> tuple[Setting, Found]:
        """Return what a run folder is made from: the path walked as the recipe says."""
        structure, steps = self.path(schedule, FULL)
        loss = self.all_losses(schedule)["calibration"]
        decoded = schedule.decode()
        setting = self._variant(schedule.importance, schedule.compensation).setting
        update = {name: decoded[name] for name in ("stages", "shares", "channel_group")}
        recipe = setting.recipe.model_copy(update={**update, "method": "greedy", "budgets": {}})
        reached = setting.prunable.costs.ratio(structure)
        return replace(setting, recipe=recipe), Found(structure, loss, reached, {"paths": self.work}, steps)

    def all_losses(self, schedule: Schedule) -> dict[str, float]:
        """Return losses on the text of the search, on the text that chose, and on text that neither has seen."""
        structure, _ = self.path(schedule, FULL)
        variant = self._variant(schedule.importance, schedule.compensation)
        with self._in_order(variant):
            names = ("calibration", "choice", "held_out")
            return {name: variant.losses.loss(structure, _TEXTS[name]) for name in names}

    @property
    def work(self) -> Work:
        """What this process has computed."""
        total = Work.on(self.setting.prunable.anatomy)
        for variant in self._variants.values():
            total.evaluations += variant.losses.work.evaluations
            total.token_blocks += variant.losses.work.token_blocks
            total.head_tokens += variant.losses.work.head_tokens
        return total

    def namespace(self) -> str:
        """Return a hash of what losses depend on."""
        return digest(self.identity)
