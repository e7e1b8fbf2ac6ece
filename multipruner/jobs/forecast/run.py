"""The forecast of a run: at its beginning, and alone (``--dry-run``), when nothing is loaded, sampled or measured."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from multipruner.config.precedence import trusts
from multipruner.config.recipe import Recipe
from multipruner.console.events import tell
from multipruner.console.plain_lines import spoken
from multipruner.console.say import Say, teller
from multipruner.engine.precision import TYPES, Precision, choose, name_of, product_rates
from multipruner.engine.prunable import Prunable
from multipruner.jobs.narrow import check_asked
from multipruner.jobs.setting import along_in
from multipruner.sources.dense import device_of
from multipruner.sources.quantised.unpack import method_of, plain_of
from multipruner.sources.sampled_text import unsampled
from multipruner.storage.cache import cache_folder
from multipruner.storage.memory import free_memory, peak_memory, size_text

from .bounds import Allowed, Fitting, memory_of
from .count import Searched, Unwritten, budgets_of, shape_of, texts_for, work_of
from .efforts import quicker
from .memory import grams
from .needs import Fetch, model_of, texts_of
from .rates import Rates, measured
from .stand_in import meta_model, stand_in
from .walks import kept_in_cache, layers_on_disk, said, walking, walks_of
from .work import Texts, Work

_LIBRARIES = 256 << 20
"""Bytes of what a run imports on its way."""
_LONG = 600.0
"""Seconds of a run from which on quicker efforts are told that take at most ``_SHORTER`` of them."""
_SHORTER = 0.8


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        work: by stage, in the order in which they run; the names are those of the report's ``seconds``.
        rates: of this machine.
        memory, disk: bytes of the whole process by stage; and by folder those that must have room there.
        budgets: what the budgets mean, one fact a line.
        fetches: what is not on this machine, or is.
        efforts: of a long run, seconds at every quicker effort, by its name.
        allowed: the memory that the run may take, where somebody said so.
    """

    work: Mapping[str, Work]
    rates: Rates
    memory: Mapping[str, int]
    disk: Mapping[str, int]
    budgets: tuple[str, ...]
    fetches: tuple[Fetch, ...] = ()
    efforts: Mapping[str, float] = field(default_factory=dict)
    allowed: Allowed | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        return {stage: self.rates.seconds(one) for stage, one in self.work.items()}

    def to_json(self, actual: Mapping[str, float] | None = None, peak: int | None = None) -> dict[str, Any]:
        """Return for a report: what was foretold, beside what it came to."""
        actual = actual or {}
        return {
            "stages": {
                stage: {"predicted_seconds": round(self.rates.seconds(one), 3), "seconds": actual.get(stage),
                        "token_layers": one.token_layers}
                for stage, one in self.work.items()
            },
            "memory": {"predicted_bytes": max(self.memory.values(), default=0), "peak_bytes": peak,
                       "by_stage": dict(self.memory), **self._allowed()},
            "disk_bytes": dict(self.disk),
            "rates": self.rates.to_json(),
        }  # fmt: skip

    def _allowed(self) -> dict[str, int]:
        return {} if self.allowed is None else {"allowed_bytes": self.allowed.nbytes}

    def beyond(self, peak: int) -> str | None:
        """Return what is said of a run that took more memory than it was allowed; ``None`` of one that did not.

        Args:
            peak: bytes that it had at most.
        """
        if self.allowed is None or peak <= self.allowed.nbytes:
            return None
        return (
            f"note: the run took {size_text(peak)} of memory at most, and {self.allowed.flag} allowed "
            f"{size_text(self.allowed.nbytes)}; {self._most()} were foretold"
        )

    def brief(self) -> list[str]:
        """Return the first lines of a run."""
        stages = ", ".join(f"{stage} {spoken(seconds)}" for stage, seconds in self.seconds.items() if seconds >= 0.5)
        least = f" ({stages})" if stages else ""
        return [
            f"expected: {spoken(sum(self.seconds.values()))} from here{least}, at most {self._most()} of memory",
            *self._quicker(),
            *self._walks(),
            *self.budgets[:1],
        ]

    def _quicker(self) -> list[str]:
        whole = sum(self.seconds.values())
        shorter = {name: seconds for name, seconds in self.efforts.items() if seconds <= _SHORTER * whole}
        said = ", ".join(f"{spoken(seconds)} with --effort {name}" for name, seconds in shorter.items())
        return [f"on less text: {said}"] if said else []

    def _walks(self) -> list[str]:
        walks = sum(work.walks for work in self.work.values())
        return [f"all layers are read {walks:.0f} times, and once more for every block that may go"] if walks else []

    def _most(self) -> str:
        return size_text(max(self.memory.values(), default=0))

    def lines(self) -> list[str]:
        """Return all of it."""
        lines = [f"{'stage':<12}{'time':>10}{'token-layers':>16}{'memory':>12}"]
        for stage, seconds in self.seconds.items():
            layers = f"{self.work[stage].token_layers:,.0f}"
            lines.append(f"{stage:<12}{spoken(seconds):>10}{layers:>16}{size_text(self.memory[stage]):>12}")
        lines.append(f"{'in all':<12}{spoken(sum(self.seconds.values())):>10}; at most {self._most()} of memory, "
                     f"{size_text(free_memory())} are free")  # fmt: skip
        lines += [fetch.line() for fetch in self.fetches]
        for folder, needed in self.disk.items():
            lines.append(f"disk: {size_text(needed)} in {folder}, {size_text(_free(Path(folder)))} are free")
        return [*lines, *self._quicker(), *self._walks(), *self.budgets]


