"""``python -m multipruner eval FOLDER``: compare models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.eval.suite.table import SUITES

from .base import Parser, add_fields, evaluation_values, log_flags, nested, on_screen

if TYPE_CHECKING:
    from multipruner.console.events import Screen


_HELP = f"""\
Compare models on perplexity, lm-eval tasks and suites of measures, always with the dense model on the same examples:
paired differences, with their standard errors or 95 % intervals.

examples
  python -m multipruner eval runs/llama-0.2 --tasks ppl,piqa,arc_easy --limit 200
  python -m multipruner eval runs/llama-0.2 --suite quick
  python -m multipruner eval runs/a runs/b runs/c --suite standard --output results.json

Which suite? Perplexity and multiple choice hide damage: a model may keep both and write in loops. Each suite looks at
bits per byte and at the loss by position, at the distance from the dense model on prose, code and its own text, at what
it writes, and at long contexts (cache, needles):
{chr(10).join(f"  {name:<9} {suite.about}" for name, suite in SUITES.items())}
lm-eval tasks of a suite whose documents cannot be had are left out, and said; --tasks takes their place.

What the dense model scored is kept (by weights, task and versions), so that the next plan costs its own run only."""


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(
        prog="multipruner eval",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="pruned folders, recipes or Hub ids")
    parser.add_argument("--against", metavar="MODEL", help="the dense model (default: what FOLDER was made from)")
    loading = ("trust_remote_code", "dtype", "compute_dtype", "device")
    add_fields(parser, lambda key: key in loading or key.startswith("evaluation."), {"evaluation.tasks": "--tasks"})
    parser.everyday.clear()  # there are few enough to show them all
    parser.add_argument("--batch-size", dest="evaluation.batch_size", metavar="N|auto", help="as --eval-batch-size")
    parser.add_argument("--suite", choices=tuple(SUITES), help="what else is measured, beside perplexity and tasks")
    parser.add_argument("--fresh", action="store_true", help="measure the dense model anew, and keep nothing of it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, and nothing else")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    log_flags(parser)
    parser.add_argument("--debug", action="store_true")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = vars(make_parser().parse_args(arguments))
    typed.pop("debug", None)
    if typed.get("json"):
        typed["log_level"] = "error"
    with on_screen(typed, "eval") as console:
        _judge(typed, console)
    return 0


def _judge(typed: dict[str, Any], console: Screen) -> None:
    from multipruner.jobs.evaluate import as_record, judge_folders

    folders, against, printed = typed.pop("folders"), typed.pop("against", None), typed.pop("json", False)
    options = {name: typed.pop(name) for name in ("output", "suite", "fresh") if name in typed}
    settings = nested(typed)
    evaluation_values(settings)
    results = judge_folders(folders, against, settings, console=console, **options)
    if printed:
        print(json.dumps(as_record(folders, results), indent=1))
