"""A finished run of ``latency.py --check``: both folders as others open them, timed, against the run's prediction."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from results import Cell
from transformers import AutoModelForCausalLM, PreTrainedModel

from multipruner.config.choices import EXPORTS, loaded
from multipruner.core.errors import ConfigError
from multipruner.core.latency_table import USUAL, Workload
from multipruner.latency.environment import environment_of
from multipruner.latency.timing import alternating, side_by_side_samples
from multipruner.runtimes.served import Served, environment_in, row_for, settings_for

CHECKED = (("workload", "{}"), ("dense, ms", "{:.1f}"), ("pruned, ms", "{:.1f}"), ("ratio", "{:.3f}"),
           ("predicted", "{:.3f}"), ("error", "{:+.1%}"))  # fmt: skip


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


Samples = Callable[[Workload], Mapping[str, Sequence[float]]]
"""Times dense and pruned on a workload, in alternation."""


@contextmanager
def opened(places: Mapping[str, Path], latency: Mapping[str, Any], arguments: argparse.Namespace) -> Iterator[Samples]:
    """Both folders, where the table was measured: by transformers, or exported for another runtime and opened there."""
    runtime, rounds = latency.get("runtime", USUAL), arguments.rounds
    if runtime == USUAL:
        models = {name: as_anyone_opens_it(folder, arguments) for name, folder in places.items()}
        print(", ".join(f"{name} {value}" for name, value in environment_of(models["dense"]).items()))
        yield lambda workload: side_by_side_samples(models, workload, rounds=rounds)
        return
    row, outtype = row_for(runtime, latency["outtype"])
    threads = arguments.threads or torch.get_num_threads()
    print(", ".join(f"{name} {value}" for name, value in environment_in(runtime, outtype, threads).items()))
    workloads = [workload_named(name) for name in latency["phases"]]
    size = json.loads((places["pruned"] / "config.json").read_text())["vocab_size"]
    with TemporaryDirectory() as scratch, ExitStack() as stack:
        served: dict[str, Served] = {}
        for name, folder in places.items():
            path = loaded(EXPORTS[row.export].by)(folder, Path(scratch) / name, outtype=outtype).path
            settings = settings_for(workloads, size, threads)
            served[name] = stack.enter_context(Served.opened(runtime, path, settings))

        def samples(workload: Workload) -> dict[str, list[float]]:
            return alternating({name: lambda m=m: m.sample(workload) for name, m in served.items()}, rounds)

        yield samples


def check(arguments: argparse.Namespace) -> list[list[Cell]]:
    """Time a run's folder and the dense one as they are opened by others, against the report's prediction."""
    phases = predictions(arguments.check)
    report = json.loads((arguments.check / "report.json").read_text())
    asked, by = report["recipe"]["budgets"].get("latency"), report["latency"].get("runtime", USUAL)
    places = {"dense": arguments.dense, "pruned": arguments.check}
    with opened(places, report["latency"], arguments) as samples:
        named = {name: phase for name, phase in phases.items() if name in (arguments.workload or [name])}
        return [row for name, phase in named.items() for row in timed(name, phase, samples, (by, asked), arguments)]


def timed(
    name: str, phase: Mapping[str, float], samples: Samples, said: tuple[str, Any], arguments: argparse.Namespace
) -> Iterator[list[Cell]]:
    """A row for every repetition of one workload."""
    by = f"{said[0]} {version(said[0])}" if said[0] == USUAL else said[0]
    print(
        f"\n{name}, both folders opened by {by}, asked for {said[1]}\n"
        f"{'dense ms':>10}{'pruned ms':>12}{'ratio':>9}{'predicted':>11}{'error':>8}"
    )
    predicted, ratios = phase["predicted_ms"] / phase["predicted_dense_ms"], []
    for _ in range(arguments.repeats):
        found = samples(workload_named(name))
        ratios += [p / d for p, d in zip(found["pruned"], found["dense"], strict=True)]
        dense, pruned = (statistics.median(found[model]) for model in ("dense", "pruned"))
        error = predicted / (pruned / dense) - 1
        print(f"{dense:>10.1f}{pruned:>12.1f}{pruned / dense:>8.3f}x{predicted:>10.3f}x{error:>+8.1%}", flush=True)
        yield [name, dense, pruned, pruned / dense, predicted, error]
    low, middle, high = torch.tensor(ratios).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    print(f"median of {len(ratios)} neighbouring pairs {middle:.3f}x (middle half {low:.3f} to {high:.3f}), "
          f"predicted {predicted:.3f}x, error {predicted / middle - 1:+.1%}")  # fmt: skip
