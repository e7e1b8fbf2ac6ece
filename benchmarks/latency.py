"""Predicted against measured latency of random smaller models: the look-up table's sums against whole models.

``python benchmarks/latency.py --table table.json``: for every workload of the table, random structures (blocks,
heads and channels removed, 5 % to 50 % of the parameters) of the real model are built as really smaller models and
timed whole, in alternation with the dense model. Without ``--table``, every workload is measured just before its
structures.

``python benchmarks/latency.py --check FOLDER --dense DENSE``: the finished run of a ``--max-latency`` budget and the
dense model's folder, both opened by plain transformers in this process, timed in alternation, against what the run's
report predicted.

On a GPU, times are device events in the stream (one line that measures a table and checks it; ``--compile`` compiles
every block; captured graphs are not supported):

    python benchmarks/latency.py --model meta-llama/Llama-3.1-8B --device cuda --dtype bfloat16 --results gpu.jsonl

Errors are of the milliseconds, and of the ratio to dense: a machine that is slower today than when the table was
measured shows in the first alone. All models, dense too, are copies in memory: weights mapped from a file often begin
at odd addresses there (safetensors aligns to 8 bytes), which costs decoding on a CPU some per cent.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from results import Cell, flag, record
from transformers import AutoModelForCausalLM, PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.config.recipe import Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.core.costs import Costs
from multipruner.core.errors import ConfigError, MultiprunerError
from multipruner.core.latency_table import LatencyTable, Workload
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import GONE, Anatomy, Size, Structure
from multipruner.engine.prunable import Prunable
from multipruner.latency.bench import measure_table, shapes_of
from multipruner.latency.environment import environment_of
from multipruner.latency.timing import Timing, compile_blocks, room_for_sizes, side_by_side_samples, time_side_by_side
from multipruner.recipes import mapping_for
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

WORKLOADS = (Workload("prefill", 1, 128), Workload("prefill", 1, 512), Workload("decode", 1, 256))
COMPARED = (("workload", "{}"), ("structures", "{}"), ("of the milliseconds, median / worst", "{:.1%} / {:.1%}"),
            ("of the ratio to dense, median / worst", "{:.1%} / {:.1%}"))  # fmt: skip
CHECKED = (("workload", "{}"), ("dense, ms", "{:.1f}"), ("pruned, ms", "{:.1f}"), ("ratio", "{:.3f}"),
           ("predicted", "{:.3f}"), ("error", "{:+.1%}"))  # fmt: skip


def random_structure(costs: Costs, ratio: float, rng: random.Random, step: int) -> Structure:
    """Remove random blocks, KV groups and channel groups of a dense model until a ratio of the parameters is gone."""
    anatomy, structure = costs.anatomy, costs.dense
    while costs.ratio(structure) < ratio:
        layer, draw = rng.randrange(anatomy.layers), rng.random()
        kind = rng.choice(("attention", "mlp")) if draw < 0.25 else "attention" if draw < 0.4 else "mlp"
        block = anatomy.at(layer, kind)
        if draw < 0.25:
            smaller = GONE
        else:
            smaller = _without(structure[block], 1 if kind == "attention" else step * rng.randint(1, 4))
        structure = structure.replace(block, smaller)
    return structure


def _without(size: Size, units: int) -> Size:
    """A block's size with fewer units of its first axis."""
    return (size[0] - units, *size[1:]) if size and size[0] > units else GONE


def smaller_model(model: PreTrainedModel, structure: Structure, anatomy: Anatomy) -> PreTrainedModel:
    """The dense model cut to a structure."""
    order, family = Ranking.identity(anatomy), model.config.model_type
    plan = PruningPlan.from_structure(structure, order, anatomy, model="random", model_type=family)
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
    models = {"dense": dense, "smaller": smaller_model(prunable.model, structure, prunable.anatomy)}
    if arguments.compile:
        for model in models.values():
            compile_blocks(model)
    timings = time_side_by_side(models, workload, rounds=arguments.rounds)
    measured = Measured(workload.name, number, structure, timings["smaller"], timings["dense"])
    results.add(measured)
    return measured


