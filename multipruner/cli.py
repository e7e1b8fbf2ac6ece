"""The command line. Only what was typed overrides the recipe; ``--help`` needs no torch."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .errors import ConfigError, MultiprunerError

_PRUNE_HELP = """\
Make a Hugging Face causal language model smaller without training (MultiPruner, arXiv 2501.09949):
calibration text decides which residual blocks, MLP channels and attention heads go.

examples
  python -m multipruner --model llama --ratio 0.2
  python -m multipruner --model meta-llama/Llama-3.1-8B --ratio 0.17 --shares 30:70:0 --device cuda
  python -m multipruner --model ./my-model --calibration my.jsonl --eval ppl,piqa,arc_easy
  python -m multipruner --model list

A run that was interrupted goes on with the same command. A smaller --ratio of a finished run in the same
--output costs no search."""

_EPILOG = """\
other commands
  eval FOLDER      compare models on perplexity and lm-eval tasks
  recipes          list the recipes that --model knows
  (each with --help)

precedence: flags typed here > --recipe file > the catalogue's recipe > defaults
MULTIPRUNER_CACHE moves the cache of converted models and sampled text."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else does."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help lists the flags)")


def _flags(parser: argparse.ArgumentParser) -> None:
    """Flags whose destinations are dotted names of recipe fields; absent means "not given"."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="recipe, Hub id, local folder or .gguf file; 'list' lists")
    model.add_argument("--recipe", type=Path, metavar="FILE", help="a recipe of your own (YAML)")
    model.add_argument("--revision", help="Hub revision of the model")
    model.add_argument("--trust-remote-code", dest="trust_remote_code", action="store_true", help="run its code")
    model.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="default: the recipe's")
    model.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda when there is one")

    what = parser.add_argument_group("what goes")
    what.add_argument("--ratio", type=float, help="removed / all parameters, between 0 and 1 (default 0.2)")
    what.add_argument("--order", help="of the dimensions, default blocks,mlp,heads")
    what.add_argument("--shares", help="of the ratio for blocks:mlp:heads, default 44:52:4")
    what.add_argument("--stop", choices=("nearest", "reach"), help="a dimension ends nearest to its share, or beyond")
    what.add_argument("--channel-group", dest="channel_group", type=int, help="MLP channels that leave together")
    what.add_argument("--partial-groups", dest="partial_groups", action="store_true",
                      help="allow channel groups that do not divide the width")  # fmt: skip
    what.add_argument("--kv-group-step", dest="kv_group_step", type=int, help="KV groups that leave together")
    what.add_argument("--importance", choices=("magnitude", "none"), help="order of channels and KV groups")

    text = parser.add_argument_group("calibration")
    text.add_argument("--calibration", dest="calibration.source", metavar="TEXT",
                      help="alpaca, wikitext2, c4, self (sampled from the model), or a local .txt .jsonl .json "
                      ".parquet .safetensors file; default alpaca, else self")  # fmt: skip
    text.add_argument("--text-column", dest="calibration.text_column", help="column of a local file")
    text.add_argument("--sequences", dest="calibration.sequences", type=int, help="for blocks (default 8)")
    text.add_argument("--width-sequences", dest="calibration.width_sequences", type=int, help="for widths (default 4)")
    text.add_argument("--length", dest="calibration.length", type=int, help="tokens per sequence (default 128)")
    text.add_argument("--packing", dest="calibration.packing", choices=("concat", "rows"))
    text.add_argument("--batch-size", dest="calibration.batch_size", type=int, help="sequences per forward")
    text.add_argument("--seed", dest="calibration.seed", type=int)


def _evaluation_flags(parser: argparse.ArgumentParser, tasks_flag: str, prefix: str) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        tasks_flag, dest=f"{prefix}tasks", metavar="TASKS", help="ppl and/or lm-eval tasks (default ppl)"
    )
    group.add_argument("--include-path", dest=f"{prefix}include_path", metavar="DIR", help="further lm-eval task files")
    group.add_argument("--limit", dest=f"{prefix}limit", type=int, metavar="N", help="documents per task")
    group.add_argument("--eval-batch-size", dest=f"{prefix}batch_size", help="a number or auto")
    group.add_argument("--eval-text", dest=f"{prefix}text", metavar="FILE", help="text for ppl instead of WikiText-2")


def _prune_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="multipruner",
        description=_PRUNE_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _flags(parser)
    _evaluation_flags(parser, "--eval", "evaluation.")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="DIR", help="default runs/NAME-RATIO")
    output.add_argument("--overwrite", action="store_true", help="give up what another run left there")
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _eval_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="multipruner eval",
        description="Compare models on perplexity and lm-eval tasks: standard errors, and paired differences "
        "against the first model on the same examples.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="pruned folders, recipes or Hub ids")
    parser.add_argument("--against", metavar="MODEL", help="the dense model (default: what FOLDER was made from)")
    parser.add_argument("--trust-remote-code", dest="trust_remote_code", action="store_true")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"))
    parser.add_argument("--device")
    _evaluation_flags(parser, "--tasks", "evaluation.")
    parser.add_argument("--batch-size", dest="evaluation.batch_size", help="a number or auto")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the result as JSON")
    parser.add_argument("--debug", action="store_true")
    return parser


def _nested(arguments: dict[str, Any]) -> dict[str, Any]:
    """``{"calibration.seed": 1}`` as ``{"calibration": {"seed": 1}}``."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        *parents, last = name.split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return result


