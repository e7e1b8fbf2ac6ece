"""Predicted against measured latency of random smaller models: the look-up table's sums against whole models.

``python benchmarks/latency.py --table table.json``: for every workload of the table, random structures (blocks,
heads and channels removed, 5 % to 50 % of the parameters) of the real model are built as really smaller models and
timed whole, in alternation with the dense model. Without ``--table``, every workload is measured just before its
structures. The same command serves a GPU (``--device cuda``).

Errors are of the milliseconds, and of the ratio to dense: a machine that is slower today than when the table was
measured shows in the first alone. All models, dense too, are copies in memory: weights mapped from a file often begin
at odd addresses there (safetensors aligns to 8 bytes), which costs decoding on a CPU some per cent.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from multipruner.costs import Costs
from multipruner.latency import LatencyTable, Workload
from multipruner.measure import measure_table, shapes_of, time_side_by_side
from multipruner.modeling import apply_plan
from multipruner.plan import LayerRanking, PruningPlan, Ranking
from multipruner.prunable import Prunable
from multipruner.quiet import quiet_libraries
from multipruner.recipe import Recipe
from multipruner.recipes import mapping_for
from multipruner.sources import load_dense, resolve
from multipruner.structure import LayerSize, Structure
from multipruner.timing import Timing, compile_blocks, environment_of, room_for_sizes

WORKLOADS = (Workload("prefill", 1, 128), Workload("prefill", 1, 512), Workload("decode", 1, 256))


def random_structure(costs: Costs, ratio: float, rng: random.Random, step: int) -> Structure:
    """Remove random blocks, KV groups and channel groups of a dense model until a ratio of the parameters is gone."""
    structure = costs.dense
    while costs.ratio(structure) < ratio:
        layer = rng.randrange(len(structure))
        size = structure[layer]
        per_kv = costs.dense[layer].query_heads // costs.dense[layer].kv_heads
        draw = rng.random()
        if draw < 0.25:
            smaller = size.without(rng.choice(("attention", "mlp")))
        elif draw < 0.4:
            groups = max(size.kv_heads - 1, 0)
            smaller = LayerSize(groups * per_kv, groups, size.channels)
        else:
            gone = step * rng.randint(1, 4)
            smaller = LayerSize(size.query_heads, size.kv_heads, max(size.channels - gone, 0))
        structure = structure.replace(layer, smaller)
    return structure


def smaller_model(model: PreTrainedModel, structure: Structure, dense: Structure) -> PreTrainedModel:
    """The dense model cut to a structure."""
    order = Ranking(tuple(LayerRanking(tuple(range(s.kv_heads)), tuple(range(s.channels))) for s in dense))
    plan = PruningPlan.from_structure(structure, order, dense, model="random", model_type=model.config.model_type)
    return apply_plan(model, plan).eval()


@dataclass(frozen=True)
class Measured:
    """One structure, timed beside dense: medians of the samples, and the least of them, in milliseconds."""

    workload: str
    number: int
    structure: Structure
    smaller: Timing
    dense: Timing

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "structure": self.structure.to_json()})

    @classmethod
    def from_json(cls, line: str) -> Measured:
        record = json.loads(line)
        timings = {name: Timing(**record[name]) for name in ("smaller", "dense")}
        return cls(record["workload"], record["number"], Structure.from_json(record["structure"]), **timings)


class Results:
    """What was timed, kept in a file, so that the benchmark goes on where it was stopped."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path and path.exists() else []
        self._known = {(m.workload, m.number): m for m in map(Measured.from_json, lines)}

    def find(self, workload: Workload, number: int, structure: Structure) -> Measured | None:
        found = self._known.get((workload.name, number))
        return found if found and found.structure == structure else None

    def add(self, measured: Measured) -> None:
        if self._path:
            with self._path.open("a") as stream:
                stream.write(measured.to_json() + "\n")


def measure(
    prunable: Prunable,
    dense: PreTrainedModel,
    workload: Workload,
    number: int,
    arguments: argparse.Namespace,
    results: Results,
) -> Measured:
    """Build the random structure of this number and time it in alternation with dense."""
    ratio = 0.05 + 0.45 * number / max(arguments.structures - 1, 1)
    structure = random_structure(prunable.costs, ratio, random.Random(number), arguments.width_step)
    known = results.find(workload, number, structure)
    if known:
        return known
    models = {"dense": dense, "smaller": smaller_model(prunable.model, structure, prunable.dense)}
    if arguments.compile:
        for model in models.values():
            compile_blocks(model)
    timings = time_side_by_side(models, workload, rounds=arguments.rounds)
    measured = Measured(workload.name, number, structure, timings["smaller"], timings["dense"])
    results.add(measured)
    return measured


def compare(
    prunable: Prunable, table: LatencyTable, workload: Workload, arguments: argparse.Namespace, results: Results
) -> None:
    """Predict and measure the random structures of one workload, and print the errors."""
    print(f"\n{workload.name}\n{'removed':>8}{'predicted':>12}{'measured':>12}{'error':>9}{'of dense':>10}{'error':>9}")
    errors: dict[str, list[float]] = {"milliseconds": [], "ratio to dense": [], "least milliseconds": []}
    dense, copied = table.milliseconds(prunable.dense, workload.name), copy.deepcopy(prunable.model)
    for number in range(arguments.structures):
        found = measure(prunable, copied, workload, number, arguments, results)
        predicted = table.milliseconds(found.structure, workload.name)
        of_dense = found.smaller.median_ms / found.dense.median_ms
        error, ratio_error = predicted / found.smaller.median_ms - 1, predicted / dense / of_dense - 1
        errors["milliseconds"].append(error)
        errors["ratio to dense"].append(ratio_error)
        errors["least milliseconds"].append(predicted / found.smaller.best_ms - 1)
        print(
            f"{prunable.costs.ratio(found.structure):>8.1%}{predicted:>12.2f}{found.smaller.median_ms:>12.2f}"
            f"{error:>+9.1%}{of_dense:>9.2f}x{ratio_error:>+9.1%}",
            flush=True,
        )
    for name, values in errors.items():
        sizes = [abs(value) for value in values]
        print(
            f"error of {name:<20} median {statistics.median(sizes):.1%}, worst {max(sizes):.1%}, "
            f"mean with sign {statistics.fmean(values):+.1%}, {len(values)} structures"
        )


def load_model(arguments: argparse.Namespace) -> PreTrainedModel:
    flags = {name: getattr(arguments, name) for name in ("device", "dtype") if getattr(arguments, name)}
    recipe = Recipe.build(mapping_for(arguments.model), flags)
    model, _ = load_dense(resolve(recipe, print), recipe)
    if arguments.attn_implementation:
        model.set_attn_implementation(arguments.attn_implementation)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument(
        "--table", type=Path, help="from `python -m multipruner latency`; default: measured just before"
    )
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
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = load_model(arguments)
    environment = environment_of(model, compiled=arguments.compile)
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    table = LatencyTable.read(arguments.table) if arguments.table else None
    workloads = [table.row(name).workload for name in table.workloads] if table else WORKLOADS
    results = Results(arguments.results)
    with room_for_sizes(arguments.compile):
        for workload in workloads:
            if workload.name in (arguments.workload or [workload.name]):
                measured = table or measure_table(model, [workload], compiled=arguments.compile)
                measured.check_shapes(shapes_of(model))
                warning = measured.warning(environment)
                if warning:
                    print(f"warning: {warning}")
                compare(Prunable.of(model), measured, workload, arguments, results)


if __name__ == "__main__":
    main()
