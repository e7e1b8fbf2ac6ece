"""The record of a training after the cut: a section of ``report.json``, and a table for the screen."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from rich.table import Table

from multipruner.checkpoint.run_folder import RunFolder
from multipruner.config.recipe import EvaluationSpec
from multipruner.core import __version__
from multipruner.eval import Evaluation, compare

from .settings import LEARN, LORA
from .state import Progress
from .steps import TuneSettings
from .text import TuningText

_POINTS = 20  # of the loss curve in the report
_DENSE_AGAINST_PRUNED = ("perplexity", "tasks", "average", "tasks_markdown", "evaluations")
_PACKAGES = ("torch", "transformers", "peft")


def tuning_record(
    settings: TuneSettings,
    text: TuningText,
    progress: Progress,
    before: Evaluation,
    after: Evaluation,
    *,
    evaluation: EvaluationSpec,
    seconds: Mapping[str, float],
    device: str,
    computed: str,
    teacher: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the section ``tuned`` of the report.

    Args:
        settings, text, progress: how the training went, and on what.
        before, after: the model's evaluations, with the same settings.
        evaluation: those settings.
        seconds: that the stages of this process took.
        device: ``"cpu"`` or ``"cuda"``.
        computed: the type that was computed in.
        teacher: the dense model, where it taught.
    """
    both = compare(before, after).to_json()
    rows = {
        name: {key.replace("dense", "before").replace("pruned", "after"): value for key, value in row.items()}
        for name, row in both["perplexity"].items()
    }
    sequences = progress.step * settings.batch
    return {
        "data": {"name": text.name, "hash": text.hash, "sequences": len(text.train),
                 "held_out_sequences": len(text.held_out), **(text.rows.to_json() if text.rows else {})},
        "teacher": dict(teacher) if teacher else None,
        "loss": "divergence from the dense model" if teacher else "negative log-likelihood of the text",
        "learn": settings.learn,
        "learned": LEARN[settings.learn],
        "steps": progress.step,
        "minutes": settings.minutes,
        "batch": settings.batch,
        "length": settings.length,
        "tokens": sequences * settings.length,
        "passes": sequences / len(text.train),
        "lr": settings.lr,
        "seed": settings.seed,
        "lora": {"rank": settings.rank, "alpha": settings.alpha, "target": "all-linear"}
        if settings.learn == LORA
        else None,
        "losses": _curve(progress.losses),
        "perplexity": rows,
        "evaluation": evaluation.model_dump(mode="json"),
        "seconds": {**seconds, "training": progress.seconds},
        "device": device,
        "computed": computed,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "versions": {"multipruner": __version__, **{name: version(name) for name in _PACKAGES}},
    }  # fmt: skip


def _curve(losses: list[float]) -> list[tuple[int, float]]:
    """Return the mean loss of equal stretches of the training, each with the step that it ends at."""
    size = max(1, -(-len(losses) // _POINTS))
    parts = [losses[begin : begin + size] for begin in range(0, len(losses), size)]
    return [(min((n + 1) * size, len(losses)), sum(part) / len(part)) for n, part in enumerate(parts)]


def tuned_report(run: RunFolder, tuned: Mapping[str, Any]) -> dict[str, Any]:
    """Return the run's report; what was measured of the weights before the training moves below ``tuned.before``."""
    report = {key: value for key, value in run.report.items() if key not in _DENSE_AGAINST_PRUNED}
    before = {key: run.report[key] for key in _DENSE_AGAINST_PRUNED if run.report.get(key)}
    before |= {"tuned": run.report["tuned"]} if "tuned" in run.report else {}
    return {**report, "perplexity": {}, "tasks": {}, "average": None, "tuned": {**tuned, "before": before}}


def tuned_table(tuned: Mapping[str, Any]) -> Table:
    """Return what the training changed, for the screen."""
    table = Table(box=None, pad_edge=False)
    table.add_column("perplexity")
    for heading in ("before", "after", "difference"):
        table.add_column(heading, justify="right")
    for name, row in tuned["perplexity"].items():
        error = "" if row["difference_stderr"] is None else f" ±{row['difference_stderr']:.2f}"
        table.add_row(name, f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['difference']:+.3f}{error}")
    return table