def _existing(folder: Path) -> Path:
    """Return the folder, or the first of its parents that is there."""
    place = folder.absolute()
    return next(one for one in (place, *place.parents) if one.is_dir())


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


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
    on_disk: bool = False,
) -> Forecast:
    """Return what a run will take on this machine, some hundred milliseconds of which are measured now.

    Args:
        recipe: of the run.
        prunable: its model, held in the type that is computed in; on the meta device where it is not loaded.
        output: folder of the run.
        tokenizer: of a loaded model, whose sampled text the cache may hold.
        measures_on: a stand-in that computes, where the model itself does not.
        computed: bytes of a number that is computed with; default: as the model's weights are held.
        fetches: for the lines.
        fetched: bytes that will lie in the cache folder besides.
        on_disk: whether decoder layers stay on disk.
    """
    model = prunable.model
    item = prunable.head_weight.element_size() if computed is None else computed
    kept = unwritten_of(model, tokenizer)
    texts = texts_for(recipe, prunable, kept)
    by_stage, searched = _stages(recipe, prunable, texts, on_disk)
    clock = prunable if measures_on is None else measures_on
    others = quicker(recipe)
    rates = measured(
        clock, layers=prunable.anatomy.layers, length=texts.length, long=texts.evaluated_length if texts.evaluated else
        texts.length, samples=bool(texts.sampled), place=_existing(output), sequences=recipe.calibration.batch_size,
        turns=any(each.estimated for each in (recipe, *others.values())),
    )  # fmt: skip
    there = 0 if model.device.type != "cpu" else idle_of(model, measures_on)
    memory = memory_of(recipe, prunable, texts, by_stage, searched, item, idle=there, on_disk=on_disk)
    result = int(by_stage["writing"].disk)
    long = sum(map(rates.seconds, by_stage.values())) >= _LONG
    told = others if long else {}
    efforts = {name: _seconds(each, prunable, rates, kept, on_disk) for name, each in told.items()}
    cache = fetched + (grams(texts, shape_of(prunable)) if recipe.moments == "disk" else 0)
    cache += kept_in_cache(prunable, result) if on_disk else 0
    disk = {str(output): int(1.05 * result)} | ({str(cache_folder()): cache} if cache else {})
    return Forecast(by_stage, rates, memory, disk, budgets_of(recipe, prunable), fetches, efforts, Allowed.of(recipe))


