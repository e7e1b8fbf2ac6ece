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
import sys
from pathlib import Path

import torch
from plans import set_flag
from quality_cells import METHODS, Bench
from quality_report import Tables, heading, quality_figure, sizes_figure
from results import flag, record

from multipruner.console.quiet import quiet_libraries
from multipruner.core.errors import MultiprunerError


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
