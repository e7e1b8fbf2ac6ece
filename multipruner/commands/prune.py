"""``python -m multipruner --model NAME``: prune a model."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.core import __version__
from multipruner.core.errors import ConfigError

from . import COMMANDS, recipes
from .base import SHELLS, Parser, PrintCompletion, add_fields, log_flags, on_screen
from .push import PushLater
from .recipe_flags import model_flags, recipe_of, set_flag
from .sweep_flags import sweep_flags, take

if TYPE_CHECKING:
    from multipruner.console.events import Screen

_WHAT = """\
Make a Hugging Face causal language model smaller without training (MultiPruner, arXiv 2501.09949):
calibration text decides which residual blocks, MLP channels and attention heads go."""
_BRIEF = f"""\
{_WHAT}

example
  python -m multipruner --model llama --ratio 0.2"""
_PRUNE_HELP = f"""\
{_WHAT}

examples
  python -m multipruner --model llama --ratio 0.2
  python -m multipruner --model meta-llama/Llama-3.1-8B --ratio 0.17 --shares 30:70:0 --device cuda
  python -m multipruner --model ./my-model --calibration my.jsonl --eval ppl,piqa,arc_easy
  python -m multipruner latency --model llama --output table.json
  python -m multipruner --model llama --max-latency 0.7x --latency-table table.json
  python -m multipruner --model llama --set calibration.seed=3 --set evaluation.length=1024
  python -m multipruner --model list

A run that was interrupted goes on with the same command. Another --ratio in the same --output re-uses the losses
that were measured; with --method greedy a smaller one costs no search.
Budgets (--max-...) hold together: each a share of the dense model (0.7x) or a number (12ms, 200MiB, 100M); with one
of them --ratio is not needed."""

_EPILOG = """\
other commands
{commands}
  (each with --help)

precedence: flags and --set typed here > --recipe file > the catalogue's recipe > --effort > --method > defaults
MULTIPRUNER_CACHE moves the cache of converted models and sampled text."""
_EVERYDAY = {
    **dict.fromkeys(("model", "recipe", "output", "push"), ""),
    "set": "any key of a recipe, such as calibration.seed=3",
    "dry_run": "say what the run would take, and end",
    "sweep": "one budget at many values, such as 0.9,0.8,0.7: figures and a plan for each",
}
"""Flags beside the recipe's own that the short help shows."""


_OF_THE_RUN: dict[str, Any] = {"output": None, "overwrite": False, "dry_run": False}


def _epilog() -> str:
    others = [f"  {name:<11}{text}" for name, text in COMMANDS.items() if name != "prune"]
    return _EPILOG.format(commands="\n".join(others))


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(
        prog="multipruner",
        usage="multipruner [COMMAND] --model NAME [FLAGS]",
        description=_PRUNE_HELP,
        epilog=_epilog(),
        brief=(_BRIEF, _epilog()),
        everyday=_EVERYDAY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    model_flags(parser)
    set_flag(parser)
    add_fields(parser)
    sweep_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="DIR", help="default runs/NAME-RATIO")
    output.add_argument("--overwrite", action="store_true", help="give up what another run left there")
    output.add_argument("--dry-run", action="store_true",
                        help="say what the run would take (minutes by stage, memory, disk, downloads) and what its "
                        "budgets mean, and end")  # fmt: skip
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    output.add_argument("--print-completion", action=PrintCompletion, choices=SHELLS,
                        help="print the script by which a shell completes commands and flags, and end")  # fmt: skip
    output.add_argument("--version", action="version", version=f"multipruner {__version__}", help="say it and end")
    log_flags(parser, tracked=True)
    PushLater.flags(parser.add_argument_group("sharing"))
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = vars(make_parser().parse_args(arguments))
    typed.pop("debug", None)
    later = PushLater.take(typed)
    if typed.get("model") == "list":
        return recipes.run([])
    with on_screen(typed, "prune") as console:
        _prune(typed, later, console, shlex.join(["python", "-m", "multipruner", *PushLater.without(arguments)]))
    return 0


def _prune(typed: dict[str, Any], later: PushLater | None, console: Screen, command: str) -> None:
    """Make a run, a sweep, a given plan's model, or the forecast of one."""
    output, overwrite, dry = (typed.pop(name, none) for name, none in _OF_THE_RUN.items())
    asked = take(typed)
    recipe = recipe_of(typed, amend=asked.put_into)
    from multipruner.config.sweep_points import default_output
    from multipruner.console.events import tell
    from multipruner.jobs.prune.run import prune_recipe

    folder = output or (asked.folder(recipe) if asked else default_output(recipe))
    tell(console, "settings", output=str(folder), recipe=recipe.model_dump(mode="json"), options=asked.to_json())
    if dry:
        from multipruner.jobs.forecast.run import foretell

        if asked:
            raise ConfigError("--dry-run is of one run: give it without --sweep and --plan")
        foretell(recipe, folder, console)
        return
    if later and asked.sweep is not None:
        raise ConfigError("a sweep writes plans, no model to push: push what --plan makes of one")
    if later:
        later.check(console=console)
    if asked:
        asked.run(recipe, folder, console, command, overwrite)
    else:
        prune_recipe(recipe, folder, console=console, command=command, overwrite=overwrite)
    if later:
        later.run(folder, console=console)