def _evaluation_values(mapping: dict[str, Any]) -> None:
    """Task lists and batch sizes arrive as text."""
    evaluation = mapping.get("evaluation", {})
    if isinstance(evaluation.get("tasks"), str):
        evaluation["tasks"] = [task.strip() for task in evaluation["tasks"].split(",") if task.strip()]
    batch = evaluation.get("batch_size")
    if isinstance(batch, str) and batch.isdigit():
        evaluation["batch_size"] = int(batch)


def _prune(arguments: Sequence[str]) -> int:
    typed = vars(_prune_parser().parse_args(arguments))
    typed.pop("debug", None)
    if typed.get("model") == "list":
        return _recipes([])
    output, overwrite = typed.pop("output", None), typed.pop("overwrite", False)
    recipe_file = typed.pop("recipe", None)
    from .recipe import Recipe
    from .recipes import mapping_for, read_file

    sources = [read_file(recipe_file)] if recipe_file else []
    model = typed.pop("model", None)
    if model is not None:
        named = mapping_for(model)
        # what the model is goes with the flag; everything else of the catalogue gives way to the file
        sources = [named, *sources, {key: named.get(key) for key in ("model", "name", "revision", "fallback")}]
    elif not sources:
        raise ConfigError("which model? give --model NAME (see --model list), a Hub id, a folder or a .gguf file")
    flags = _nested(typed)
    _evaluation_values(flags)
    recipe = Recipe.build(*sources, flags)
    from rich.console import Console

    from .api import default_output
    from .pipeline import prune
    from .quiet import quiet_libraries

    quiet_libraries()
    command = shlex.join(["python", "-m", "multipruner", *arguments])
    prune(recipe, output or default_output(recipe), console=Console(), command=command, overwrite=overwrite)
    return 0


def _eval(arguments: Sequence[str]) -> int:
    typed = vars(_eval_parser().parse_args(arguments))
    typed.pop("debug", None)
    from rich.console import Console

    from .judge import judge_folders
    from .quiet import quiet_libraries

    quiet_libraries()
    folders, against, output = typed.pop("folders"), typed.pop("against", None), typed.pop("output", None)
    settings = _nested(typed)
    _evaluation_values(settings)
    judge_folders(folders, against, settings, console=Console(), output=output)
    return 0


def _recipes(arguments: Sequence[str]) -> int:
    _Parser(prog="multipruner recipes", description="List the recipes.").parse_args(arguments)
    from .recipes import catalogue

    for recipe in catalogue():
        facts = f"ratio {recipe.ratio:g}  shares {recipe.shares_text()}  channel groups of {recipe.channel_group}"
        print(f"{recipe.name:<15}{recipe.model}\n{'':<15}{facts}\n{'':<15}{recipe.description}\n")
    print("shares are blocks:mlp:heads; any Hub id, local folder or .gguf file of a supported family will do as well")
    return 0


def _terminate(number: int, frame: object) -> None:
    """A polite kill ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"prune": _prune, "eval": _eval, "recipes": _recipes}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; user errors become one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = _prune
    if arguments and arguments[0] in COMMANDS:
        command = COMMANDS[arguments.pop(0)]
    try:
        signal.signal(signal.SIGTERM, _terminate)
        return command(arguments)
    except MultiprunerError as error:
        if "--debug" in arguments:
            raise
        print(f"multipruner: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if "--debug" in arguments:
            raise
        hint = "; the same command goes on from here" if command is _prune else ""
        print(f"multipruner: stopped{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in arguments:
            raise
        print(f"multipruner: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 1