def compare(
    prunable: Prunable, table: LatencyTable, workload: Workload, arguments: argparse.Namespace, results: Results
) -> list[Cell]:
    """Predict and measure the random structures of one workload, and print the errors; they are the result's row."""
    print(f"\n{workload.name}\n{'removed':>8}{'predicted':>12}{'measured':>12}{'error':>9}{'of dense':>10}{'error':>9}")
    errors: dict[str, list[float]] = {"milliseconds": [], "ratio to dense": [], "least milliseconds": []}
    dense, copied = table.milliseconds(prunable.dense, prunable.anatomy, workload.name), copy.deepcopy(prunable.model)
    for number in range(arguments.structures):
        found = measure(prunable, copied, workload, number, arguments, results)
        predicted = table.milliseconds(found.structure, prunable.anatomy, workload.name)
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
    ends = {name: [statistics.median(map(abs, values)), max(map(abs, values))] for name, values in errors.items()}
    return [workload.name, arguments.structures, ends["milliseconds"], ends["ratio to dense"]]


def workload_named(name: str) -> Workload:
    """The inverse of a workload's name."""
    match = re.fullmatch(r"(prefill|decode)-b(\d+)-t(\d+)", name)
    if match is None:
        raise ConfigError(f"{name!r} is no workload, such as prefill-b1-t512")
    return Workload("prefill" if match[1] == "prefill" else "decode", int(match[2]), int(match[3]))


def predictions(folder: Path) -> dict[str, Any]:
    """What a finished run's report says of its latency, by workload."""
    report = folder / "report.json"
    phases = json.loads(report.read_text()).get("latency", {}).get("phases") if report.is_file() else None
    if not phases:
        raise ConfigError(
            f"{folder} is no finished run with a latency budget; make one with: python -m multipruner --model MODEL "
            f"--max-latency 0.7x --latency-table table.json --output {folder}"
        )
    return phases


def as_anyone_opens_it(folder: Path, arguments: argparse.Namespace) -> PreTrainedModel:
    """By transformers alone, with the code that the folder brings along."""
    how = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    how["dtype"] = arguments.dtype or "auto"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **how)
    return model.to(arguments.device or "cpu").eval()


def check(arguments: argparse.Namespace) -> list[list[Cell]]:
    """Time a run's folder and the dense one as they are opened by others, against the report's prediction."""
    phases = predictions(arguments.check)
    asked = json.loads((arguments.check / "report.json").read_text())["recipe"]["budgets"].get("latency")
    places, rows = {"dense": arguments.dense, "pruned": arguments.check}, []
    models = {name: as_anyone_opens_it(folder, arguments) for name, folder in places.items()}
    environment = environment_of(models["dense"])
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    for name, phase in phases.items():
        if name not in (arguments.workload or [name]):
            continue
        print(
            f"\n{name}, both folders opened by transformers {transformers.__version__}, asked for {asked}\n"
            f"{'dense ms':>10}{'pruned ms':>12}{'ratio':>9}{'predicted':>11}{'error':>8}"
        )
        predicted, ratios = phase["predicted_ms"] / phase["predicted_dense_ms"], []
        for _ in range(arguments.repeats):
            samples = side_by_side_samples(models, workload_named(name), rounds=arguments.rounds)
            ratios += [p / d for p, d in zip(samples["pruned"], samples["dense"], strict=True)]
            dense, pruned = (statistics.median(samples[model]) for model in ("dense", "pruned"))
            error = predicted / (pruned / dense) - 1
            print(f"{dense:>10.1f}{pruned:>12.1f}{pruned / dense:>8.3f}x{predicted:>10.3f}x{error:>+8.1%}", flush=True)
            rows.append([name, dense, pruned, pruned / dense, predicted, error])
        low, middle, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
        print(f"median of {len(ratios)} neighbouring pairs {middle:.3f}x (middle half {low:.3f} to {high:.3f}), "
              f"predicted {predicted:.3f}x, error {predicted / middle - 1:+.1%}")  # fmt: skip
    return rows


def load_model(arguments: argparse.Namespace) -> PreTrainedModel:
    flags = {name: getattr(arguments, name) for name in ("device", "dtype") if getattr(arguments, name)}
    recipe = Recipe.build(mapping_for(arguments.model), flags)
    model, _ = load_dense(resolve(recipe, print), recipe)
    if arguments.attn_implementation:
        model.set_attn_implementation(arguments.attn_implementation)
    return model


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
    model = load_model(arguments)
    environment = environment_of(model, compiled=arguments.compile)
    print(", ".join(f"{name} {value}" for name, value in environment.items()))
    table = LatencyTable.read(arguments.table) if arguments.table else None
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
                rows.append(compare(Prunable.of(model), measured, workload, arguments, results))
    return rows


if __name__ == "__main__":
    sys.exit(main())
