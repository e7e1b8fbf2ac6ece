"""The forecast of a run: at its beginning, and alone (``--dry-run``), when nothing is loaded, sampled or measured."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from multipruner.config.recipe import Recipe
from multipruner.console.events import tell
from multipruner.console.plain_lines import spoken
from multipruner.console.say import Say, teller
from multipruner.engine.objective import STATE_BYTES
from multipruner.engine.precision import TYPES, Precision, choose, name_of, product_rates
from multipruner.engine.prunable import Prunable
from multipruner.jobs.reachable import check_reachable
from multipruner.jobs.setting import along_in
from multipruner.sources.dense import device_of
from multipruner.sources.sampled_text import unsampled
from multipruner.storage.cache import cache_folder
from multipruner.storage.memory import free_memory, peak_memory, size_text

from .count import budgets_of, shape_of, texts_for, work_of
from .memory import Sizes, grams, peaks
from .needs import Fetch, model_of, texts_of
from .rates import Rates, measured
from .stand_in import meta_model, stand_in
from .walks import layers_on_disk, said, walking, walks_of
from .work import Work

_LAYERS = 2
"""Layers from disk that are in memory: one, and what it is made of, or leaves of it."""
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
        """Return for a report: what was foretold, beside what it came to."""
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
        """Return the first lines of a run."""
        stages = ", ".join(f"{stage} {spoken(seconds)}" for stage, seconds in self.seconds.items() if seconds >= 0.5)
        least = f" ({stages})" if stages else ""
        return [
            f"expected: {spoken(sum(self.seconds.values()))} from here{least}, at most {self._most()} of memory",
            *self._walks(),
            *self.budgets[:1],
        ]

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
        return [*lines, *self._walks(), *self.budgets]


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
    costs, model = prunable.costs, prunable.model
    item = prunable.head_weight.element_size() if computed is None else computed
    kept = None if tokenizer is None else lambda n, length, seed: unsampled(model, tokenizer, n, length, seed)
    texts = texts_for(recipe, prunable, kept)
    shape, (by_stage, searched) = shape_of(prunable), work_of(recipe, prunable, texts)
    if on_disk:
        by_stage |= {stage: by_stage[stage] + Work(walks=n) for stage, n in walks_of(recipe, texts).items() if n}
    clock = prunable if measures_on is None else measures_on
    rates = measured(
        clock, layers=prunable.anatomy.layers, length=texts.length, long=texts.evaluated_length if texts.evaluated else
        texts.length, samples=bool(texts.sampled), place=_existing(output), sequences=recipe.calibration.batch_size,
    )  # fmt: skip
    parameters = costs.parameters(prunable.dense)
    both = costs.bytes_per_parameter if item < costs.bytes_per_parameter else 0  # what is narrowed is kept besides
    kv = costs.kv_bytes_per_token(prunable.dense) * item // costs.bytes_per_parameter
    result = int(by_stage["writing"].disk)
    held = costs.constant + _LAYERS * costs.backbone_parameters(prunable.dense) // prunable.anatomy.layers
    weights = held * item if on_disk else parameters * (item + both)
    sizes = Sizes(weights, result, item, kv, len(prunable.head_weight), STATE_BYTES, recipe.moments == "memory",
                  on_disk)  # fmt: skip
    there = 0 if model.device.type != "cpu" else _idle(model, measures_on)
    options = [one for round_ in searched.rounds for one in round_] if recipe.repair_stage == "search" else []
    found = peaks(by_stage, texts, shape, sizes, searched.base, options)
    cache = fetched + (grams(texts, shape) if recipe.moments == "disk" else 0) + 2 * result * on_disk
    disk = {str(output): int(1.05 * result)} | ({str(cache_folder()): cache} if cache else {})
    return Forecast(by_stage, rates, {name: there + size for name, size in found.items()}, disk,
                    budgets_of(recipe, prunable), fetches)  # fmt: skip


def _idle(model: Any, measures_on: Prunable | None) -> int:
    """Return bytes that the process has beside the model's weights, and will have once their file is read."""
    import psutil

    loaded = model if measures_on is None else measures_on.model
    weights = sum(weight.numel() * weight.element_size() for weight in loaded.parameters())
    more = 0 if measures_on is None else _LIBRARIES + sum(w.numel() * w.element_size() for w in model.parameters())
    return max(0, psutil.Process().memory_info().rss - weights) + more


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
    rates = product_rates(device, TYPES)
    computed = choose(recipe.compute_dtype, stored, rates)
    say(Precision(stored, computed, {name: rates[name] for name in dict.fromkeys((name_of(stored), "float32"))}).line())
    along = along_in(recipe)
    prunable = Prunable.of(model, stored, along)
    check_reachable(recipe, prunable)
    layers = layers_on_disk(recipe, prunable, computed)
    if layers:
        recipe = walking(recipe)
        say(said(prunable, computed))
    small = Prunable.of(stand_in(model, prunable.spec, computed, device), stored, along)
    found = forecast(
        recipe, prunable, output, measures_on=small, computed=computed.itemsize, fetches=fetches,
        fetched=0 if fetch.here else fetch.size or 0, on_disk=bool(layers),
    )  # fmt: skip
    for line in found.lines():
        say(line)
    tell(console, "forecast", **found.to_json())
    return found


def outcome(found: Forecast | None, seconds: Mapping[str, float], device: str) -> dict[str, Any]:
    """Return what ``report.json`` says of a forecast, once the run has ended."""
    return {} if found is None else {"forecast": found.to_json(seconds, peak_memory(device))}
