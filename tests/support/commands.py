"""Command lines of small runs, on the model of the fixture ``dense``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import multipruner
from multipruner.commands.main import main
from multipruner.core.plan import PruningPlan


def arguments(dense: Path, output: Path, *more: str) -> list[str]:
    """A run by the default method, its tables measured; of a flag that is given again, the last one counts."""
    return [
        "--model", str(dense), "--effort", "balanced", "--ratio", "0.3",
        "--calibration", str(dense / "text.txt"), "--sequences", "4", "--length", "16",
        "--moments-sequences", "12", "--channel-group", "8",
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


def assert_refused_in_a_line(asked: list[str], expected: str, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command ends with one line that says so much, and leaves nothing."""
    assert main(asked) == 2
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1
    assert not output.exists()


def bred(asked: list[str], output: Path) -> tuple[dict[str, Any], PruningPlan]:
    """What a small search with the flags of a run ends with."""
    assert main(["search", *asked, "--population", "4", "--generations", "1", "--seeds", "program"]) == 0
    return finished(output)


def assert_range_is_named(asked: list[str], flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A ratio of 0.3 is out of reach with a flag, the refusal says what is not, and that is so."""
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert f"with {flag} ratios from 0." in said and "in reach" in said, said
    least, most = (float(said.split(word)[1].split()[0]) for word in ("ratios from ", " to about "))
    assert 0 < least < most < 0.3
    assert main([f"{most}" if word == "0.3" else word for word in (*asked, "--dry-run")]) == 0
