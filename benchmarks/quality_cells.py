"""Cells of ``quality.py``: which settings there are, and one pruned model of them, judged, kept as JSON."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plans import Cell, settings_given
from rich.console import Console

import multipruner
from multipruner.config.recipe import EvaluationSpec, Recipe
from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.eval import evaluate
from multipruner.recipes import mapping_for
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

ALPACA = {"source": "alpaca"}
"""Stands for the first part of the Alpaca file."""
METHODS: dict[str, dict[str, Any]] = {
    "program": {"method": "program"},
    "paper": {"method": "paper", "calibration": ALPACA},
    "blocks only": {"method": "paper", "shares": "100:0:0", "calibration": ALPACA},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "last norm as it was": {"final_norm": "keep"},
    "no repair of what adds up": {"accumulate": 0},
    "no repair": {"repair": "none"},
    "magnitude order": {"importance": "magnitude"},
    "magnitude order, no repair": {"importance": "magnitude", "repair": "none"},
    "nll instead of kl": {"objective": "nll"},
    "tables once": {"rounds": 0},
}
LAST = {"method", "accumulate", "final_norm"}
"""Settings that the search does not see: what differs in these alone has the same losses."""
SHORT = 256
"""Tokens per sequence of the ablation with shorter ones."""


def split_alpaca(source: Path, work: Path) -> tuple[Path, Path]:
    """The file in two: for calibration, and for nothing but the final numbers."""
    rows = [row for row in source.read_text(encoding="utf-8").split("\n") if row.strip()]
    cut = 3 * len(rows) // 4
    train, held_out = work / "alpaca-calibration.jsonl", work / "alpaca-held-out.txt"
    train.write_text("\n".join(rows[:cut]) + "\n", encoding="utf-8")
    held_out.write_text("\n\n".join(json.loads(row)["text"] for row in rows[cut:]), encoding="utf-8")
    return train, held_out


class Bench:
    """Cells of one command.

    Args:
        args: of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.typed = args, settings_given(args.set)
        self.train, self.held_out = split_alpaca(args.alpaca, args.work)
        # what every cell depends on beside its own settings
        self.common = {"model": args.model, "texts": [_digest(path) for path in (args.alpaca, args.wikitext)]}
        self.seeds = [int(seed) for seed in args.seeds.split(",")]
        self.ratios = [float(ratio) for ratio in args.ratios.split(",")]

    def given(self, settings: Mapping[str, Any], ratio: float, seed: int) -> dict[str, Any]:
        """What a cell's recipe says beyond the model's: later settings win."""
        calibration = {"source": self.args.calibration, **self.typed.get("calibration", {}), "seed": seed}
        calibration |= settings.get("calibration", {})
        if calibration["source"] == ALPACA["source"]:
            calibration["source"] = str(self.train)
        return {**self.typed, **settings, "ratio": ratio, "calibration": calibration}

    def recipe(self, settings: Mapping[str, Any], ratio: float, seed: int) -> Recipe:
        """A cell's recipe."""
        # the run's own evaluation is not what is reported here: keep it short
        short = {"evaluation": {"text": str(self.held_out), "max_tokens": 1024, "length": 512}}
        return Recipe.build(mapping_for(self.args.model), self.given(settings, ratio, seed), short)

    def judge(self, model: Any, tokenizer: Any, tasks: bool) -> dict[str, Any]:
        """Perplexities and tasks of one model."""
        args = self.args

        def text(path: Path, length: int, most: int) -> dict[str, Any]:
            spec = EvaluationSpec(text=str(path), length=length, max_tokens=most)
            return next(iter(evaluate(model, tokenizer, spec).perplexities.values())).to_json()

        result: dict[str, Any] = {
            "wikitext2": text(args.wikitext, 2048, 24 * 2048),
            "alpaca": text(self.held_out, 512, 16 * 512),
        }
        if tasks and args.tasks:
            spec = EvaluationSpec(tasks=tuple(args.tasks.split(",")), include_path=args.include_path, limit=args.limit)
            done = evaluate(model, tokenizer, spec)
            result["tasks"] = {name: task.to_json() for name, task in done.tasks.items()}
        return result

    def tasks(self, asked: bool) -> list[Any]:
        """What a cell's tasks depend on; nothing where none are asked for."""
        return [sorted(self.args.tasks.split(",")), self.args.limit] if asked and self.args.tasks else []

    def dense(self) -> dict[str, Any]:
        """The dense model, judged."""
        asked = {**self.common, "recipe": self.typed, "tasks": self.tasks(True)}
        kept = Cell(self.args.work / "dense.json")
        if kept.done is not None and _of(kept.done, asked):
            return kept.done
        recipe = Recipe.build(mapping_for(self.args.model), self.typed)
        model, tokenizer = load_dense(resolve(recipe, print), recipe)
        result = self.judge(model, tokenizer, tasks=True) | {"name": "dense", "ratio": 0.0, "asked": asked}
        result["parameters"] = sum(weight.numel() for weight in model.parameters())
        return kept.write(result)

    def _stem(self, name: str, seed: int) -> str:
        stem = f"{name}-{self.args.calibration}-{seed}"
        for letter, other in ((" ", "_"), (",", ""), (":", "-")):
            stem = stem.replace(letter, other)
        return stem

    def folder(self, name: str, settings: Mapping[str, Any], ratio: float, seed: int) -> Path:
        """Where a cell's run lies: one folder for all ratios of a setting, as losses that were measured serve them all.

        Not so the published procedure with its shares: the beginning of its path to a large ratio is mostly blocks, and
        not what it finds for a small one.
        """
        if settings.get("method") == "paper" and "shares" not in settings:
            return self.args.work / self._stem(f"{name}-{ratio:g}", seed)
        own_losses = name in METHODS or not settings.keys() <= LAST
        return self.args.work / self._stem(name if own_losses else "program", seed)

    def cell(
        self, name: str, settings: Mapping[str, Any], ratio: float, seed: int, tasks: bool = False
    ) -> dict[str, Any]:
        """One pruned model, judged, on the tasks only if asked; from disk when it is there."""
        stem = self._stem(f"{name}-{ratio:g}", seed)
        kept = Cell(self.args.work / f"{stem}.json")
        asked = {**self.common, "recipe": self.given(settings, ratio, seed), "tasks": self.tasks(tasks)}
        if kept.done is not None and _of(kept.done, asked):
            return kept.done
        own = {"name": name, "target": ratio, "seed": seed, "asked": asked}
        folder = self.folder(name, settings, ratio, seed)
        try:
            run = multipruner.prune(
                self.recipe(settings, ratio, seed), output=folder, console=Console(), overwrite=True
            )
        except InfeasibleError as error:
            return kept.write({**own, "impossible": str(error)})
        result = self.judge(run.model, run.tokenizer, tasks) | own
        result |= {"ratio": run.report["ratio"], "parameters": run.report["parameters"]["after"]}
        scored = {"moments_tokens": run.report["search"]["moments_tokens"]}
        result |= {"seconds": run.report["seconds"], "calibration": {**run.report["calibration"], **scored}}
        del run
        gc.collect()
        return kept.write(result)

    def ablations(self) -> dict[str, dict[str, Any]]:
        """All rows with one setting changed.

        Raises:
            ConfigError: when a row differs from the method ``program`` in other fields than its own.
        """
        ratio, seed = self.ratios[min(1, len(self.ratios) - 1)], self.seeds[0]
        default, train = self.recipe(METHODS["program"], ratio, seed), str(self.train)
        text, rows = default.calibration, dict(ABLATIONS)
        if (times := text.length // SHORT) > 1:
            counts = {key: times * getattr(text, key) for key in ("sequences", "moments_sequences")}
            rows[f"{SHORT}-token sequences"] = {"calibration": {"length": SHORT, **counts}}
        other = (
            ("Alpaca instead of own text", train) if text.source == "self" else ("own text instead of Alpaca", "self")
        )
        rows[other[0]] = {"calibration": {"source": other[1]}}
        rows["Alpaca and own text, 1:1"] = {"calibration": {"source": f"{train}+self"}}
        for name, settings in rows.items():
            changed = differing(default, self.recipe(settings, ratio, seed))
            if changed != set(flat(settings)):
                raise ConfigError(
                    f"the row {name!r} should change {', '.join(flat(settings))} alone, but changes "
                    f"{', '.join(sorted(changed)) or 'nothing'}: leave out --ablations or what --set says of it"
                )
        return rows

    def sizes(self, tokens: int) -> tuple[str, dict[str, Any]]:
        """Name and settings of the cell whose moments are of so many tokens; the default's own, where it is that."""
        text = self.recipe(METHODS["program"], self.args.size_ratio, self.seeds[0]).calibration
        count = max(1, tokens // text.length)
        if count == text.moments_sequences:
            return "program", METHODS["program"]
        scoring = max(1, min(text.sequences, text.sequences * count // text.moments_sequences))
        settings = {"moments_sequences": count, "sequences": scoring}
        return f"{tokens} tokens", {"method": "program", "calibration": settings}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _of(cell: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether a cell is what is asked for.

    It may have tasks that nobody asks for. One of an earlier version of this script, which said less, is not.
    """
    kept = cell.get("asked", {})
    return kept == asked or (not asked["tasks"] and {**kept, "tasks": []} == asked)


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted names."""
    result: dict[str, Any] = {}
    for key, value in mapping.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return result


def differing(one: Recipe, other: Recipe) -> set[str]:
    """Dotted names of the fields in which two recipes differ."""
    first, second = flat(one.model_dump(mode="json")), flat(other.model_dump(mode="json"))
    return {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
