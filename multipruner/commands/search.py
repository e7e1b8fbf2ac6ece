"""``python -m multipruner search --model NAME``: evolutionary search over structures or schedules."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.config.choices import IMPORTANCES
from multipruner.config.spellings import FOUND_BY, old_flags, respelled
from multipruner.core.costs import COSTS
from multipruner.core.errors import ConfigError, MultiprunerError, did_you_mean

from . import recipes
from .base import Parser, add_fields, log_flags, on_screen
from .recipe_flags import model_flags, recipe_of, set_flag

if TYPE_CHECKING:
    from multipruner.console.events import Screen
    from multipruner.jobs.search.options import SearchOptions

_WHAT = """\
Search for the structure with the lowest calibration loss by evolution (NSGA-II, on DEAP), starting from the exact
program's solution; with costs beside the loss, for the whole front."""
_BRIEF = f"""\
{_WHAT}

example
  python -m multipruner search --model llama --ratio 0.2 --population 24 --generations 20 --output runs/search"""
_HELP = f"""\
{_WHAT}

examples
  python -m multipruner search --model llama --ratio 0.2 --population 24 --generations 20 --output runs/search
  python -m multipruner search --model llama --ratio 0.2 --objectives loss,params --ratio-range 0.1:0.4
  python -m multipruner search --model llama --objectives loss,latency --latency-table table.json --pick knee
  python -m multipruner search --model llama --genome schedule --channel-groups 128,256
  torchrun --nproc-per-node 4 -m multipruner search --model llama --output runs/search
  accelerate launch -m multipruner search --model llama --output runs/search

A search that was interrupted goes on with the same command. Every evaluation is kept in the cache: another search on
the same model and text does not repeat it."""

PICKS = ("knee", "best")
SEEDS = ("program", "greedy")
"""What may be computed to start from."""
_EVERYDAY = {
    **dict.fromkeys(("model", "recipe", "objectives", "population", "generations", "genome", "pick", "output"), ""),
    "set": "any key of a recipe, such as calibration.seed=3",
}
"""Flags beside the recipe's own that the short help shows."""
_ITS_OWN = ("method", "refine", "layout")
"""Keys of a recipe that the search says itself."""


def _search_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("search")
    costs = " ".join(cost.word for cost in COSTS.values())
    for flag, kind, metavar, text in (
        ("--objectives", str, "NAMES", f"loss, and costs: {costs} (default loss)"),
        ("--population", int, "N", "a multiple of 4 (default 24)"),
        ("--generations", int, "N", "after the first population (default 20)"),
        ("--offspring", int, "N", "children per generation (default: the population)"),
        ("--search-seed", int, "N", "of everything random in the search (default 0)"),
        ("--screen", int, "N", "sequences on which children are looked at first; the better half goes on to all of "
         "them (default: a quarter; 0: none)"),
        ("--tolerance", float, "SHARE", "how much more than the ratio may go, with the loss alone (default: one step "
         "of a width)"),
        ("--ratio-range", str, "LOW:HIGH", "what may go, with several objectives (default: half to one and a half of "
         "--ratio)"),
        ("--seeds", str, "NAMES", "computed to start from: program, greedy, or none (default program)"),
        ("--pick", str, "NAME|N", "point of the front that becomes the model: knee, best (lowest loss) or its number "
         "(default best; knee with several objectives)"),
        ("--channel-groups", str, "N,N", "schedule: choices (default: the recipe's)"),
        ("--importances", str, "NAMES", "schedule: choices (default: the recipe's)"),
        ("--repairs", str, "NAMES", "schedule: choices, none and/or one of bias, lstsq (default: the recipe's)"),
        ("--consent", str, "SENTENCE", "allows an evaluation task as an objective; the refusal says which sentence"),
    ):  # fmt: skip
        group.add_argument(flag, type=kind, metavar=metavar, help=text)
    for old, _ in old_flags("search"):
        group.add_argument(f"--{old}", help=argparse.SUPPRESS)
    group.add_argument("--genome", choices=("structure", "schedule"),
                       help="sizes of every layer (default), or stages and shares of a greedy path")  # fmt: skip
    group.add_argument("--algorithm", choices=("nsga2", "random"), help="random: the same number of random candidates")
    group.add_argument("--seeds-from", nargs="+", type=Path, metavar="RUN", help="folders of runs to start from, too")
    group.add_argument("--compare-random", action="store_true", help="also run random search, for comparison")


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(
        prog="multipruner search",
        usage="multipruner search --model NAME [FLAGS]",
        description=_HELP,
        brief=(_BRIEF, "Without torchrun or accelerate launch it runs in one process. What was interrupted goes on."),
        everyday=_EVERYDAY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    model_flags(parser)
    set_flag(parser)
    _search_flags(parser)
    add_fields(parser, lambda key: key not in _ITS_OWN)
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="DIR", help="default runs/NAME-RATIO-search")
    output.add_argument("--overwrite", action="store_true", help="give up what another run left there")
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    log_flags(parser, tracked=True)
    return parser


