"""How long the exact program takes: synthetic tables of many layers and options, with one and with two budgets.

    python benchmarks/program.py [--layers 80] [--options 40] [--record FILE]

Losses grow convexly as a block shrinks, with noise of ten per cent, so that neighbouring options are near ties.
"""

from __future__ import annotations

import argparse
import random
import sys

from results import Cell, flag, markdown, record

from multipruner.core.structure import BlockKind, LayerSize
from multipruner.search import Limit, solve
from multipruner.search.program import Block

COLUMNS = (("budgets", "{}"), ("seed", "{}"), ("share", "{:g}"), ("seconds", "{:.2f}"), ("gap", "{:.1e}"),
           ("sum of increases", "{:.3f}"))  # fmt: skip


def tables(layers: int, options: int, seed: int) -> dict[Block, dict[LayerSize, float]]:
    chance = random.Random(seed)
    table: dict[Block, dict[LayerSize, float]] = {}
    for layer in range(layers):
        for kind in ("attention", "mlp"):
            worth, rows = chance.lognormvariate(0, 1), {}
            for step in range(options):
                size = LayerSize(step, step, 0) if kind == "attention" else LayerSize(0, 0, 64 * step)
                missing = 1 - step / (options - 1)
                rows[size] = worth * missing**2 * chance.uniform(0.9, 1.1)
            table[layer, kind] = rows
    return table


def weight(layer: int, kind: BlockKind, size: LayerSize) -> float:
    return 4.0 * size.query_heads + 3.0 * size.channels / 64 + (0.5 if size.has(kind) else 0)


def cache(layer: int, kind: BlockKind, size: LayerSize) -> float:
    return float(size.kv_heads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--options", type=int, default=40)
    flag(parser)
    args = parser.parse_args()
    top = args.options - 1
    dense, heads = args.layers * (7.0 * top + 1), float(args.layers * top)
    rows: list[list[Cell]] = []
    for share in (0.9, 0.8, 0.7, 0.5):
        for seed in range(3):
            table = tables(args.layers, args.options, seed)
            both = (
                Limit.of_blocks("weight", weight, 0.0, share * dense),
                Limit.of_blocks("cache", cache, 0.0, share * heads),
            )
            for name, limits in (("one", both[:1]), ("two", both)):
                found = solve(table, limits)
                rows.append([name, seed, share, found.seconds, found.gap, found.predicted])
    print(markdown(COLUMNS, rows))
    record(args.record, "program", COLUMNS, rows, setting={"layers": args.layers, "options": args.options})
    return 0


if __name__ == "__main__":
    sys.exit(main())
