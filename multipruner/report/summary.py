"""What a run has to say at its end: on the screen, and in the model card."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from multipruner.core.costs import reported_as
from multipruner.core.families.tasks import CAUSAL_LM, Task

from .words import tokens_of


def render(report: Mapping[str, Any], folder: Path, tables: RenderableType | None) -> RenderableType:
    """Return the summary that ends a run."""
    before, after = report["parameters"]["before"], report["parameters"]["after"]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("model", Text(report["model"]["description"]))
    facts.add_row(
        "parameters",
        f"{before:,} -> {after:,}  "
        f"(-{report['ratio']:.2%} of all, -{report['backbone_ratio']:.2%} of the decoder layers)",
    )
    rows = [(reported_as(key), pair) for key, pair in report["costs"].items()]
    shown = [(row, pair) for row, pair in rows if row and row.unit == "bytes" and any(pair.values())]
    memory = [f"{row.label} {row.change(*pair.values())}" for row, pair in shown]
    facts.add_row("memory", ", ".join(memory))
    facts.add_row("calibration", Text(f"{report['calibration']['name']}{tokens_of(report['calibration'])}"))
    facts.add_row("time", _seconds(report["seconds"]))
    facts.add_row("folder", Text(str(folder)))
    parts: list[RenderableType] = [facts, Text(""), Text(report["picture"])]
    if tables is not None:
        parts += [Text(""), tables]
    return Panel(Group(*parts), title="multipruner", expand=False)


def _seconds(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    return f"{total:,.0f} s  (" + ", ".join(f"{name} {value:,.0f}" for name, value in seconds.items()) + ")"


def next_commands(folder: Path, *, whole: bool = False, task: Task = CAUSAL_LM) -> str:
    """Return the lines to load, evaluate and share a result with.

    Args:
        folder: of the result.
        whole: whether it is a model of several modalities with its text tower in it.
        task: what the result is for.
    """
    quoted = shlex.quote(str(folder))
    if whole:
        return "\n".join(
            (
                f"load      AutoModelForImageTextToText.from_pretrained({str(folder)!r})",
                f"report    python -m multipruner report {quoted}",
                f"push      python -m multipruner push {quoted} USER/NAME",
            )
        )
    on = "--tasks ppl,piqa,arc_easy" if task.reads_text else "--eval-text FOLDER_OF_PICTURES"
    return "\n".join(
        (
            f"load      multipruner.load({str(folder)!r})",
            f"          {task.auto_class}.from_pretrained({str(folder)!r}, trust_remote_code=True)",
            f"evaluate  python -m multipruner eval {quoted} {on}",
            f"report    python -m multipruner report {quoted}",
            f"push      python -m multipruner push {quoted} USER/NAME",
        )
    )
