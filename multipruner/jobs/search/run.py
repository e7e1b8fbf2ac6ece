"""One evolutionary search from recipe to folder: the counterpart of :mod:`multipruner.jobs.finish` for ``search``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from multipruner.config.recipe import Recipe
from multipruner.console.events import tell
from multipruner.console.generations import generation_display
from multipruner.console.progress import counting_display, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import ConfigError
from multipruner.engine.processes import Team, leave
from multipruner.jobs.finish import Run, finish
from multipruner.jobs.narrow import refuse_hidden_size
from multipruner.jobs.prepare import prepared
from multipruner.jobs.record import Clock, timed
from multipruner.report.figures.search import convergence, front_picture
from multipruner.search import Memo
from multipruner.search.evolution import Result, evolve, random_search
from multipruner.search.front import Front, pick

from .files import FORMAT, FRONT, SearchWorkspace, evaluations, front_record, write_history
from .options import SearchOptions
from .schedules import ScheduleEngine, check_recipe
from .structures import StructureEngine

Engine = StructureEngine | ScheduleEngine
ENGINES: dict[str, type[StructureEngine] | type[ScheduleEngine]] = {
    "structure": StructureEngine,
    "schedule": ScheduleEngine,
}
ALGORITHMS = {"nsga2": evolve, "random": random_search}


@dataclass(frozen=True)
class Outcome:
    """What the algorithms found.

    Attributes:
        results: by algorithm, the one asked for first.
        seeds: what the search started from, by name.
        picked: place in the front.
        losses: of the picked candidate and of the seeds, on every text.
    """

    results: Mapping[str, Result[Any]]
    seeds: Mapping[str, Any]
    picked: int
    losses: Mapping[str, Mapping[str, float]]

    @property
    def front(self) -> Front[Any]:
        """Of the algorithm that was asked for."""
        return next(iter(self.results.values())).front


def search(
    recipe: Recipe,
    options: SearchOptions,
    output: Path,
    *,
    console: Console | None = None,
    command: str | None = None,
    overwrite: bool = False,
) -> Run | None:
    """Search by evolution, as a recipe and options say, and write the picked model to a folder.

    Launched in several processes (torchrun, accelerate), all of them evaluate; rank 0 decides and writes. A search
    that was interrupted goes on where it was.

    Args:
        recipe: model, calibration, ratio, what orders and repairs widths.
        options: what is searched, and how.
        output: the folder; it appears only when the model is there.
        console: where progress and summary go; default: nowhere.
        command: the command line, for the record.
        overwrite: give up what another run left in the folder.

    Returns:
        The finished run; ``None`` on every rank but 0.

    Raises:
        MultiprunerError: see :mod:`multipruner.core.errors`; nothing half-written is left.
    """
    if recipe.layout == "uniform":
        raise ConfigError("search has no layout 'uniform'; use the exact program for that")
    refuse_hidden_size(recipe, "search")
    if not options.several:
        recipe.check_bounded()
    if options.genome == "schedule":
        check_recipe(recipe)
    team = Team.from_environment()
    recipe = recipe.model_copy(update={"device": team.device(recipe.device)})
    try:
        if team.rank:
            _serve(recipe, options, team)
            return None
        with SearchWorkspace(output, recipe.model) as workspace:
            run = _run(recipe, options, team, workspace, console or Console(quiet=True), command, overwrite)
            workspace.close()
        return run
    finally:
        leave()


def _serve(recipe: Recipe, options: SearchOptions, team: Team) -> None:
    """Do what the processes that do not decide do."""
    engine = ENGINES[options.genome](prepared(recipe, team, Console(quiet=True), {}), options, team)
    with engine.ready():
        team.serve()


def _run(
    recipe: Recipe,
    options: SearchOptions,
    team: Team,
    workspace: SearchWorkspace,
    console: Console,
    command: str | None,
    overwrite: bool,
) -> Run:
    say, seconds = teller(console), Clock(console)
    setting = prepared(recipe, team, console, seconds)
    engine = ENGINES[options.genome](setting, options, team)
    header = {**FORMAT, "identity": {**engine.identity, "ratio": recipe.ratio, "budgets": dict(recipe.budgets),
                                     **options.to_json()}}  # fmt: skip
    if workspace.open_search(header["identity"], overwrite):
        say("going on with this folder's search: nothing that was measured is measured again")
    with timed(seconds, "search"), ExitStack() as stack:
        with waiting_display(console, "dense model"):
            stack.enter_context(engine.ready())
        outcome = _search(engine, options, workspace, console)
        chosen = outcome.front.points[outcome.picked]
        its_setting, found = engine.result(chosen.candidate)
    team.stop()
    records = [{"algorithm": name, **record} for name, result in outcome.results.items() for record in result.history]
    said = _report(engine, options, outcome, seconds)
    write_history(workspace.journal_path, header, [*records, {"stage": "picked", **said}])
    front = front_record(outcome.front, outcome.picked, engine.space.to_json).encode()
    files = {FRONT: front, **_figures(outcome, options)}
    run = finish(its_setting, found, workspace, console, command, seconds, about_search=said, files=files)
    console.print(_table(outcome))
    return run


def _search(engine: Engine, options: SearchOptions, workspace: SearchWorkspace, console: Console) -> Outcome:
    """Return seeds, the algorithms, the choice, and losses on text that nothing was chosen by."""
    say = teller(console)
    with counting_display(console, "seeds") as counting:
        seeds = engine.seeds(say, counting) if options.algorithm == "nsga2" or options.compare_random else {}
    memo = evaluations(engine.identity)
    if len(memo):
        say(f"{len(memo)} candidates were evaluated before and are not evaluated again")
    names = [options.algorithm, *(["random"] if options.compare_random and options.algorithm == "nsga2" else [])]
    results = {name: _one(name, engine, options, seeds, memo, workspace, console) for name in names}
    front = results[options.algorithm].front
    how = options.pick if options.pick is not None else ("knee" if options.several else "best")
    picked = front.points.index(pick(front, how))
    compared = {"picked": front.points[picked].candidate, **seeds}
    if "random" in results and options.algorithm != "random":
        compared["random search"] = pick(results["random"].front, "best").candidate
    with waiting_display(console, "last losses"):
        losses = {name: engine.all_losses(candidate) for name, candidate in compared.items()}
    return Outcome(results, seeds, picked, losses)


def _one(
    algorithm: str,
    engine: Any,  # of one space or the other
    options: SearchOptions,
    seeds: Mapping[str, Any],
    memo: Memo,
    workspace: SearchWorkspace,
    console: Console,
) -> Result[Any]:
    """Return one algorithm from the first population to its front; random search starts from nothing."""
    settings = options.settings(engine.fidelities)
    share, called = engine.team.size, {"nsga2": "evolution"}.get(algorithm, algorithm)
    with generation_display(console, settings, called, share) as display:

        def over(history: Sequence[Mapping[str, Any]]) -> None:
            display.generation(history)
            _told(console, called, history[-1])

        engine.on_loss(display.tick)
        return ALGORITHMS[algorithm](
            engine.space,
            engine.evaluate,
            costs=engine.costs,
            measured=engine.measured,
            settings=settings,
            seeds=list(seeds.values()) if algorithm == "nsga2" else [],
            memo=memo,
            checkpoint=workspace.checkpoint_path(algorithm),
            on_generation=over,
        )


def _told(console: Console, algorithm: str, record: Mapping[str, Any]) -> None:
    """Have the end of a generation be an event: of every objective the best value and the mean."""
    if record["stage"] == "generation":
        names, front = record["objectives"], record["front"]
        best = {name: min(values) for name, values in zip(names, zip(*front, strict=True), strict=True)}
        mean = dict(zip(names, record["mean"], strict=True))
        tell(console, "decision", what=algorithm, step=record["generation"], best=best, mean=mean, front=len(front),
             evaluations=sum(record["scored"]))  # fmt: skip


def _report(engine: Engine, options: SearchOptions, outcome: Outcome, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return what ``report.json`` says about the search."""
    first = outcome.results[options.algorithm]
    return {
        "method": "evolution" if options.algorithm == "nsga2" else "random search",
        "genome": options.genome,
        "objectives": list(options.objectives),
        "population": options.population,
        "generations": options.generations,
        "search_seed": options.seed,
        "evaluations": list(first.scored),
        "computed_by_this_run": sum(result.computed for result in outcome.results.values()),
        "search_seconds": seconds["search"],
        "token_layers": engine.work.token_layers,
        "processes": engine.team.size,
        "tokens": engine.texts.sizes(),
        "losses": {name: dict(row) for name, row in outcome.losses.items()},
        "loss_held_out": outcome.losses["picked"]["held_out"],
        "picked": outcome.picked,
        "picked_values": dict(outcome.front.points[outcome.picked].values),
        "picked_candidate": engine.space.to_json(outcome.front.points[outcome.picked].candidate),
        "work": asdict(engine.work),
        **({"consent": options.consent} if options.task_names else {}),
    }


def _figures(outcome: Outcome, options: SearchOptions) -> dict[str, bytes]:
    histories = {name: result.history for name, result in outcome.results.items()}
    home = "calibration" if options.genome == "structure" else "choice"
    seeds = (
        {f"seed: {name}": outcome.losses[name][home] for name in outcome.seeds} if options.algorithm == "nsga2" else {}
    )
    figures = {"convergence.png": convergence(histories, seeds)}
    if options.several:
        figures["front.png"] = front_picture(outcome.front, outcome.picked)
    return figures


def _table(outcome: Outcome) -> Table:
    """Return losses of the picked candidate beside those of what it started from."""
    view = Table(title="loss in nats", title_justify="left")
    for column in ("", "search text", "text that chose", "unseen text"):
        view.add_column(column, justify="left" if not column else "right")
    for name, row in outcome.losses.items():
        view.add_row(name, *(f"{row[text]:.4f}" for text in ("calibration", "choice", "held_out")))
    return view
