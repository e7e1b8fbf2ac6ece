"""Tokens against blocks, channels and heads: as many parameters gone, with and without a smaller vocabulary.

    python benchmarks/vocabulary.py --text alpaca.jsonl --judge "WikiText-2=wiki.test.raw" --work runs/vocabulary
        [--model llama] [--sizes 24576,12288] [--ratio 0.2] [--record FILE] [FLAGS OF A RUN]

For every size of the vocabulary `multipruner vocabulary` cuts it by the text, then the result is pruned so far that of
the dense model ``--ratio`` of all parameters is gone; without a size, nothing but blocks, channels and heads goes. All
are judged by bits per byte, which do not depend on what a token is, on pieces of 2,000 characters of every text that
`--judge` names, and on the twentieth of the text that no token was counted in. Models that are there already in
``--work`` are judged as they are, so that the same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from results import Cell, flag, markdown, record
from transformers import AutoTokenizer

import multipruner
from multipruner.commands.main import main as command
from multipruner.config.recipe import Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.engine.precision import Precision
from multipruner.jobs.vocabulary.loss import bits_per_byte, pieces_of
from multipruner.jobs.vocabulary.text import read_text
from multipruner.recipes import mapping_for
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

PIECES = 64
HELD_OUT = "held-out text"


class Bench:
    """Models of several vocabularies, and texts to judge them on."""

    def __init__(self, args: argparse.Namespace, flags: list[str]) -> None:
        self.args, self.flags = args, flags
        recipe = Recipe.build(mapping_for(args.model), {"ratio": args.ratio or 0.2})
        model, tokenizer = load_dense(resolve(recipe, print), recipe)
        held_out = read_text(args.text, None, 20_000_000, tokenizer, None).held_out
        named = dict(one.split("=", 1) for one in args.judge)
        rows = {name: Path(path).read_text(encoding="utf-8").split("\n") for name, path in named.items()}
        self.pieces = {name: pieces_of(text, PIECES) for name, text in {HELD_OUT: held_out, **rows}.items()}
        self.parameters, self.rows = size_of(model), len(tokenizer)
        self.dense = judged(model, tokenizer, self.pieces)

    def columns(self) -> list[tuple[str, str]]:
        judged = [(f"bits per byte, {name}", "{:.4f} ({:+.1f} %)") for name in self.pieces]
        return [("tokens", "{:,.0f}"), ("removed by the vocabulary", "{:.2f} %"), ("in all", "{:.2f} %"), *judged]

    def table(self) -> Iterator[list[Cell]]:
        """Yield the rows: vocabularies alone, then with what else goes."""
        yield [self.rows, 0.0, 0.0, *([bits, 0.0] for bits in self.dense.values())]
        sizes = [int(one) for one in self.args.sizes.split(",") if one]
        cut = {size: with_fewer_tokens(self.args.model, self.args.text, size, self.args.work) for size in sizes}
        for folder in cut.values():
            yield self._row(folder, folder)
        for smaller in (None, *cut.values()) if self.args.ratio else ():
            yield self._row(smaller, self._pruned(smaller))

    def _pruned(self, smaller: Path | None) -> Path:
        folder = self.args.work / f"{'dense' if smaller is None else smaller.name}-{self.args.ratio}"
        before = self.parameters if smaller is None else record_of(smaller)["parameters"]["after"]
        ratio = rest_of(self.args.ratio, self.parameters, before)
        if ratio <= 0:
            raise SystemExit(f"{smaller} has less than {1 - self.args.ratio:.0%} of the parameters already")
        model = self.args.model if smaller is None else str(smaller)
        given = ["--model", model, "--ratio", f"{ratio:.6f}", "--output", str(folder), *self.flags]
        if not folder.exists() and command(given):
            raise SystemExit(f"pruning {model} failed")
        return folder

    def _row(self, smaller: Path | None, folder: Path) -> list[Cell]:
        model = multipruner.load(folder, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokens = record_of(smaller)["tokens"]["after"] if smaller else self.rows
        own = record_of(smaller)["ratio"] if smaller else 0.0
        bits = judged(model, tokenizer, self.pieces)
        more = ([found, 100 * (found / self.dense[name] - 1)] for name, found in bits.items())
        return [tokens, 100 * own, 100 * (1 - size_of(model) / self.parameters), *more]


def with_fewer_tokens(model: str, texts: Sequence[str], tokens: int, work: Path) -> Path:
    """A model whose vocabulary is cut by texts, made where it is not there yet."""
    folder = work / f"tokens-{tokens}"
    given = ["--model", model, "--tokens", str(tokens), "--output", str(folder), "--no-measure"]
    if not folder.exists() and command(["vocabulary", *(each for text in texts for each in ("--text", text)), *given]):
        raise SystemExit(f"the vocabulary of {tokens} tokens failed")
    return folder


def rest_of(ratio: float, whole: int, left: int) -> float:
    """The share of what is left that goes, so that a ratio of the whole is gone."""
    return 1 - (1 - ratio) * whole / left


def judged(model: Any, tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Bits per byte of the pieces of every text."""
    with Precision.of(model).computing(model):
        return {
            name: bits_per_byte(model, tokenizer, pieces, lambda done, total: None) for name, pieces in texts.items()
        }


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))


def size_of(model: Any) -> int:
    return sum(each.numel() for each in model.parameters())


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--model", default="llama", help="as for a run (default: llama)")
    found.add_argument("--text", action="append", required=True, help="text that tokens are counted in")
    found.add_argument("--judge", action="append", default=[], metavar="NAME=FILE", help="a text to judge on")
    found.add_argument("--sizes", default="24576,12288", help="vocabularies (default: 24576,12288)")
    found.add_argument(
        "--ratio", type=float, default=0.2, help="share of all parameters that goes; 0: tokens alone (default: 0.2)"
    )
    found.add_argument("--work", type=Path, required=True, help="folder of the models")
    flag(found)
    return found


def main() -> None:
    args, flags = parser().parse_known_args()
    quiet_libraries()
    bench = Bench(args, flags)
    rows = []
    for row in bench.table():
        rows.append(row)
        print(markdown(bench.columns(), [row]).splitlines()[-1], flush=True)
    print(markdown(bench.columns(), rows))
    record(args.record, "vocabulary", bench.columns(), rows, setting={"model": args.model, "ratio": args.ratio})


if __name__ == "__main__":
    main()
