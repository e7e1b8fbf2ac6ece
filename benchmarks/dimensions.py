"""Which dimension to prune: every one alone and together, at equal parameters, with what it loses and what it saves.

    python benchmarks/dimensions.py --work runs/dimensions --alpaca alpaca.jsonl --wikitext wiki.test.raw
        [--model llama] [--ratios 0.1,0.2,0.3] [--rows "blocks,channels"] [--tokens 24576] [--time] [--record FILE]
        [FLAGS OF A RUN]

Every cell is a run folder in ``--work`` with its numbers beside it; what is there stays, so the command can be stopped
and goes on, and two of them with other ``--rows`` share the work. All models are judged by bits per byte, which do not
depend on what a token is: of the raw WikiText-2 test split, and of the last quarter of the Alpaca file, which nothing
was calibrated on. A smaller vocabulary counts its tokens in the rest of that file; the model is then pruned until as
much of the dense one is gone in all.

``--time`` adds what a prompt of 512 tokens takes beside the dense model, both opened by transformers and timed in
alternation; it needs a quiet machine, and therefore a command of its own after the others. ``dimensions.png`` shows
the losses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from latency_check import as_anyone_opens_it
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from quality_cells import split_alpaca
from results import Cell, flag, markdown, record
from transformers import AutoTokenizer

from multipruner.commands.main import main as command
from multipruner.config.recipe import Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.core.errors import MultiprunerError
from multipruner.core.latency_table import Workload
from multipruner.engine.precision import Precision
from multipruner.jobs.vocabulary.loss import bits_per_byte, pieces_of
from multipruner.latency.timing import side_by_side_samples
from multipruner.recipes import mapping_for
from multipruner.report.figures.drawing import GRID, SERIES, drawing, percent
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve
from multipruner.storage.files import write_atomically

VOCABULARY = "vocabulary"
ROWS: dict[str, list[str]] = {
    "blocks": ["--dimensions", "blocks"],
    "MLP channels": ["--dimensions", "mlp"],
    "heads": ["--dimensions", "heads"],
    "channels and heads": ["--dimensions", "mlp,heads"],
    "blocks, channels, heads": [],
    "and value dimensions": ["--value-dim-step", "16"],
    "and hidden size": ["--hidden-size", "auto"],
    "and a smaller vocabulary": [VOCABULARY],
    "all of these": [VOCABULARY, "--value-dim-step", "16", "--hidden-size", "auto"],
}
"""A row of the table -> the flags of its runs; one of them cuts the vocabulary first."""
PIECES = 32
PROMPT = Workload("prefill", 1, 512)
MIDDLE = 0.5
"""The quantile that is told of several samples."""


class Bench:
    """Models of several dimensions, and texts to judge them on."""

    def __init__(self, args: argparse.Namespace, flags: list[str]) -> None:
        self.args, self.flags = args, flags
        self.train, held_out = split_alpaca(args.alpaca, args.work)
        texts = {"WikiText-2": args.wikitext, "held-out Alpaca": held_out}
        self.pieces = {
            name: pieces_of(path.read_text(encoding="utf-8").split("\n"), PIECES) for name, path in texts.items()
        }
        recipe = Recipe.build(mapping_for(args.model), {"ratio": 0.2})
        self.model, tokenizer = load_dense(resolve(recipe, print), recipe)
        self.parameters, self.dense = _size(self.model), self._judged(self.model, tokenizer)

    def columns(self) -> list[tuple[str, str]]:
        judged = [(f"bits per byte, {name}", "{:.4f} ({:+.1f} %)") for name in self.pieces]
        timed = [(f"milliseconds, {PROMPT.name}", "{:.1f} ({:.2f}x)")] if self.args.time else []
        return [("asked for", "{:.0%}"), ("what may leave", "{}"), ("removed", "{:.2f} %"), *judged, *timed]

    def table(self, names: list[str], ratios: list[float]) -> Iterator[list[Cell]]:
        """Yield a row for the dense model and one for every run."""
        blank: list[Cell] = [None] if self.args.time else []
        yield [None, "dense", 0.0, *([bits, 0.0] for bits in self.dense.values()), *blank]
        for name in names:
            for ratio in ratios:
                yield self._row(name, ratio)

    def _row(self, name: str, ratio: float) -> list[Cell]:
        folder = self.args.work / f"{name.replace(',', '').replace(' ', '-')}-{ratio:g}"
        kept = folder.with_suffix(f"{folder.suffix}.json")
        found = json.loads(kept.read_text()) if kept.exists() else self._made(name, ratio, folder)
        if self.args.time and "removed" in found and "milliseconds" not in found:
            found["milliseconds"] = self._timed(folder)
        write_atomically(kept, json.dumps(found, indent=1) + "\n")
        if "removed" not in found:
            return [ratio, f"{name}: out of reach", *([None] * (len(self.columns()) - 2))]
        more: list[Cell] = [[bits, 100 * (bits / self.dense[text] - 1)] for text, bits in found["bits"].items()]
        timed: list[Cell] = [found["milliseconds"]] if self.args.time else []
        return [ratio, name, 100 * found["removed"], *more, *timed]

    def _made(self, name: str, ratio: float, folder: Path) -> dict[str, Any]:
        """A cell's numbers; nothing where so much cannot leave."""
        model, flags = self.args.model, list(ROWS[name])
        if VOCABULARY in flags:
            smaller = self._smaller()
            before = json.loads((smaller / "vocabulary.json").read_text())["parameters"]["after"]
            model, flags = str(smaller), [flag for flag in flags if flag != VOCABULARY]
            ratio = 1 - (1 - ratio) * self.parameters / before
            if ratio < 0:
                return {}
        given = ["--model", model, "--ratio", f"{ratio:.6f}", "--output", str(folder)]
        if not folder.exists() and command([*given, *flags, *self.flags]):
            return {}
        pruned = as_anyone_opens_it(folder, self.args)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return {"removed": 1 - _size(pruned) / self.parameters, "bits": self._judged(pruned, tokenizer)}

    def _smaller(self) -> Path:
        """The dense model with fewer tokens."""
        folder = self.args.work / f"tokens-{self.args.tokens}"
        given = ["--model", self.args.model, "--tokens", str(self.args.tokens), "--output", str(folder)]
        if not folder.exists() and command(["vocabulary", "--text", str(self.train), *given, "--no-measure"]):
            raise SystemExit(f"the vocabulary of {self.args.tokens} tokens failed")
        return folder

    def _timed(self, folder: Path) -> list[float]:
        """Milliseconds of a prompt, and over those of the dense model beside it."""
        models = {"dense": self.model, "pruned": as_anyone_opens_it(folder, self.args)}
        samples = side_by_side_samples(models, PROMPT, rounds=self.args.rounds)
        dense, pruned = (torch.tensor(samples[name]) for name in models)
        return [float(pruned.quantile(MIDDLE)), float((pruned / dense).quantile(MIDDLE))]

    def _judged(self, model: Any, tokenizer: Any) -> dict[str, float]:
        with Precision.of(model).computing(model):
            return {
                name: bits_per_byte(model, tokenizer, pieces, lambda done, total: None)
                for name, pieces in self.pieces.items()
            }


