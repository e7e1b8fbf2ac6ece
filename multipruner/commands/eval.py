"""``python -m multipruner eval FOLDER``: compare models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Parser, add_fields, evaluation_values, log_flags, nested, on_screen

if TYPE_CHECKING:
    from multipruner.console.events import Screen


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(
        prog="multipruner eval",
        description="Compare models on perplexity and lm-eval tasks: standard errors, and paired differences "
        "against the first model on the same examples.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="pruned folders, recipes or Hub ids")
    parser.add_argument("--against", metavar="MODEL", help="the dense model (default: what FOLDER was made from)")
    loading = ("trust_remote_code", "dtype", "compute_dtype", "device")
    add_fields(parser, lambda key: key in loading or key.startswith("evaluation."), {"evaluation.tasks": "--tasks"})
    parser.everyday.clear()  # there are few enough to show them all
    parser.add_argument("--batch-size", dest="evaluation.batch_size", metavar="N|auto", help="as --eval-batch-size")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    log_flags(parser)
    parser.add_argument("--debug", action="store_true")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = vars(make_parser().parse_args(arguments))
    typed.pop("debug", None)
    with on_screen(typed, "eval") as console:
        _judge(typed, console)
    return 0


def _judge(typed: dict[str, Any], console: Screen) -> None:
    from multipruner.jobs.evaluate import judge_folders

    folders, against, output = typed.pop("folders"), typed.pop("against", None), typed.pop("output", None)
    settings = nested(typed)
    evaluation_values(settings)
    judge_folders(folders, against, settings, console=console, output=output)
