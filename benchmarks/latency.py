"""Predicted against measured latency of random smaller models: the look-up table's sums against whole models.

``python benchmarks/latency.py --table table.json``: for every workload of the table, random structures (blocks,
heads and channels removed, 5 % to 50 % of the parameters) of the real model are built as really smaller models and
timed whole, in alternation with the dense model. Without ``--table``, every workload is measured just before its
structures.

A table of another runtime (``latency --runtime llama.cpp``) is compared with structures that are exported and timed
there, beside the dense model.

``python benchmarks/latency.py --check FOLDER --dense DENSE``: the finished run of a ``--max-latency`` budget and the
dense model's folder, both opened by plain transformers in this process (or exported for the runtime of the run's table,
and opened there), timed in alternation, against what the run's report predicted.

On a GPU, times are device events in the stream (one line that measures a table and checks it; ``--compile`` compiles
every block; captured graphs are not supported):

    python benchmarks/latency.py --model meta-llama/Llama-3.1-8B --device cuda --dtype bfloat16 --results gpu.jsonl

Errors are of the milliseconds, and of the ratio to dense: a machine that is slower today than when the table was
measured shows in the first alone. All models, dense too, are copies in memory: weights mapped from a file often begin
at odd addresses there (safetensors aligns to 8 bytes), which costs decoding on a CPU some per cent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from latency_check import CHECKED, check
from latency_structures import Results, Timed, compare, in_runtime, whole_models
from results import Cell, flag, record
from transformers import PreTrainedModel

from multipruner.config.recipe import Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.core.errors import MultiprunerError
from multipruner.core.latency_table import USUAL, LatencyTable, Workload
from multipruner.engine.prunable import Prunable
from multipruner.latency.bench import measure_table, shapes_of
from multipruner.latency.environment import environment_of
from multipruner.latency.timing import room_for_sizes
from multipruner.recipes import mapping_for
from multipruner.runtimes.served import environment_in
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

WORKLOADS = (Workload("prefill", 1, 128), Workload("prefill", 1, 512), Workload("decode", 1, 256))
COMPARED = (("workload", "{}"), ("structures", "{}"), ("of the milliseconds, median / worst", "{:.1%} / {:.1%}"),
            ("of the ratio to dense, median / worst", "{:.1%} / {:.1%}"))  # fmt: skip


def load_model(arguments: argparse.Namespace) -> tuple[PreTrainedModel, Any]:
    flags = {name: getattr(arguments, name) for name in ("device", "dtype") if getattr(arguments, name)}
    recipe = Recipe.build(mapping_for(arguments.model), flags)
    model, tokenizer = load_dense(resolve(recipe, print), recipe, pictures=True)
    if arguments.attn_implementation:
        model.set_attn_implementation(arguments.attn_implementation)
    return model, tokenizer


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--table", type=Path, help="of `python -m multipruner latency`; default: measured just before")
    parser.add_argument("--workload", action="append", help="only these, such as prefill-b1-t128")
    parser.add_argument("--structures", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=16, help="samples of every model")
    parser.add_argument("--width-step", type=int, default=64, help="channels that leave are multiples of it")
    parser.add_argument("--results", type=Path, help="keeps what was timed: the same command goes on")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--attn-implementation")
    parser.add_argument("--compile", action="store_true", help="as the table's blocks were")
    whole = parser.add_argument_group("a finished run against dense")
    whole.add_argument("--check", type=Path, metavar="FOLDER", help="of a run with --max-latency")
    whole.add_argument("--dense", type=Path, metavar="FOLDER", help="the dense model, as transformers opens it")
    whole.add_argument("--repeats", type=int, default=3, help="times --rounds samples of each (default 3)")
    flag(parser)
    arguments = parser.parse_args()
    if (arguments.check is None) != (arguments.dense is None):
        parser.error("--check and --dense need each other")
    if min(arguments.rounds, arguments.repeats) < 1:
        parser.error("--rounds and --repeats must be at least 1")
    return arguments


def main() -> int:
    arguments = parsed()
    quiet_libraries()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    try:
        if arguments.check is not None:
            record(arguments.record, "latency-check", CHECKED, check(arguments))
        else:
            record(arguments.record, "latency-structures", COMPARED, compare_all(arguments))
    except MultiprunerError as error:
        print(f"latency: {error}", file=sys.stderr)
        return 2
    return 0


def compare_all(arguments: argparse.Namespace) -> list[list[Cell]]:
    """Random structures for every workload."""
    model, tokenizer = load_model(arguments)
    table = LatencyTable.read(arguments.table) if arguments.table else None
    timed: Timed = whole_models
    environment = environment_of(model, compiled=arguments.compile)
    if table is not None and table.runtime != USUAL:
        timed = in_runtime(table, tokenizer, arguments.threads or torch.get_num_threads())
        environment = environment_in(table.runtime, str(table.environment["dtype"]), torch.get_num_threads())
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    workloads = [table.row(name).workload for name in table.workloads] if table else WORKLOADS
    results, rows = Results(arguments.results), []
    with room_for_sizes(arguments.compile):
        for workload in workloads:
            if workload.name in (arguments.workload or [workload.name]):
                measured = table or measure_table(model, [workload], compiled=arguments.compile)
                measured.check_shapes(shapes_of(model))
                warning = measured.warning(environment)
                if warning:
                    print(f"warning: {warning}")
                rows.append(compare(Prunable.of(model), measured, workload, arguments, results, timed))
    return rows


if __name__ == "__main__":
    sys.exit(main())
