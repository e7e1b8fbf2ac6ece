"""Which dimension to prune: every one alone and together, at equal parameters, with what it loses and what it saves.

    python benchmarks/dimensions.py --work runs/dimensions --alpaca alpaca.jsonl --wikitext wiki.test.raw
        [--model llama] [--ratios 0.1,0.2,0.3] [--rows "blocks;heads"] [--tokens 24576] [--record FILE] [FLAGS OF A RUN]

Every cell is a run folder in ``--work`` with its numbers beside it; what is there stays, so the command can be stopped
and goes on, and two of them with other ``--rows`` share the work. All models are judged by bits per byte, which do not
depend on what a token is: of the raw WikiText-2 test split, and of the last quarter of the Alpaca file, which nothing
was calibrated on. A smaller vocabulary counts its tokens in the rest of that file; the model is then pruned until as
much of the dense one is gone in all. ``dimensions.png`` shows the losses.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from quality_cells import split_alpaca
from results import Cell, flag, markdown, record
from transformers import AutoTokenizer
from vocabulary import judged, record_of, rest_of, size_of, with_fewer_tokens

import multipruner
from multipruner.commands.main import main as command
from multipruner.config.recipe import Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.core.errors import MultiprunerError
from multipruner.jobs.vocabulary.loss import pieces_of
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
    "and RoPE pairs": ["--rope-pair-step", "8"],
    "and hidden size": ["--hidden-size", "auto"],
    "and a smaller vocabulary": [VOCABULARY],
    "all of these": [VOCABULARY, "--value-dim-step", "16", "--rope-pair-step", "8", "--hidden-size", "auto"],
}
"""A row of the table -> the flags of its runs; one of them cuts the vocabulary first."""
PIECES = 32


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
        model, tokenizer = load_dense(resolve(recipe, print), recipe)
        self.parameters, self.dense = size_of(model), judged(model, tokenizer, self.pieces)

    def columns(self) -> list[tuple[str, str]]:
        bits = [(f"bits per byte, {name}", "{:.4f} ({:+.1f} %)") for name in self.pieces]
        return [("asked for", "{:.0%}"), ("what may leave", "{}"), ("removed", "{:.2f} %"), *bits]

    def table(self, names: list[str], ratios: list[float]) -> Iterator[list[Cell]]:
        """Yield a row for the dense model and one for every run."""
        yield [None, "dense", 0.0, *([bits, 0.0] for bits in self.dense.values())]
        for name in names:
            for ratio in ratios:
                yield self._row(name, ratio)

    def _row(self, name: str, ratio: float) -> list[Cell]:
        folder = self.args.work / f"{name.replace(',', '').replace(' ', '-')}-{ratio:g}"
        kept = folder.with_suffix(f"{folder.suffix}.json")
        found = json.loads(kept.read_text()) if kept.exists() else self._made(name, ratio, folder)
        if not found:  # the command said why; it is tried again another time
            return [ratio, f"{name}: cannot be", None, *([None] * len(self.pieces))]
        write_atomically(kept, json.dumps(found, indent=1) + "\n")
        more = ([bits, 100 * (bits / self.dense[text] - 1)] for text, bits in found["bits"].items())
        return [ratio, name, 100 * found["removed"], *more]

    def _made(self, name: str, ratio: float, folder: Path) -> dict[str, Any]:
        """A cell's numbers; nothing where so much cannot leave."""
        model, flags = self.args.model, [flag for flag in ROWS[name] if flag != VOCABULARY]
        if VOCABULARY in ROWS[name]:
            smaller = with_fewer_tokens(model, [str(self.train)], self.args.tokens, self.args.work)
            model = str(smaller)
            ratio = rest_of(ratio, self.parameters, record_of(smaller)["parameters"]["after"])
        given = ["--model", model, "--ratio", f"{ratio:.6f}", "--output", str(folder)]
        if ratio < 0 or (not folder.exists() and command([*given, *flags, *self.flags])):
            return {}
        pruned = multipruner.load(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        return {"removed": 1 - size_of(pruned) / self.parameters, "bits": judged(pruned, tokenizer, self.pieces)}


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
    flag(found)
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
