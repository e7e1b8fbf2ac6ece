"""The forecast of a run: at its beginning, and alone (``--dry-run``), when nothing is loaded, sampled or measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from rich.console import Console

from multipruner.config.choices import IMPORTANCES
from multipruner.config.recipe import Recipe
from multipruner.console.events import tell
from multipruner.console.plain_lines import spoken
from multipruner.console.say import Say, teller
from multipruner.core.structure import KINDS, BlockKind, LayerSize
from multipruner.engine.objective import STATE_BYTES
from multipruner.engine.precision import TYPES, Precision, choose, name_of, product_rates
from multipruner.engine.prunable import Prunable
from multipruner.eval.scoring import context_length
from multipruner.jobs.reachable import check_reachable, span
from multipruner.jobs.setting import problem_of, task_of
from multipruner.repair.final_norm import TOKENS as GAIN_TOKENS
from multipruner.search import expected_candidates, solve
from multipruner.search.allocation import PARTS, options_of_round
from multipruner.search.limits import alone
from multipruner.sources.dense import device_of
from multipruner.sources.sampled_text import side_by_side, unsampled
from multipruner.storage.cache import cache_folder
from multipruner.storage.hub import hub_answers
from multipruner.storage.memory import free_memory, peak_memory, size_text

from . import work
from .memory import Sizes, grams, peaks
from .needs import Fetch, model_of, sampled_parts, texts_of
from .rates import Rates, measured
from .stand_in import meta_model, stand_in
from .work import Base, Candidate, Shape, Texts, Work

_BYTES_PER_TOKEN = 4
"""Of a text for perplexity, about, before it is tokenised."""
_LIBRARIES = 256 << 20
"""Bytes of what a run imports on its way."""


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        work: by stage, in the order in which they run; the names are those of the report's ``seconds``.
        rates: of this machine.
        memory: bytes of the whole process, by stage.
        disk: bytes by folder that must have room for them.
        budgets: what the budgets mean, one fact a line.
        fetches: what is not on this machine, or is.
    """

    work: Mapping[str, Work]
    rates: Rates
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    budgets: tuple[str, ...]
    fetches: tuple[Fetch, ...] = ()

    @property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        return {stage: self.rates.seconds(one) for stage, one in self.work.items()}

    def to_json(self, actual: Mapping[str, float] | None = None, peak: int | None = None) -> dict[str, Any]:
        """For a report: what was foretold, beside what it came to."""
        actual = actual or {}
        return {
            "stages": {
                stage: {"predicted_seconds": round(self.rates.seconds(one), 3), "seconds": actual.get(stage),
                        "token_layers": one.token_layers}
                for stage, one in self.work.items()
            },
            "memory": {"predicted_bytes": max(self.memory.values(), default=0), "peak_bytes": peak,
                       "by_stage": dict(self.memory)},
            "disk_bytes": dict(self.disk),
            "rates": self.rates.to_json(),
        }  # fmt: skip

    def brief(self) -> list[str]:
        """The first lines of a run."""
        stages = ", ".join(f"{stage} {spoken(seconds)}" for stage, seconds in self.seconds.items() if seconds >= 0.5)
        least = f" ({stages})" if stages else ""
        return [
            f"expected: {spoken(sum(self.seconds.values()))} from here{least}, at most {self._most()} of memory",
            *self.budgets[:1],
        ]

    def _most(self) -> str:
        return size_text(max(self.memory.values(), default=0))

    def lines(self) -> list[str]:
        """All of it."""
        lines = [f"{'stage':<12}{'time':>10}{'token-layers':>16}{'memory':>12}"]
        for stage, seconds in self.seconds.items():
            layers = f"{self.work[stage].token_layers:,.0f}"
            lines.append(f"{stage:<12}{spoken(seconds):>10}{layers:>16}{size_text(self.memory[stage]):>12}")
        lines.append(f"{'in all':<12}{spoken(sum(self.seconds.values())):>10}; at most {self._most()} of memory, "
                     f"{size_text(free_memory())} are free")  # fmt: skip
        lines += [fetch.line() for fetch in self.fetches]
        for folder, needed in self.disk.items():
            lines.append(f"disk: {size_text(needed)} in {folder}, {size_text(_free(Path(folder)))} are free")
        return [*lines, *self.budgets]


