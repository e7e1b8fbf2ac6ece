"""Random smaller models of ``latency.py``: built, timed beside dense, and compared with what a table predicts."""

from __future__ import annotations

import argparse
import copy
import random
import statistics
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from results import Cell
from transformers import PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.costs import Costs
from multipruner.core.latency_table import LatencyTable, Workload
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import GONE, Anatomy, Size, Structure
from multipruner.engine.prunable import Prunable
from multipruner.latency.timing import Timing, alternating, compile_blocks, time_side_by_side
from multipruner.runtimes.served import Served, exported, settings_for
from multipruner.storage.journal import Journal


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


Cut = tuple[PreTrainedModel, PruningPlan]
"""A model, and what it keeps of the dense one."""


def smaller_model(model: PreTrainedModel, structure: Structure, anatomy: Anatomy) -> Cut:
    """The dense model cut to a structure."""
    plan = plan_of(model, structure, anatomy)
    return apply_plan(model, plan).eval(), plan


def plan_of(model: PreTrainedModel, structure: Structure, anatomy: Anatomy) -> PruningPlan:
    """What keeps the first units of everything."""
    order, family = Ranking.identity(anatomy), model.config.model_type
    return PruningPlan.from_structure(structure, order, anatomy, model="random", model_type=family)


@dataclass(frozen=True)
class Measured:
    """One structure, timed beside dense: medians of the samples, and the least of them, in milliseconds."""

    workload: str
    number: int
    structure: Structure
    smaller: Timing
    dense: Timing

    def to_json(self) -> dict[str, Any]:
        """A plain mapping."""
        return {**asdict(self), "structure": self.structure.to_json()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Measured:
        """The inverse of :meth:`to_json`."""
        timings = {name: Timing(**record[name]) for name in ("smaller", "dense")}
        return cls(record["workload"], record["number"], Structure.from_json(record["structure"]), **timings)


class Results:
    """What was timed, kept in a file, so that the benchmark goes on where it was stopped.

    Args:
        path: of the file; ``None``: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._journal = None if path is None else Journal(path, "timed structure", "remove the line: it is timed again")
        known = self._journal.refresh(Measured.from_json) if self._journal is not None else []
        self._known = {(one.workload, one.number): one for one in known}

    def find(self, workload: Workload, number: int, structure: Structure) -> Measured | None:
        """What was timed of a structure; ``None`` where it is another one by now."""
        found = self._known.get((workload.name, number))
        return found if found and found.structure == structure else None

    def add(self, measured: Measured) -> None:
        """Keep one."""
        if self._journal is not None:
            self._journal.append([measured.to_json()])


Timed = Callable[[Mapping[str, Cut], Workload, argparse.Namespace], dict[str, Timing]]
"""Times models by name on a workload, in alternation."""


def whole_models(models: Mapping[str, Cut], workload: Workload, arguments: argparse.Namespace) -> dict[str, Timing]:
    """Time models by transformers."""
    if arguments.compile:
        for model, _ in models.values():
            compile_blocks(model)
    return time_side_by_side({name: model for name, (model, _) in models.items()}, workload, rounds=arguments.rounds)


def in_runtime(table: LatencyTable, tokenizer: Any, threads: int) -> Timed:
    """What times models in a table's runtime, exported as its were."""
    runtime, outtype = table.runtime, str(table.environment["dtype"])

    def timed(models: Mapping[str, Cut], workload: Workload, arguments: argparse.Namespace) -> dict[str, Timing]:
        with TemporaryDirectory() as place, ExitStack() as stack:
            takes = {}
            for name, (model, plan) in models.items():
                path = exported(model, plan, tokenizer, Path(place) / name, runtime, outtype)
                settings = settings_for([workload], model.config.vocab_size, threads)
                served = stack.enter_context(Served.opened(runtime, path, settings))
                takes[name] = lambda one=served: one.sample(workload)
            return {name: Timing.of(found) for name, found in alternating(takes, arguments.rounds).items()}

    return timed


def measure(
    prunable: Prunable,
    dense: PreTrainedModel,
    workload: Workload,
    number: int,
    arguments: argparse.Namespace,
    results: Results,
    timed: Timed,
) -> Measured:
    """Build the random structure of this number and time it in alternation with dense."""
    ratio = 0.05 + 0.45 * number / max(arguments.structures - 1, 1)
    structure = random_structure(prunable.costs, ratio, random.Random(number), arguments.width_step)
    known = results.find(workload, number, structure)
    if known:
        return known
    whole = plan_of(dense, prunable.dense, prunable.anatomy)
    models = {"dense": (dense, whole), "smaller": smaller_model(prunable.model, structure, prunable.anatomy)}
    timings = timed(models, workload, arguments)
    measured = Measured(workload.name, number, structure, timings["smaller"], timings["dense"])
    results.add(measured)
    return measured


def compare(
    prunable: Prunable,
    table: LatencyTable,
    workload: Workload,
    arguments: argparse.Namespace,
    results: Results,
    timed: Timed = whole_models,
) -> list[Cell]:
    """Predict and measure the random structures of one workload, and print the errors; they are the result's row."""
    print(f"\n{workload.name}\n{'removed':>8}{'predicted':>12}{'measured':>12}{'error':>9}{'of dense':>10}{'error':>9}")
    errors: dict[str, list[float]] = {"milliseconds": [], "ratio to dense": [], "least milliseconds": []}
    dense, copied = table.milliseconds(prunable.dense, prunable.anatomy, workload.name), copy.deepcopy(prunable.model)
    for number in range(arguments.structures):
        found = measure(prunable, copied, workload, number, arguments, results, timed)
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
