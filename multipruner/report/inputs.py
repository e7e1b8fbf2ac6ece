"""What a report is made from: the files that runs and searches leave in their folders, checked once, here."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from multipruner.config.spellings import respelled
from multipruner.core.costs import timed_first
from multipruner.core.errors import ConfigError
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Anatomy, Structure
from multipruner.eval.comparison import Comparison, Contrast
from multipruner.search import Step
from multipruner.search.step import TrajectoryJournal, attributes
from multipruner.storage.run_report import check_numbers

REPORT, PLAN, TRAJECTORY, FRONT = "report.json", "plan.json", "trajectory.jsonl", "front.json"
T = TypeVar("T")
Number = Annotated[float, Field(allow_inf_nan=False)]
"""Of a report, also where it stands there as a text."""


@dataclass(frozen=True, slots=True)
class Amount:
    """A cost of the dense and of the pruned model."""

    before: Number
    after: Number


@dataclass(frozen=True, slots=True)
class Base:
    """The dense model."""

    name: str
    revision: str | None = None
    description: str | None = None
    fingerprint: str | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """The text that decided, or the pictures."""

    name: str | None = None
    hash: str | None = None
    tokens: int | None = None
    sequences: int | None = None
    moments_tokens: int | None = None
    held_out_tokens: int | None = None
    pictures: int | None = None


@dataclass(frozen=True, slots=True)
class Round:
    """One solution of an integer program: the loss that its table promised, and the loss measured, in nats."""

    round: int
    predicted: float
    loss: float
    seconds: Number | None = None


@dataclass(frozen=True, slots=True)
class Search:
    """How the structure was found."""

    steps: int | None = None
    searched_to: Number | None = None
    loss: Number | None = None
    rounds: tuple[Round, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores(Comparison):
    """One evaluation of dense and pruned model on the same examples."""

    perplexity: Mapping[str, Contrast] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, Contrast]] = field(default_factory=dict)
    average: Contrast | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Report:
    """The part of ``report.json`` that a page shows; other keys are left alone."""

    model: Base
    ratio: Number
    backbone_ratio: Number
    parameters: Amount
    structure: Any
    costs: dict[str, Amount] = field(default_factory=dict)
    calibration: Calibration = field(default_factory=Calibration)
    search: Search = field(default_factory=Search)
    perplexity: dict[str, Contrast] = field(default_factory=dict)
    tasks: dict[str, dict[str, Contrast]] = field(default_factory=dict)
    average: Contrast | None = None
    evaluations: tuple[Scores, ...] = ()
    latency: dict[str, Any] | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    command: str | None = None
    seconds: dict[str, Number] = field(default_factory=dict)
    forecast: dict[str, dict[str, Any]] = field(default_factory=dict)
    tuned: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    platform: str | None = None

    @property
    def scores(self) -> tuple[Scores, ...]:
        """All evaluations, the run's own first; empty ones are left out."""
        own = Scores(self.perplexity, self.tasks, self.average, settings=self.recipe.get("evaluation") or {})
        return tuple(each for each in (own, *self.evaluations) if each.perplexity or each.tasks or each.suite)


@dataclass(frozen=True, slots=True)
class Front:
    """What a search found.

    Attributes:
        label: the name of its folder.
        cost: the objective that the loss is drawn against, a row of :data:`multipruner.core.costs.COSTS`.
        points: (loss in nats, cost) of every candidate in ``front.json``; at least one.
    """

    label: str
    cost: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class RunFiles:
    """One finished run.

    Attributes:
        label: what the page calls it; different from every other run's.
        folder: where it is, as it was typed.
        report, plan: its record and what it kept.
        steps: the removals that lead to its structure; empty when it was not found step by step.
    """

    label: str
    folder: Path
    report: Report
    plan: PruningPlan
    steps: tuple[Step, ...]

    @property
    def anatomy(self) -> Anatomy:
        return self.plan.anatomy

    @property
    def structure(self) -> Structure:
        return self.plan.structure


def read_folders(folders: Sequence[Path]) -> tuple[tuple[RunFiles, ...], tuple[Front, ...]]:
    """Read the runs and the Pareto fronts that some folders hold (a folder may hold both).

    Raises:
        ConfigError: naming the file that is missing or broken.
    """
    for folder in folders:
        _check_folder(folder)
    runs, fronts = [], []
    for folder, label in zip(folders, _labels(folders), strict=True):
        front = folder / FRONT
        if front.exists():
            fronts += _read_front(front, label, needed=not (folder / REPORT).exists())
        if (folder / REPORT).exists() or not front.exists():
            runs.append(_read_run(folder, label))
    return tuple(runs), tuple(fronts)


