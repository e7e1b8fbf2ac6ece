"""What is kept at which ratio: this project's method against the paper's procedure and against removing blocks only.

    python benchmarks/quality.py --work runs/quality --alpaca alpaca.jsonl --wikitext wiki.test.raw
        [--tasks piqa,arc_easy --include-path TASKS --limit 200] [--ratios 0.1,0.2] [--seeds 0,1,2]
        [--ablations] [--sizes 4096,32768,131072,262144] [--set rounds=3] [--record FILE]

Every cell is one run folder and one JSON file in ``--work``; a cell that is there is not computed again (unless it is
of other settings or tasks), so the command can be interrupted and goes on. ``table.md`` is written after every cell;
``quality.png`` (perplexity against the ratio) and ``sizes.png`` (against calibration tokens) when all theirs are there.
The method ``program`` is calibrated on text sampled from the model (``--calibration self``, no data at all) or on the
first three quarters of the Alpaca file, which the published procedure and removing blocks only always see. Perplexities
are of raw WikiText-2 test (sequences of 2,048 tokens) and of the last quarter of the Alpaca file, which no calibration
sees. Nothing here chooses a setting.

``--ablations`` adds rows in which one setting differs from the method ``program`` (two, where the name says so), at the
second ratio and the first seed; that it is so is checked against the recipes before anything runs.

``--sizes`` varies, for the method ``program`` at ``--size-ratio`` and the first seed, the tokens that the moments are
of: order and repair, the last repair included, come from them. The sequences that score structures, and decide whether
the last repair is taken, shrink in proportion (never below one) and never grow beyond the default. The length of the
sequences stays. Text is drawn anew for every size: a smaller one need not be a part of a larger one.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from plans import Cell, set_flag, settings_given
from quality_report import Tables, heading, quality_figure, sizes_figure
from results import flag, record
from rich.console import Console

import multipruner
from multipruner.config.recipe import EvaluationSpec, Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.core.errors import ConfigError, InfeasibleError, MultiprunerError
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


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--alpaca", type=Path, required=True, help="JSON lines with a column 'text'")
    parser.add_argument("--wikitext", type=Path, required=True, help="raw test split")
    parser.add_argument("--calibration", choices=("self", "alpaca"), default="self")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4")
    parser.add_argument("--seeds", default="0,1,2", help="of the calibration text, for the methods")
    parser.add_argument("--methods", default=",".join(METHODS), help="may be empty")
    parser.add_argument("--ablations", action="store_true", help="also one setting changed at a time")
    parser.add_argument("--sizes", default="", help="calibration tokens, such as 4096,32768,131072,262144")
    parser.add_argument("--size-ratio", type=float, default=0.2)
    parser.add_argument("--tasks", default="", help="lm-eval tasks, for the methods' first seed")
    parser.add_argument("--include-path", default=None)
    parser.add_argument("--limit", type=int, default=None)
    set_flag(parser)
    flag(parser)
    return parser.parse_args()


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


def fill(bench: Bench) -> None:
    """All cells that were asked for, their tables and figures."""
    args = bench.args
    changed = bench.ablations() if args.ablations else {}
    dense = bench.dense()
    tables = Tables(args.work / "table.md", dense)
    for ratio in bench.ratios:
        for name in filter(None, args.methods.split(",")):
            for seed in bench.seeds:
                cell = bench.cell(name, METHODS[name], ratio, seed, tasks=seed == bench.seeds[0])
                tables.add("Methods", name, f"{ratio:g}", cell)
    quality_figure(args.work / "quality.png", dense, tables.groups("Methods"))
    if changed:
        ratio = bench.ratios[min(1, len(bench.ratios) - 1)]
        for name, settings in {"program": METHODS["program"], **changed}.items():
            tables.add(
                f"One setting changed, at {ratio:.0%}", name, "", bench.cell(name, settings, ratio, bench.seeds[0])
            )
    section = f"Tokens of the moments, at {args.size_ratio:.0%}"
    for tokens in (int(size) for size in args.sizes.split(",") if size):
        cell = bench.cell(*bench.sizes(tokens), args.size_ratio, bench.seeds[0])
        text = {"moments_tokens": tokens, **cell.get("calibration", {})}
        label = f"{text['moments_tokens']:,}" + (f" (scored on {text['tokens']:,})" if "tokens" in text else "")
        tables.add(section, label, str(tokens), {**cell, "calibration": text})
    sizes_figure(args.work / "sizes.png", dense, tables.groups(section))
    print(tables.text())
    columns = [("section", "{}"), *((name.strip(), "{}") for name in heading(dense)[0][1:-1].split("|"))]
    record(args.record, "quality", columns, tables.rows(), cells=tables.cells())


def main() -> int:
    args = arguments()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    try:
        fill(Bench(args))
    except MultiprunerError as error:
        print(f"quality: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
