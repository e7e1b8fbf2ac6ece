"""A finished run of ``latency.py --check``: both folders as others open them, timed, against the run's prediction."""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from results import Cell
from transformers import AutoModelForCausalLM, PreTrainedModel

from multipruner.core.errors import ConfigError
from multipruner.core.latency_table import Workload
from multipruner.latency.environment import environment_of
from multipruner.latency.timing import side_by_side_samples

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