_OLD = tuple(old for old, _ in old_flags("search"))
_PLAIN = ("genome", "algorithm", "population", "generations", "offspring", "screen", "tolerance", "compare_random",
          "consent")  # fmt: skip


def options_of(typed: dict[str, Any]) -> SearchOptions:
    """Return the search's own flags, taken out of the others.

    Raises:
        ConfigError: for what cannot be meant.
    """
    from multipruner.jobs.search.options import SearchOptions

    typed |= respelled("search", {name: typed.pop(name) for name in ("repairs", *_OLD, "seeds") if name in typed})
    given: dict[str, Any] = {name: typed.pop(name) for name in _PLAIN if name in typed}
    if "search_seed" in typed:
        given["seed"] = typed.pop("search_seed")
    for name in ("objectives", "importances", "repairs"):
        if name in typed:
            given[name] = _names(typed.pop(name))
    _check_choices("--importances", given, tuple(IMPORTANCES))
    _check_choices("--repairs", given, ("none", "bias", "lstsq"))
    if "channel_groups" in typed:
        given["channel_groups"] = tuple(
            _number("--channel-groups", part) for part in _names(typed.pop("channel_groups"))
        )
    if "seeds" in typed:
        given["seeds"] = tuple(name for name in _names(typed.pop("seeds")) if name != "none")
        _check_choices("--seeds", given, SEEDS)
    if "seeds_from" in typed:
        given["seeds_from"] = tuple(typed.pop("seeds_from"))
    if "ratio_range" in typed:
        given["ratios"] = _range(typed.pop("ratio_range"))
    if "pick" in typed:
        how = typed.pop("pick")
        given["pick"] = how if how in PICKS else _number("--pick", how, "give knee, best or a number from 0")
    return SearchOptions(**given)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _check_choices(flag: str, given: dict[str, Any], allowed: Sequence[str]) -> None:
    for name in given.get(flag.strip("-"), ()):
        if name not in allowed:
            raise ConfigError(f"{flag} {name}{did_you_mean(name, allowed)}: there are {', '.join(allowed)}")


def _number(flag: str, text: str, hint: str = "give whole numbers") -> int:
    if not text.isdecimal():
        raise ConfigError(f"{flag} {text}: {hint}")
    return int(text)


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(":"))
    except ValueError:
        raise ConfigError(f"--ratio-range {text}: give LOW:HIGH, such as 0.1:0.4") from None
    return low, high


def _timed(flags: dict[str, Any], sources: Sequence[Mapping[str, Any]]) -> None:
    """Check that latency as an objective has a table; a budget of it is not needed.

    Args:
        flags: recipe fields that were typed.
        sources: mappings of lower precedence.

    Raises:
        ConfigError: without a table.
    """
    if not any(one.get("latency_table") for one in (*sources, flags)):
        raise ConfigError("the objective latency needs --latency-table FILE (multipruner latency makes one)")


def _fixed(options: SearchOptions) -> dict[str, Any]:
    """Return what the search asks of the recipe, whatever it says."""
    fixed: dict[str, Any] = {FOUND_BY: "program"}
    if repairs := [name for name in options.repairs if name != "none"]:
        fixed["repair"] = repairs[0]
    return fixed


def run(arguments: Sequence[str]) -> int:
    if int(os.environ.get("RANK", "0")) == 0 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return _run(arguments)
    try:
        return _run(arguments)
    except MultiprunerError as error:  # rank 0 says it, where it can still be said
        if "--debug" in arguments:
            print(f"process {os.environ['RANK']}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _run(arguments: Sequence[str]) -> int:
    typed = vars(make_parser().parse_args(arguments))
    typed.pop("debug", None)
    if typed.get("model") == "list":
        return recipes.run([])
    with on_screen(typed, "search") as console:
        _search(typed, console, shlex.join(["python", "-m", "multipruner", "search", *arguments]))
    return 0


def _search(typed: dict[str, Any], console: Screen, command: str) -> None:
    output, overwrite = typed.pop("output", None), typed.pop("overwrite", False)
    options = options_of(typed)
    recipe = recipe_of(typed, _fixed(options), amend=_timed if "latency" in options.objectives else None)
    from multipruner.config.sweep_points import default_output
    from multipruner.console.events import tell
    from multipruner.jobs.search.run import search

    if output is None:
        named = default_output(recipe)
        output = named.with_name(f"{named.name}-search")
    asked = {"search": asdict(options)}
    tell(console, "settings", output=str(output), recipe=recipe.model_dump(mode="json"), options=asked)
    search(recipe, options, output, console=console, command=command, overwrite=overwrite)
