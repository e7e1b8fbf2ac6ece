"""Command lines of small runs, on the model of the fixture ``dense``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import multipruner
from multipruner.core.plan import PruningPlan


def arguments(dense: Path, output: Path, *more: str) -> list[str]:
    """A run by the default method; of a flag that is given again, the last one counts."""
    return [
        "--model", str(dense), "--ratio", "0.3", "--calibration", str(dense / "text.txt"), "--sequences", "4",
        "--length", "16", "--moments-sequences", "12", "--channel-group", "8",
        "--eval-text", str(dense / "text.txt"), "--output", str(output), *more,
    ]  # fmt: skip


def paper_arguments(dense: Path, output: Path, *more: str) -> list[str]:
    """A run by the published method."""
    return [
        "--method", "paper", "--model", str(dense), "--ratio", "0.3",
        "--calibration", str(dense / "text.txt"), "--sequences", "4",
        "--width-sequences", "2", "--length", "16", "--channel-group", "8", "--eval-text", str(dense / "text.txt"),
        "--output", str(output), *more,
    ]  # fmt: skip


def finished(output: Path) -> tuple[dict[str, Any], PruningPlan]:
    """A run's report and plan, after a look at whether they are of the model beside them."""
    report = json.loads((output / "report.json").read_text())
    plan = PruningPlan.from_json((output / "plan.json").read_text())
    model = multipruner.load(output)
    assert sum(tensor.numel() for tensor in model.parameters()) == report["parameters"]["after"]
    assert plan.structure.to_json() == report["structure"]
    return report, plan
