"""What the commands share: a parser that fails in one line, nested flags, the evaluation's flags. No torch."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from multipruner.core.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the flags)")


def evaluation_flags(parser: argparse.ArgumentParser, tasks_flag: str, prefix: str) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        tasks_flag, dest=f"{prefix}tasks", metavar="TASKS", help="ppl and/or lm-eval tasks (default ppl)"
    )
    group.add_argument("--include-path", dest=f"{prefix}include_path", metavar="DIR", help="further lm-eval task files")
    group.add_argument("--limit", dest=f"{prefix}limit", type=int, metavar="N", help="documents per task")
    group.add_argument("--eval-batch-size", dest=f"{prefix}batch_size", help="a number or auto")
    group.add_argument("--eval-text", dest=f"{prefix}text", metavar="FILE", help="text for ppl instead of WikiText-2")


def nested(arguments: dict[str, Any]) -> dict[str, Any]:
    """``{"calibration.seed": 1}`` as ``{"calibration": {"seed": 1}}``."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        *parents, last = name.split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return result


def evaluation_values(mapping: dict[str, Any]) -> None:
    """Task lists and batch sizes arrive as text.

    Raises:
        ConfigError: for a list without a task.
    """
    evaluation = mapping.get("evaluation", {})
    if isinstance(evaluation.get("tasks"), str):
        evaluation["tasks"] = [task.strip() for task in evaluation["tasks"].split(",") if task.strip()]
        if not evaluation["tasks"]:
            raise ConfigError("no task is named: give ppl, names of lm-eval tasks, or several with commas between them")
    batch = evaluation.get("batch_size")
    if isinstance(batch, str) and batch.isdigit():
        evaluation["batch_size"] = int(batch)