def _check_folder(folder: Path) -> None:
    try:
        if "\0" in str(folder):
            raise ValueError("it holds a NUL")
        there = folder.is_dir()
        next(folder.iterdir() if there else iter(()), None)
    except (OSError, ValueError) as error:  # a name too long or with NUL, or no permission
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{str(folder)[:200]!r} cannot be read: {reason}") from None
    if not there:
        raise ConfigError(f"{folder} is not a folder; name the folders that runs wrote")


def _read_front(path: Path, label: str, *, needed: bool) -> list[Front]:
    """Return the points of a search; none when it had no other objective than the loss and a run can be shown instead.

    A point is ``{"values": {"loss": ..., "latency": ...}}``, or holds its numbers itself.
    """
    rows = _checked(tuple[dict[str, Any], ...], _mapping(path).get("points"), path, "points")
    points: list[dict[str, Any]] = [row["values"] if isinstance(row.get("values"), dict) else row for row in rows]
    for index, values in enumerate(points):
        _checked(dict[Literal["loss"], float], {"loss": values.get("loss")}, path, f"points.{index}")
    for cost in (name for row in timed_first() for name in dict.fromkeys((row.key, row.name))):
        both = tuple((float(p["loss"]), float(p[cost])) for p in points if _finite(p.get(cost)) and _finite(p["loss"]))
        if both:
            return [Front(label, cost, both)]
    if needed:
        known = ", ".join(cost.name for cost in timed_first())
        raise ConfigError(f"{path} holds no point with a loss and one of {known}: nothing to draw")
    return []


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _labels(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, with as many parents as it takes to tell them apart."""
    places = [folder.absolute().resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise ConfigError("the same folder is named twice; name each once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return ["/".join(place.parts[-depth:]) for place in places]


def _read_run(folder: Path, label: str) -> RunFiles:
    path = folder / REPORT
    record = respelled("report", _mapping(path), str(path))
    if record.get("format") != "multipruner-report" or record.get("version") != 1:
        raise ConfigError(f"{path} is not a report that this version of multipruner reads")
    check_numbers(record, path)
    report = _checked(Report, record, path)
    try:
        plan = PruningPlan.from_json(_text(folder / PLAN))
    except ConfigError as error:
        raise ConfigError(f"{folder / PLAN}: {error}") from None
    if plan.structure != _structure(report.structure, path):
        raise ConfigError(f"{path} and {folder / PLAN} hold different structures: they are of different runs")
    return RunFiles(label, folder, report, plan, _read_steps(folder / TRAJECTORY, report, plan.anatomy))


def _structure(value: Any, path: Path) -> Structure:
    try:
        return Structure.from_json(value)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} is broken: structure: {error}") from None


def _read_steps(path: Path, report: Report, anatomy: Anatomy) -> tuple[Step, ...]:
    """Return the steps up to the run's ratio; a torn last line (the writer was killed) does not count.

    Raises:
        OutputError: naming the line that is damaged.
    """
    there = {(place.layer, place.kind) for place in anatomy}

    def parsed(record: dict[str, Any]) -> Step | None:
        if "finished" in record:
            return None
        step = _checked(Step, attributes(record), path)
        if not (_finite(step.loss) and 0 <= step.ratio <= 1):
            raise ValueError(f"loss {step.loss} at ratio {step.ratio}")
        if (step.layer, step.kind) not in there:
            raise ValueError(f"no layer {step.layer} with a block {step.kind!r}")
        return step

    steps = [step for step in TrajectoryJournal(path, "make the run again").refresh(parsed) if step is not None]
    return tuple(steps if report.search.steps is None else steps[: report.search.steps])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; name a folder that a finished run wrote") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None


def _mapping(path: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); make the run again or restore the file") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path} holds no mapping; make the run again or restore the file")
    return record


def _checked(kind: type[T], value: Any, path: Path, where: str = "") -> T:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        said = "; ".join(f"{'.'.join([where, *map(str, f['loc'])]).strip('.')}: {f['msg']}" for f in faults[:3])
        raise ConfigError(f"{path} is broken: {said}") from None
