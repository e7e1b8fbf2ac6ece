"""How long the exact program takes: synthetic tables of many layers and options, with one and with two budgets.

    python benchmarks/program.py [--layers 80] [--options 40] [--record FILE]

Losses grow convexly as a block shrinks, with noise of ten per cent, so that neighbouring options are near ties.
"""

from __future__ import annotations

import argparse
import random
import sys

from results import Cell, flag, markdown, record

from multipruner.core.structure import GONE, Anatomy, Size
from multipruner.search import Limit, solve

COLUMNS = (("budgets", "{}"), ("seed", "{}"), ("share", "{:g}"), ("seconds", "{:.2f}"), ("gap", "{:.1e}"),
           ("sum of increases", "{:.3f}"))  # fmt: skip


def anatomy_of(layers: int, options: int) -> Anatomy:
    """One query head on every KV head, 64 channels to a step."""
    return Anatomy.uniform(layers, {"attention": (options - 1, 1), "mlp": (64 * (options - 1),)})


def tables(anatomy: Anatomy, options: int, seed: int) -> dict[int, dict[Size, float]]:
    chance = random.Random(seed)
    table: dict[int, dict[Size, float]] = {}
    for block, place in enumerate(anatomy):
        worth, rows = chance.lognormvariate(0, 1), dict[Size, float]()
        for step in range(options):
            size = ((step, 1) if place.kind == "attention" else (64 * step,)) if step else GONE
            missing = 1 - step / (options - 1)
            rows[size] = worth * missing**2 * chance.uniform(0.9, 1.1)
        table[block] = rows
    return table


def weight(block: int, size: Size) -> float:
    return (4.0 * size[0] if len(size) == 2 else 3.0 * size[0] / 64) + 0.5 if size else 0.0


def cache(block: int, size: Size) -> float:
    return float(size[0]) if len(size) == 2 else 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--options", type=int, default=40)
    flag(parser)
    args = parser.parse_args()
    top, anatomy = args.options - 1, anatomy_of(args.layers, args.options)
    dense, heads = args.layers * (7.0 * top + 1), float(args.layers * top)
    rows: list[list[Cell]] = []
    for share in (0.9, 0.8, 0.7, 0.5):
        for seed in range(3):
            table = tables(anatomy, args.options, seed)
            both = (
                Limit.of_blocks("weight", weight, 0.0, share * dense),
                Limit.of_blocks("cache", cache, 0.0, share * heads),
            )
            for name, limits in (("one", both[:1]), ("two", both)):
                found = solve(table, limits, anatomy)
                rows.append([name, seed, share, found.seconds, found.gap, found.predicted])
    print(markdown(COLUMNS, rows))
    record(args.record, "program", COLUMNS, rows, setting={"layers": args.layers, "options": args.options})
    return 0


if __name__ == "__main__":
    sys.exit(main())
