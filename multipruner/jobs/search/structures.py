"""Per-layer sizes as the genome: what evolution asks about structures, answered by the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Any

from multipruner.checkpoint.run_folder import read_run
from multipruner.console.say import Say
from multipruner.core.errors import ConfigError, InfeasibleError, NumericsError
from multipruner.core.identity import digest
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Structure
from multipruner.engine.objective import Work
from multipruner.engine.processes import Team
from multipruner.eval import evaluate as run_evaluation
from multipruner.jobs.remembered import RememberedObjective
from multipruner.jobs.setting import Found, Setting, along_in, task_of
from multipruner.search import allocate
from multipruner.search.genome import StructureSpace

from .budget import budget_of, cost_of
from .files import evaluations
from .losses import Losses
from .options import SearchOptions
from .texts import SearchTexts
from .walk import walk

_ACCURACIES = ("acc_norm", "acc", "exact_match")
"""What of a task can be an objective, best first."""
Counting = Callable[[str, int, int], None]


class StructureEngine:
    """Evaluates structures at several fidelities, spread over a team (inside :meth:`ready`).

    The last fidelity is held-out text; the one before it is all of the calibration text.

    Args:
        setting: model and recipe.
        options: what is asked.
        team: the processes that share the work.
    """

    def __init__(self, setting: Setting, options: SearchOptions, team: Team) -> None:
        self.setting, self.options, self.team = setting, options, team
        self.texts = SearchTexts.of(setting)
        screened = options.screened(len(setting.calibration.ids))
        ids = self.texts.ids(screened)
        self.fidelities = len(ids)
        self.home = self.fidelities - 2
        self.losses = Losses(setting, [*ids, self.texts.held_out.ids])
        self.measured = ("loss", *options.task_names)
        self.space = StructureSpace(
            setting.prunable.anatomy,
            setting.grid,
            budget_of(setting.recipe, setting.prunable, options),
        )
        self.costs = {name: cost_of(name, setting.recipe, setting.prunable) for name in options.cost_names}
        self.identity = self._identity(screened)
        team.handle("evaluate", self._answer)

    def _identity(self, screened: int) -> dict[str, Any]:
        """Return what losses depend on."""
        setting = {k: v for k, v in self.setting.identity.items() if k != "strategy"}
        choice = self.texts.choice.hash
        identity = setting | {"fidelities": ["screen"] * bool(screened) + ["calibration", "choice"]}
        identity |= {"screened": screened, "choice": choice}
        if self.options.task_names:
            spec = self.setting.recipe.evaluation
            judged = spec.model_dump(mode="json", include={"limit", "include_path", "text", "length", "max_tokens"})
            identity |= {"tasks": ",".join(self.options.task_names), **judged}
        return identity

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Have the model's widths in their order, with their repair."""
        with self.setting.prunable.in_order(self.setting.ranking, self.setting.search_repair):
            yield

    def evaluate(self, candidates: Sequence[Structure], fidelity: int) -> list[Any]:
        """Return losses in nats (and errors of tasks, by consent), in the order of the candidates."""
        request = {"fidelity": fidelity, "candidates": [candidate.to_json() for candidate in candidates]}
        values: list[Any] = [inf] * len(candidates)
        for answer in self.team.ask("evaluate", request):
            for place, value in answer:
                values[place] = value
        return values

    def _answer(self, request: Any) -> list[tuple[int, Any]]:
        rows = self.losses.answer(self.team)(request)
        if not self.options.task_names:
            return rows
        structures = [Structure.from_json(each) for each in request["candidates"]]
        return [(place, (loss, *self._task_errors(structures[place]))) for place, loss in rows]

    def _task_errors(self, structure: Structure) -> list[float]:
        """Return 1 - accuracy of every task among the objectives (``ppl``: its logarithm). Test data: only by consent.

        Raises:
            ConfigError: for what is no single task with an accuracy.
        """
        names = self.options.task_names
        spec = self.setting.recipe.evaluation.model_copy(update={"tasks": names})
        model, held = self.setting.prunable.model, self.texts.held_out.ids
        with self.setting.prunable.applied(structure):
            try:
                found = run_evaluation(model, self.setting.tokenizer, spec, fallback_ids=held)
            except NumericsError:  # a candidate that overflows is the worst
                return [inf] * len(names)
        errors = []
        for name in names:
            if name == "ppl":
                errors.append(next(iter(found.perplexities.values())).nll)
            else:
                metrics = found.tasks[name].metrics if name in found.tasks else {}
                best = next((metrics[metric] for metric in _ACCURACIES if metric in metrics), None)
                if best is None:
                    known = ", ".join(_ACCURACIES)
                    raise ConfigError(f"{name} cannot be an objective: only ppl, and single tasks with one of {known}")
                errors.append(1 - best.value)
        return errors

    def on_loss(self, tell: Callable[[], None]) -> None:
        """Have something called after every loss."""
        self.losses.on_loss = tell

    # What a search starts from.

    def seeds(self, say: Say, counting: Counting) -> dict[str, Structure]:
        """Return structures by name: the exact program's, the greedy path's, those of other runs."""
        found: dict[str, Structure] = {}
        for path in self.options.seeds_from:
            taken = path.name in found or path.name in ("program", "greedy")
            found[str(path) if taken else path.name] = self._of_run(path)
        memo = evaluations({**self.identity, "fidelities": ["calibration"], "screened": 0, "choice": ""})
        objective = RememberedObjective(self.losses.objective(self.home), memo)
        if "program" in self.options.seeds:
            found |= self._programs(objective, say, counting)
        if "greedy" in self.options.seeds:
            found["greedy"] = walk(self.setting, self.setting.problem, objective, objective)[0]
        return found

    def _programs(self, objective: RememberedObjective, say: Say, counting: Counting) -> dict[str, Structure]:
        """Return the exact program's structures: for the ratio, and with several objectives for the ends of the
        range.
        """
        recipe, found = self.setting.recipe, {}
        ratios: list[float | None] = [recipe.ratio]
        if self.options.several and recipe.ratio is not None:
            ratios += [ratio for ratio in self.options.range(recipe.ratio) if ratio > 0]
        for ratio in ratios:
            name = "program" if ratio == recipe.ratio or ratio is None else f"program {ratio:g}"
            wanted = recipe.model_copy(update={"ratio": ratio})
            try:
                task = task_of(wanted, self.setting.prunable, repair=self.setting.search_repair)
                result = allocate(task, objective, counting, estimate=self.setting.estimate(counting))
            except InfeasibleError as error:
                if ratio == recipe.ratio:
                    raise
                say(f"no seed at a ratio of {ratio:g}: {error}")
                continue
            found[name] = result.structure
            say(f"seed {name}: {result.loss:.4f} nats")
        return found

    def _of_run(self, path: Path) -> Structure:
        """Return the structure of a finished run.

        Raises:
            OutputError: when the folder holds no run.
            ConfigError: when it is of another model.
        """
        plan: PruningPlan = read_run(path).plan
        if plan.fingerprint != self.setting.fingerprint:
            raise ConfigError(
                f"{path} was made from {plan.model}, whose weights are not those of {self.setting.source.name}: "
                "--seeds-from takes runs of the same dense model"
            )
        if plan.along != along_in(self.setting.recipe):
            raise ConfigError(
                f"{path} was pruned with another --value-dim-step or --rope-pair-step, or without: --seeds-from takes "
                "runs whose sizes are counted alike"
            )
        if plan.stream is not None:
            raise ConfigError(
                f"{path} has a narrower residual stream, which a search leaves as it is: give another run"
            )
        return plan.structure

    # What comes of it.

    def result(self, structure: Structure) -> tuple[Setting, Found]:
        """Return what a run folder is made from."""
        loss = self.losses.loss(structure, self.home)
        reached = self.setting.prunable.costs.ratio(structure)
        return self.setting, Found(structure, loss, reached, {"structures": self.work})

    def all_losses(self, structure: Structure) -> dict[str, float]:
        """Return losses on the text of the search, on the text that chose, and on text that neither has seen."""
        places = {"calibration": self.home, "choice": self.home + 1, "held_out": self.home + 2}
        return {name: self.losses.loss(structure, place) for name, place in places.items()}

    @property
    def work(self) -> Work:
        """What this process has computed."""
        return self.losses.work

    def namespace(self) -> str:
        """Return a hash of what losses depend on."""
        return digest(self.identity)
