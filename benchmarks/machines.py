"""What every effort takes on this machine, and what was foretold: seconds by stage, token-layers, memory, quality.

    python benchmarks/machines.py --work DIR [--model llama] [--ratio 0.2] [--efforts fast,balanced,thorough]
        [--wikitext wiki.test.raw] [--alpaca alpaca.jsonl] [--set KEY=VALUE ...] [--record FILE]

Every effort is a run in a process of its own (its peak memory is its own), with the variables of the environment: the
instructions that a processor has are those that this leaves, so that

    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 python benchmarks/machines.py --work DIR/avx2

shows what a processor with AVX2 alone would take. A run that is there stays (``DIR/EFFORT``); text that is sampled is
kept in ``DIR/cache-EFFORT``, so that no effort gets another one's. ``--wikitext`` is the raw test split; of
``--alpaca`` (JSON lines with a column ``text``) the rows that ``quality.py`` holds out are the second text. Both are
given as times the dense model's perplexity.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import results
from quality_cells import split_alpaca

from multipruner.config.effort import EFFORTS
from multipruner.storage.cache import cache_folder

ISA = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
"""Variables that make a processor behave like an older one."""
COLUMNS = (
    ("effort", "{}"), ("stage", "{}"), ("predicted, s", "{:.1f}"), ("actual, s", "{:.1f}"), ("error, %", "{:+.0f}"),
    ("token-layers", "{:,.0f}"),
)  # fmt: skip
SUMS = (
    ("effort", "{}"), ("predicted, s", "{:.0f}"), ("actual, s", "{:.0f}"), ("error, %", "{:+.0f}"),
    ("memory predicted, GiB", "{:.2f}"), ("peak, GiB", "{:.2f}"), ("removed, %", "{:.2f}"),
    ("WikiText-2, times dense", "{:.3f}"), ("held-out Alpaca, times dense", "{:.3f}"),
)  # fmt: skip
OTHER = "not foretold"
"""The stages that a forecast leaves out, together."""


def run(typed: argparse.Namespace, effort: str, alpaca: Path | None) -> dict[str, Any]:
    """The report of one effort's run, made where it is not there yet."""
    folder, cache = typed.work / effort, typed.work / f"cache-{effort}"
    for part in ("dense", "packages", "rehearsals"):  # what is no work of an effort's own
        if (cache_folder() / part).is_dir() and not (cache / part).exists():
            shutil.copytree(cache_folder() / part, cache / part)
    environment = {**os.environ, "MULTIPRUNER_CACHE": str(cache)}
    command = [sys.executable, "-m", "multipruner"]
    more = [word for setting in typed.set for word in ("--set", setting)]
    text = ["--eval-text", str(typed.wikitext)] if typed.wikitext else []
    if not (folder / "report.json").exists():
        given = ["--model", typed.model, "--ratio", str(typed.ratio), "--effort", effort, "--output", str(folder)]
        log = ["--log-json", str(typed.work / f"{effort}.jsonl")]
        subprocess.run([*command, *given, *text, *more, *log], env=environment, check=True)
    report = json.loads((folder / "report.json").read_text())
    if alpaca is not None and not report.get("evaluations"):
        judged = [*command, "eval", str(folder), "--eval-text", str(alpaca)]
        subprocess.run(judged, env=environment, check=True)
        report = json.loads((folder / "report.json").read_text())
    return report


def stages(effort: str, report: dict[str, Any]) -> list[list[results.Cell]]:
    """A row for every stage."""
    foretold = report["forecast"]["stages"]
    rows: list[list[results.Cell]] = []
    for stage, one in foretold.items():
        expected, actual = one["predicted_seconds"], one["seconds"]
        rows.append([effort, stage, expected, actual, error(expected, actual), one["token_layers"]])
    rest = sum(seconds for stage, seconds in report["seconds"].items() if stage not in foretold)
    return [*rows, [effort, OTHER, None, rest, None, None]]


def error(expected: float, actual: float) -> float | None:
    """By how many per cent an expectation was off."""
    return 100 * (expected / actual - 1) if actual else None


def summed(effort: str, report: dict[str, Any]) -> list[results.Cell]:
    """An effort in one row."""
    found, memory = report["forecast"]["stages"].values(), report["forecast"]["memory"]
    expected, actual = sum(one["predicted_seconds"] for one in found), sum(report["seconds"].values())
    texts = [times_dense(one) for one in (report, *report.get("evaluations", ())[:1])]
    wikitext, alpaca = [*texts, None][:2]
    sizes = [size / 2**30 for size in (memory["predicted_bytes"], memory["peak_bytes"])]
    return [effort, expected, actual, error(expected, actual), *sizes, 100 * report["ratio"], wikitext, alpaca]


def times_dense(scores: dict[str, Any]) -> float | None:
    """The first perplexity of an evaluation, as times the dense model's."""
    row = next(iter(scores["perplexity"].values()), None)
    return row["pruned"] / row["dense"] if row else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--efforts", default=",".join(EFFORTS))
    parser.add_argument("--wikitext", type=Path, default=None)
    parser.add_argument("--alpaca", type=Path, default=None)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    results.flag(parser)
    typed = parser.parse_args(arguments)
    typed.work.mkdir(parents=True, exist_ok=True)
    alpaca = split_alpaca(typed.alpaca, typed.work)[1] if typed.alpaca else None
    isa = {name: os.environ[name] for name in ISA if name in os.environ}
    reports = {effort: run(typed, effort, alpaca) for effort in typed.efforts.split(",")}
    rows = [row for effort, report in reports.items() for row in stages(effort, report)]
    sums = [summed(effort, report) for effort, report in reports.items()]
    machine = results.machine()
    limits = ", ".join(f"{name}={value}" for name, value in isa.items()) or "all its instructions"
    precision = next(iter(reports.values()))["precision"]
    print(f"\n{machine['processor']}, {machine['threads']} threads, {limits}, computing in {precision['computed']}\n")
    print(results.markdown(COLUMNS, rows))
    print(f"\n{results.markdown(SUMS, sums)}")
    results.record(typed.record, "machines", COLUMNS, rows, isa=isa, precision=precision, sums=sums,
                   sum_columns=[list(column) for column in SUMS])  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
