"""The tables of ``gpu.py``: stages, runs as a whole, and speed-ups, measured beside what was foretold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from results import Cell
from transformers import AutoConfig, AutoModelForCausalLM

from multipruner.engine.prunable import Prunable

Columns = Sequence[tuple[str, str]]
STAGES: Columns = (
    ("run", "{}"), ("stage", "{}"), ("predicted, min", "{:.2f}"), ("actual, min", "{:.2f}"), ("error, %", "{:+.0f}"),
    ("token-layers", "{:,.0f}"), ("of the product rate, %", "{:.1f}"),
)  # fmt: skip
"""Token-layers are those that were foretold, of the search those that were computed. Their products alone are a share
of the rate: what a stage multiplies besides (the head, moments, factorisations) lowers it."""
RUNS: Columns = (
    ("run", "{}"), ("predicted, min", "{:.2f}"), ("actual, min", "{:.2f}"), ("memory predicted, GiB", "{:.2f}"),
    ("device peak, GiB", "{:.2f}"), ("device reserved, GiB", "{:.2f}"), ("host, its own, GiB", "{:.2f}"),
    ("host in all, GiB", "{:.2f}"), ("removed, %", "{:.2f}"), ("products, 10^9/s", "{:,.0f}"),
)  # fmt: skip
"""Memory that is predicted is that of the device which computes. Predicted minutes are those of the stages that have a
forecast, actual ones those of all."""
SPEEDS: Columns = (
    ("run", "{}"), ("workload", "{}"), ("dense, ms", "{:.2f}"), ("pruned, ms", "{:.2f}"), ("speed-up", "{:.3f}"),
    ("predicted", "{:.3f}"), ("error", "{:+.1%}"),
)  # fmt: skip
GIB = 2**30


def layer_flops(folder: Path) -> float:
    """Return floating-point operations of one token in the mean decoder layer: two for each of its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    costs = Prunable.of(model).costs
    return 2 * costs.backbone_parameters(costs.dense) / costs.anatomy.layers


class Tables:
    """Rows of finished runs."""

    def __init__(self) -> None:
        self.stages: list[list[Cell]] = []
        self.runs: list[list[Cell]] = []
        self.speeds: list[list[Cell]] = []

    def add(self, run: str, found: Mapping[str, Any], rate: float, flops: float) -> None:
        """Add the stages of a run, and the run as a whole.

        Args:
            run: its name.
            found: report and memory.
            rate: 10^9 floating-point operations per second of large products.
            flops: of a token-layer.
        """
        report, memory = found["report"], found["memory"]
        foretold, work = report["forecast"]["stages"], report["search"]["work_of_this_process"].values()
        computed = {"search": sum(one["token_blocks"] / one["per_layer"] for one in work)}
        for stage, actual in report["seconds"].items():
            told = foretold.get(stage, {})
            expected = told.get("predicted_seconds")
            layers = computed.get(stage) or told.get("token_layers") or None
            share = 100 * layers * flops / (actual * rate * 1e9) if layers and actual else None
            off = 100 * (expected / actual - 1) if expected is not None and actual else None
            minutes = None if expected is None else expected / 60
            self.stages.append([run, stage, minutes, actual / 60, off, layers, share])
        expected, actual = (sum(one["predicted_seconds"] for one in foretold.values()), sum(report["seconds"].values()))
        told = report["forecast"]["memory"]["predicted_bytes"]
        device = [_gib(memory[name]) for name in ("allocated", "reserved")]
        host = [_gib(memory[name]) for name in ("own", "all")]
        removed = 100 * report["ratio"]
        self.runs.append([run, expected / 60, actual / 60, told / GIB, *device, *host, removed, rate])

    def add_speeds(self, run: str, found: Mapping[str, Mapping[str, float]]) -> None:
        """Add a run's workloads: measured and predicted milliseconds of both models, by name."""
        for workload, row in found.items():
            measured = row["dense"] / row["pruned"]
            predicted = row["predicted_dense"] / row["predicted_pruned"]
            error = predicted / measured - 1
            self.speeds.append([run, workload, row["dense"], row["pruned"], measured, predicted, error])

    def all(self) -> list[tuple[Columns, list[list[Cell]]]]:
        """Return columns and rows of all tables."""
        return [(STAGES, self.stages), (RUNS, self.runs), (SPEEDS, self.speeds)]

    def others(self) -> dict[str, list[list[Any]]]:
        """Return what is recorded beside the stages."""
        return {"runs": self.runs, "run_columns": [list(column) for column in RUNS],
                "speeds": self.speeds, "speed_columns": [list(column) for column in SPEEDS]}  # fmt: skip


def _gib(size: int | None) -> float | None:
    return None if size is None else size / GIB