def _size(model: Any) -> int:
    return sum(each.numel() for each in model.parameters())


def figure(path: Path, rows: list[list[Cell]], texts: list[str]) -> None:
    """Bits per byte more than the dense model's against what is removed: a line per row, a panel per text."""

    def panel(axes: Axes, column: int) -> None:
        lines: dict[str, list[tuple[float, float]]] = {}
        for _, name, removed, *more in rows:
            if isinstance(more[column], list):
                lines.setdefault(str(name), []).append((removed / 100, more[column][1] / 100))  # type: ignore[operator, index]
        dense = lines.pop("dense")
        for number, (name, points) in enumerate(lines.items()):
            axes.plot(*zip(*dense, *points, strict=True), marker="o", color=SERIES[number % len(SERIES)],
                      linestyle="-" if number < len(SERIES) else "--", markersize=4, label=name)  # fmt: skip
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(percent))
        axes.set_xlabel("parameters removed")
        axes.set_ylabel("more bits per byte")
        axes.grid(axis="y", color=GRID)

    def paint(width: float) -> Figure:
        sheet = Figure(figsize=(width, 0.5 * width), layout="constrained")
        panels = sheet.subplots(1, len(texts))
        for column, (axes, text) in enumerate(zip(panels, texts, strict=True)):
            panel(axes, column)
            axes.set_title(text)
        panels[-1].legend(fontsize=7)
        return sheet

    picture = drawing(paint, name=path.stem, title="Cost of every dimension", caption="", alt="", columns=(), rows=())
    write_atomically(path, picture.png)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--work", type=Path, required=True, help="folder of the models and their numbers")
    found.add_argument("--alpaca", type=Path, required=True, help="JSON lines with a column 'text'")
    found.add_argument("--wikitext", type=Path, required=True, help="raw test split")
    found.add_argument("--model", default="llama", help="as for a run (default: llama)")
    found.add_argument("--ratios", default="0.1,0.2,0.3", help="shares of all parameters (default: 0.1,0.2,0.3)")
    found.add_argument("--rows", default=";".join(ROWS), help="which rows, with semicolons between (default: all)")
    found.add_argument("--tokens", type=int, default=24_576, help="of the smaller vocabulary (default: 24576)")
    found.add_argument("--time", action="store_true", help="time every model beside the dense one")
    found.add_argument("--rounds", type=int, default=16, help="samples of every model (default: 16)")
    flag(found)
    found.set_defaults(attn_implementation=None, dtype=None, device=None)
    return found


def main() -> int:
    args, flags = parser().parse_known_args()
    names = args.rows.split(";")
    if unknown := [name for name in names if name not in ROWS]:
        print(f"dimensions: no row {unknown[0]!r}; there are: {'; '.join(ROWS)}", file=sys.stderr)
        return 2
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        bench, rows = Bench(args, flags), []
        for row in bench.table(names, [float(one) for one in args.ratios.split(",")]):
            rows.append(row)
            print(markdown(bench.columns(), [row]).splitlines()[-1], flush=True)
    except MultiprunerError as error:
        print(f"dimensions: {error}", file=sys.stderr)
        return 2
    print(markdown(bench.columns(), rows))
    figure(args.work / "dimensions.png", rows, list(bench.pieces))
    setting = {"model": args.model, "tokens": args.tokens, "flags": flags, "pieces": PIECES}
    record(args.record, "dimensions", bench.columns(), rows, setting=setting)
    return 0


if __name__ == "__main__":
    sys.exit(main())
