"""What benchmarks share: recipe fields as flags, a setting for all plans, cells on disk, clocks that survive a kill."""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import results
from rich.console import Console

from multipruner.commands.base import Parser, add_fields, nested
from multipruner.commands.recipe_flags import model_flags, recipe_of
from multipruner.config.recipe import EvaluationSpec
from multipruner.config.spellings import FOUND_BY
from multipruner.core.plan import PruningPlan
from multipruner.eval import evaluate
from multipruner.jobs.finish import cut_model
from multipruner.jobs.last_repair import repair_all
from multipruner.jobs.prepare import prepare
from multipruner.jobs.setting import Found, Setting
from multipruner.storage.files import write_atomically

_ITS_OWN = ("ratio", "method", "refine", "layout", "latency_table", "workload")
"""Keys of a recipe that the benchmark says itself."""


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Flags of the model, of what judges candidates, of calibration, and of the benchmark itself."""
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--work", type=Path, required=True, help="a JSON file per cell; a cell that is there stays")
    parser.add_argument("--wikitext", type=Path, default=None, help="raw test split, for perplexity")
    parser.add_argument("--max-tokens", type=int, default=24 * 2048, help="of that split")
    results.flag(parser)
    model_flags(parser)
    add_fields(parser, lambda key: key not in _ITS_OWN and not key.startswith(("budgets.", "evaluation.")))
    parser.everyday.clear()
    return parser


def set_flag(parser: argparse.ArgumentParser) -> None:
    """The flag for any recipe field, as often as wanted; :func:`settings_given` reads it."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="a recipe field, such as calibration.sequences=6 or objective=nll")  # fmt: skip


def settings_given(pairs: Sequence[str]) -> dict[str, Any]:
    """What ``--set`` says, as a mapping for :meth:`Recipe.build`; values are JSON, or else text."""
    return nested({key: _json_or_text(value) for key, _, value in (one.partition("=") for one in pairs)})


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def settings_of(typed: dict[str, Any], ratios: Sequence[float]) -> dict[float, Setting]:
    """The same model, calibration, ranking and repair for every ratio."""
    typed = {"model": "llama", **typed}
    recipe = recipe_of(typed, {FOUND_BY: "program", "ratio": ratios[0]})
    setting = prepare(recipe, Console(), {})
    return {ratio: replace(setting, recipe=recipe.model_copy(update={"ratio": ratio})) for ratio in ratios}


class Cell:
    """One result on disk, with the time that all attempts at it took together.

    Args:
        path: of its JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._clock = path, path.with_suffix(".clock")
        self._before = json.loads(self._clock.read_text()) if self._clock.exists() else [0.0, 0.0]
        self._began, self._written, self._work = time.perf_counter(), 0.0, lambda: 0.0

    @property
    def done(self) -> dict[str, Any] | None:
        """The result, if it is there."""
        return json.loads(self.path.read_text()) if self.path.exists() else None

    def start(self, work: Callable[[], float]) -> None:
        """Begin to count seconds, and what ``work`` says: token-layers so far."""
        at_start = work()
        self._work = lambda: work() - at_start
        self._began = time.perf_counter()

    def spent(self) -> list[float]:
        """Seconds and token-layers of this and all earlier attempts."""
        return [self._before[0] + time.perf_counter() - self._began, self._before[1] + self._work()]

    def tick(self) -> None:
        """Write the clock now and then."""
        if time.perf_counter() - self._written > 5:
            _write(self._clock, self.spent())
            self._written = time.perf_counter()

    def write(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a result."""
        _write(self.path, dict(record))
        self._clock.unlink(missing_ok=True)
        return dict(record)


def _write(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def judged(setting: Setting, found: Found, wikitext: Path | None, most: int) -> dict[str, Any]:
    """What the finished model is like: its ratio and its perplexity, repaired as the recipe says."""
    prunable = setting.prunable
    result: dict[str, Any] = {"ratio": prunable.costs.ratio(found.structure), "structure": found.structure.to_json()}
    if wikitext is None:
        return result
    if setting.repairs_all:
        found = repair_all(setting, found, print, lambda done, total: None)
    plan = PruningPlan.from_structure(
        found.structure, setting.ranking, prunable.anatomy, model="dense", model_type=prunable.spec.model_type
    )
    pruned = cut_model(setting, plan, found.outputs, found.gain)
    result["wikitext2"] = perplexity(pruned, setting, wikitext, most)
    del pruned
    gc.collect()
    return result


def perplexity(model: Any, setting: Setting, wikitext: Path, most: int) -> dict[str, float | None]:
    """Of WikiText-2, sequences of 2,048 tokens, with the standard error of its logarithm."""
    spec = EvaluationSpec(text=str(wikitext), length=2048, max_tokens=most)
    found = next(iter(evaluate(model, setting.tokenizer, spec).perplexities.values()))
    return {"value": found.value, "nll": found.nll, "stderr": found.stderr}


def number(row: Mapping[str, Any]) -> float | None:
    """A perplexity, or nothing."""
    return row["wikitext2"]["value"] if "wikitext2" in row else None


def write_table(path: Path, table: str) -> None:
    """A Markdown table on the screen and in a file."""
    path.write_text(f"{table}\n")
    print(table)