def _stages(recipe: Recipe, prunable: Prunable, texts: Texts, on_disk: bool) -> tuple[dict[str, Work], Searched]:
    """Return the work of every stage, and of the search candidate by candidate."""
    by_stage, searched = work_of(recipe, prunable, texts)
    if on_disk:
        walks = walks_of(recipe, prunable, texts)
        by_stage |= {stage: by_stage[stage] + Work(walks=n) for stage, n in walks.items() if n}
    return by_stage, searched


def _seconds(recipe: Recipe, prunable: Prunable, rates: Rates, kept: Unwritten | None, on_disk: bool) -> float:
    return sum(map(rates.seconds, _stages(recipe, prunable, texts_for(recipe, prunable, kept), on_disk)[0].values()))


def unwritten_of(model: Any, tokenizer: Any) -> Unwritten | None:
    """Return what tells how many sequences of a loaded model's own are not in the cache yet."""
    return None if tokenizer is None else lambda n, length, seed: unsampled(model, tokenizer, n, length, seed)


def idle_of(model: Any, measures_on: Prunable | None = None) -> int:
    """Return bytes that the process has beside the model's weights, and will have once their file is read."""
    import psutil

    loaded = model if measures_on is None else measures_on.model
    weights = sum(weight.numel() * weight.element_size() for weight in loaded.parameters())
    more = 0 if measures_on is None else _LIBRARIES + sum(w.numel() * w.element_size() for w in model.parameters())
    least = _LIBRARIES if measures_on is None else 0  # of weights in files not all may be in memory
    return max(least, psutil.Process().memory_info().rss - weights) + more


def say_forecast(found: Forecast, say: Say, console: Console) -> None:
    """Say the first lines of a run, and tell their event."""
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
    unpacked = _unpacked(folder, recipe, fetch.here, model, say)
    rates = product_rates(device, TYPES)
    computed = choose(recipe.compute_dtype, stored, rates)
    say(Precision(stored, computed, {name: rates[name] for name in dict.fromkeys((name_of(stored), "float32"))}).line())
    along = along_in(recipe)
    prunable = Prunable.of(model, stored, along)
    check_asked(recipe, prunable)
    layers = layers_on_disk(recipe, prunable, computed)
    small = Prunable.of(stand_in(model, prunable.spec, computed, device), stored, along)
    idle = idle_of(model, small) if device.type == "cpu" else 0
    recipe, layers = Fitting(prunable, computed, idle).fit(recipe, layers, say)
    if layers:
        recipe = walking(recipe)
        say(said(prunable, computed))
    found = forecast(
        recipe, prunable, output, measures_on=small, computed=computed.itemsize, fetches=fetches,
        fetched=unpacked + (0 if fetch.here else fetch.size or 0), on_disk=bool(layers),
    )  # fmt: skip
    for line in found.lines():
        say(line)
    tell(console, "forecast", **found.to_json())
    return found


def _unpacked(folder: Path, recipe: Recipe, here: bool, model: Any, say: Say) -> int:
    """Say it where a model is quantised, and return the bytes that it takes in the cache as the numbers of it."""
    method = method_of(folder / "config.json")
    if method is None:
        return 0
    if here:
        say(plain_of(folder, folder.name, trusts(recipe.trust_remote_code)).note)
    else:
        say(f"note: {folder.name} is quantised ({method}); a run reads it as the numbers that its weights stand for")
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def outcome(found: Forecast | None, seconds: Mapping[str, float], device: str) -> dict[str, Any]:
    """Return what ``report.json`` says of a forecast, once the run has ended."""
    return {} if found is None else {"forecast": found.to_json(seconds, peak_memory(device))}