def _existing(folder: Path) -> Path:
    """The folder, or the first of its parents that is there."""
    place = folder.absolute()
    return next(one for one in (place, *place.parents) if one.is_dir())


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def shape_of(prunable: Prunable) -> Shape:
    """What of a model its work depends on."""
    inputs: list[int] = []
    weights: list[float] = []
    for size in prunable.dense:
        for kind in KINDS:
            part = alone(size, kind)
            inputs.append(part.query_heads * prunable.head_dim if kind == "attention" else part.channels)
            weights.append(float(prunable.costs.layer.macs_per_token(part)))
    return Shape(tuple(inputs), tuple(weights), prunable.head_weight.shape[1], prunable.costs.head_macs)


def texts_for(recipe: Recipe, prunable: Prunable, unwritten: Callable[[int, int, int], int] | None = None) -> Texts:
    """The sizes of a recipe's texts.

    Args:
        recipe: says how much.
        prunable: the model, for its context.
        unwritten: tells of (sequences, length, seed) how many are still to be sampled; default: all.
    """
    spec, context = recipe.calibration, context_length(prunable.model.config)
    length, judge = min(spec.length, context), recipe.evaluation
    needed = recipe.compensation != "none" or IMPORTANCES[recipe.importance].moments
    calls = []
    for part, sequences, seed in sampled_parts(recipe):
        if part == "calibration" or needed:
            calls.append(sequences if unwritten is None else unwritten(sequences, length, seed))
    costs = prunable.costs
    kv = costs.kv_bytes_per_token(costs.dense) * prunable.head_weight.element_size() // costs.bytes_per_parameter
    found = Texts(
        length, spec.sequences, min(spec.width_sequences, spec.sequences), spec.statistics_sequences * needed,
        tuple(call for call in calls if call), side_by_side(max(1, kv), length),
    )  # fmt: skip
    if "ppl" not in judge.tasks:
        return found
    if judge.text is None and not hub_answers():  # held-out sequences take its place
        return replace(found, evaluated=spec.sequences, evaluated_length=length)
    most = judge.max_tokens or 1 << 40
    if judge.text is not None and (path := Path(judge.text).expanduser()).is_file():
        most = min(most, path.stat().st_size // _BYTES_PER_TOKEN)
    long = min(judge.length, context, most)
    return replace(found, evaluated=max(1, min(most, 300_000) // max(1, long)), evaluated_length=max(2, long))


@dataclass(frozen=True)
class _Search:
    """What a search will measure: candidates by round (of the program), or by dimension (of the path)."""

    base: Base
    left: float
    rounds: tuple[tuple[Candidate, ...], ...] = ()
    counts: Mapping[str, int] | None = None


def _searched(recipe: Recipe, prunable: Prunable) -> _Search:
    costs, dense = prunable.costs, prunable.dense
    if recipe.strategy != "milp":
        problem = problem_of(recipe, prunable)
        left = 1 - problem.ratio * costs.parameters(dense) / costs.backbone_parameters(dense)
        return _Search(Base((left,) * (len(KINDS) * len(dense))), left, counts={**expected_candidates(problem)})
    task = task_of(recipe, prunable)
    kept = {(b, size): _kept(prunable, b[0], b[1], size) for b in task.blocks() for size in task.levels(b)}
    # what a block loses grows with the square of what leaves, more in some blocks than in others: a structure such as
    # is found, some blocks gone, some narrower and some as they were
    table = {
        block: {size: (1 + 7919 * number % 13) * (1 - kept[block, size]) ** 2 for size in task.levels(block)}
        for number, block in enumerate(task.blocks())
    }
    found = solve(table, task.limits, uniform=task.uniform).structure
    place = {(layer, kind): len(KINDS) * layer + KINDS.index(kind) for layer, kind in task.blocks()}
    rounds = tuple(
        tuple(
            Candidate(place[block], _kept(prunable, *block, size))
            for block, sizes in options_of_round(task, found if number else dense, number).items()
            for size in sizes
        )
        for number in range(task.rounds + 1)
    )
    base = Base(tuple(_kept(prunable, n, kind, alone(size, kind)) for n, size in enumerate(found) for kind in KINDS))
    return _Search(base, 1 - costs.backbone_ratio(found), rounds)


def _kept(prunable: Prunable, layer: int, kind: BlockKind, size: LayerSize) -> float:
    """Share of a dense block's work that a size of it has."""
    count = prunable.costs.layer.macs_per_token
    return count(size) / max(1, count(alone(prunable.dense[layer], kind)))


def work_of(recipe: Recipe, prunable: Prunable, texts: Texts) -> tuple[dict[str, Work], _Search]:
    """What every stage of a run computes."""
    shape, searched = shape_of(prunable), _searched(recipe, prunable)
    kl, repairs = recipe.objective == "kl", recipe.compensation == "lstsq"
    scored = repairs and recipe.compensate == "search"
    if searched.counts is None:
        few = 0 if recipe.layout == "uniform" else len({max(2, shape.blocks // part) for part in PARTS})
        search = work.tables(searched.rounds, searched.base, texts, shape, kl=kl, refit=scored, solutions=1 + few)
    else:
        search = work.path(searched.counts, texts, shape, kl=kl, left=searched.left)
    read = "ppl" in recipe.evaluation.tasks and recipe.evaluation.text is not None
    by_stage = {
        "text": work.text(texts, shape, checked=read),
        "statistics": work.statistics(texts, shape, eliminates=recipe.importance == "second-order"),
        "search": search,
    }
    if repairs and recipe.accumulate > 0:
        gain = recipe.final_norm == "refit"
        by_stage["repair"] = work.last_repair(
            texts, shape, left=searched.left, gain=gain, kl=kl, gain_tokens=GAIN_TOKENS
        )
    if texts.evaluated:
        dense, pruned = (work.evaluation(texts.evaluated, texts.evaluated_length, shape, share)
                         for share in (1.0, searched.left))  # fmt: skip
        by_stage["evaluation"] = dense + pruned
    costs = prunable.costs
    left = costs.constant + searched.left * costs.backbone_parameters(costs.dense)
    by_stage["writing"] = work.writing(left * costs.bytes_per_parameter)
    return by_stage, searched


def budgets_of(recipe: Recipe, prunable: Prunable) -> tuple[str, ...]:
    """What a recipe's budgets mean for a model."""
    costs, dense = prunable.costs, prunable.dense
    whole, backbone = costs.parameters(dense), costs.backbone_parameters(dense)
    facts = []
    if recipe.ratio is not None:
        gone = recipe.ratio * whole
        facts.append(
            f"ratio {recipe.ratio:g}: {gone / 1e6:,.1f} of {whole / 1e6:,.1f} million parameters go, "
            f"{gone / backbone:.1%} of the decoder layers' {backbone / 1e6:,.1f} million"
        )
    low, high = span(recipe, prunable)
    facts.append(f"ratios from {ceil(low * 1e5) / 1e5:.5f} to {int(high * 1e3) / 1e3:.3f} can be reached")
    facts += [f"{name}: at most {amount}" for name, amount in recipe.budgets.items()]
    return tuple(facts)


def forecast(
    recipe: Recipe,
    prunable: Prunable,
    output: Path,
    *,
    tokenizer: Any = None,
    measures_on: Prunable | None = None,
    computed: int | None = None,
    fetches: tuple[Fetch, ...] = (),
    fetched: int = 0,
) -> Forecast:
    """What a run will take on this machine, some hundred milliseconds of which are measured now.

    Args:
        recipe: of the run.
        prunable: its model, held in the type that is computed in; on the meta device where it is not loaded.
        output: folder of the run.
        tokenizer: of a loaded model, whose sampled text the cache may hold.
        measures_on: a stand-in that computes, where the model itself does not.
        computed: bytes of a number that is computed with; default: as the model's weights are held.
        fetches: for the lines.
        fetched: bytes that will lie in the cache folder besides.
    """
    costs, model = prunable.costs, prunable.model
    item = prunable.head_weight.element_size() if computed is None else computed
    kept = None if tokenizer is None else lambda n, length, seed: unsampled(model, tokenizer, n, length, seed)
    texts = texts_for(recipe, prunable, kept)
    by_stage, searched = work_of(recipe, prunable, texts)
    clock = prunable if measures_on is None else measures_on
    rates = measured(
        clock, layers=len(prunable.dense), length=texts.length, long=texts.evaluated_length if texts.evaluated else
        texts.length, samples=bool(texts.sampled), place=_existing(output), sequences=recipe.calibration.batch_size,
    )  # fmt: skip
    parameters = costs.parameters(prunable.dense)
    both = costs.bytes_per_parameter if item < costs.bytes_per_parameter else 0  # what is narrowed is kept besides
    kv = costs.kv_bytes_per_token(prunable.dense) * item // costs.bytes_per_parameter
    result = int(by_stage["writing"].disk)
    sizes = Sizes(parameters * (item + both), result, item, kv, prunable.vocab_size, STATE_BYTES,
                  recipe.moments == "memory")  # fmt: skip
    there = 0 if model.device.type != "cpu" else _idle(model, measures_on)
    options = [one for round_ in searched.rounds for one in round_] if recipe.compensate == "search" else []
    found = peaks(by_stage, texts, shape_of(prunable), sizes, searched.base, options)
    cache = fetched + (grams(texts, shape_of(prunable)) if recipe.moments == "disk" else 0)
    disk = {str(output): int(1.05 * result)} | ({str(cache_folder()): cache} if cache else {})
    return Forecast(by_stage, rates, {name: there + size for name, size in found.items()}, disk,
                    budgets_of(recipe, prunable), fetches)  # fmt: skip


def _idle(model: Any, measures_on: Prunable | None) -> int:
    """Bytes that the process has beside the model's weights, and will have once their file is read."""
    import psutil

    loaded = model if measures_on is None else measures_on.model
    weights = sum(weight.numel() * weight.element_size() for weight in loaded.parameters())
    more = 0 if measures_on is None else _LIBRARIES + sum(w.numel() * w.element_size() for w in model.parameters())
    return max(0, psutil.Process().memory_info().rss - weights) + more


def say_forecast(found: Forecast, say: Say, console: Console) -> None:
    """The first lines of a run, and their event."""
    for line in found.brief():
        say(line)
    tell(console, "forecast", **found.to_json())


def foretell(recipe: Recipe, output: Path, console: Console) -> Forecast | None:
    """Say what a run would take, and do nothing of it: no weight is loaded, no text read or sampled.

    Args:
        recipe: of the run.
        output: its folder.
        console: where it is said.

    Returns:
        The forecast; ``None`` where the model has to be here first.

    Raises:
        MultiprunerError: for what a run would refuse before it measures: a model that is none, budgets out of reach.
    """
    say = teller(console)
    recipe.check_bounded()
    folder, fetch = model_of(recipe)
    fetches = (fetch, *texts_of(recipe))
    if folder is None:
        for one in fetches:
            say(one.line())
        say("its size, and so the time of every stage, is known when the model is here")
        return None
    device = device_of(recipe.device)
    model, stored = meta_model(folder, recipe)
    rates = product_rates(device, TYPES)
    computed = choose(recipe.compute_dtype, stored, rates)
    say(Precision(stored, computed, {name: rates[name] for name in dict.fromkeys((name_of(stored), "float32"))}).line())
    prunable = Prunable.of(model, stored)
    check_reachable(recipe, prunable)
    small = Prunable.of(stand_in(model, prunable.spec, computed, device), stored)
    found = forecast(
        recipe, prunable, output, measures_on=small, computed=computed.itemsize, fetches=fetches,
        fetched=0 if fetch.here else fetch.size or 0,
    )  # fmt: skip
    for line in found.lines():
        say(line)
    tell(console, "forecast", **found.to_json())
    return found


def outcome(found: Forecast | None, seconds: Mapping[str, float], device: str) -> dict[str, Any]:
    """What ``report.json`` says of a forecast, once the run has ended."""
    return {} if found is None else {"forecast": found.to_json(seconds, peak_memory(device))}
