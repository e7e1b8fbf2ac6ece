"""``python -m multipruner --model NAME``: prune a model."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from multipruner.errors import ConfigError

from . import COMMANDS, recipes
from .base import Parser, evaluation_flags, evaluation_values, nested

_PRUNE_HELP = """\
Make a Hugging Face causal language model smaller without training (MultiPruner, arXiv 2501.09949):
calibration text decides which residual blocks, MLP channels and attention heads go.

examples
  python -m multipruner --model llama --ratio 0.2
  python -m multipruner --model meta-llama/Llama-3.1-8B --ratio 0.17 --shares 30:70:0 --device cuda
  python -m multipruner --model ./my-model --calibration my.jsonl --eval ppl,piqa,arc_easy
  python -m multipruner latency --model llama --output table.json
  python -m multipruner --model llama --max-latency 0.7x --latency-table table.json
  python -m multipruner --model list

A run that was interrupted goes on with the same command. Another --ratio in the same --output re-uses the losses
that were measured; with --strategy sequential a smaller one costs no search."""

_EPILOG = """\
other commands
{commands}
  (each with --help)

precedence: flags typed here > --recipe file > the catalogue's recipe > defaults
MULTIPRUNER_CACHE moves the cache of converted models and sampled text."""


def _epilog() -> str:
    others = [f"  {name:<11}{text}" for name, text in COMMANDS.items() if name != "prune"]
    return _EPILOG.format(commands="\n".join(others))


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
    budget = parser.add_argument_group(
        "budgets",
        "upper bounds, any number together: a share of the dense model (0.7x) or a number (12ms, 200MiB, 100M); "
        "with one of them --ratio is not needed",
    )
    budget.add_argument("--max-params", dest="budgets.parameters", metavar="N", help="parameters")
    budget.add_argument("--max-memory", dest="budgets.weight_bytes", metavar="BYTES", help="of the weights")
    budget.add_argument("--max-kv-bytes", dest="budgets.kv_bytes", metavar="BYTES", help="KV cache per token")
    budget.add_argument("--max-flops", dest="budgets.flops", metavar="N", help="per token, without attention scores")
    budget.add_argument("--max-latency", dest="budgets.latency", metavar="MS", help="of one forward pass")
    budget.add_argument("--latency-table", dest="latency_table", metavar="FILE", help="of `multipruner latency`")
    budget.add_argument("--workload", help="of that table, such as prefill-b1-t512; default: its first")

    what.add_argument("--method", choices=("global", "paper"),
                      help="a set of defaults: global (tables of measured losses, an exact program, closed-form "
                      "repair; default) or paper (the published greedy path)")  # fmt: skip
    what.add_argument("--strategy", choices=("milp", "sequential"), help="exact program, or one greedy step at a time")
    what.add_argument("--rounds", type=int, help="times the program is refined with losses measured around its answer")
    what.add_argument("--refine", type=float, metavar="MIN", help="minutes of further rounds, until none helps")
    what.add_argument("--layout", choices=("blocks-free", "uniform"),
                      help="uniform: equal layers, an ordinary stock checkpoint that loads everywhere")  # fmt: skip
    what.add_argument("--objective", choices=("nll", "kl"), help="what calibration measures: kl to the dense model")
    what.add_argument("--compensation", choices=("none", "lstsq"), help="closed-form repair of what stays")
    what.add_argument("--accumulate", type=float, metavar="SHARE",
                      help="of the error of earlier blocks that each makes good, default 1; 0: none")  # fmt: skip
    what.add_argument("--ridge", type=float, help="of the repair, default 0.01")
    what.add_argument("--order", help="sequential: of the dimensions, default blocks,mlp,heads")
    what.add_argument("--shares", help="of the ratio for blocks:mlp:heads, default 44:52:4")
    what.add_argument("--stop", choices=("nearest", "reach"), help="a dimension ends nearest to its share, or beyond")
    what.add_argument("--channel-group", dest="channel_group", type=int, help="MLP channels that leave together")
    what.add_argument("--partial-groups", dest="partial_groups", action="store_true",
                      help="allow channel groups that do not divide the width")  # fmt: skip
    what.add_argument("--kv-group-step", dest="kv_group_step", type=int, help="KV groups that leave together")
    what.add_argument("--importance", choices=("magnitude", "activation", "second-order", "none"),
                      help="order of channels and KV groups")  # fmt: skip

    text = parser.add_argument_group("calibration")
    text.add_argument("--calibration", dest="calibration.source", metavar="TEXT",
                      help="alpaca, wikitext2, c4, self (sampled from the model), or a local .txt .jsonl .json "
                      ".parquet .safetensors file; several: alpaca+self, or weighted alpaca:1+self:3; default self "
                      "(--method global) or alpaca (paper)")  # fmt: skip
    text.add_argument("--text-column", dest="calibration.text_column", help="column of a local file")
    text.add_argument("--sequences", dest="calibration.sequences", type=int, help="that structures are judged on")
    text.add_argument("--width-sequences", dest="calibration.width_sequences", type=int, help="sequential: for widths")
    text.add_argument("--statistics-sequences", dest="calibration.statistics_sequences", type=int,
                      help="for the moments behind order and repair (default 256)")  # fmt: skip

    text.add_argument("--length", dest="calibration.length", type=int, help="tokens per sequence")
    text.add_argument("--packing", dest="calibration.packing", choices=("concat", "rows"))
    text.add_argument("--batch-size", dest="calibration.batch_size", type=int, help="sequences per forward")
    text.add_argument("--seed", dest="calibration.seed", type=int)


def _prune_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="multipruner",
        description=_PRUNE_HELP,
        epilog=_epilog(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _flags(parser)
    evaluation_flags(parser, "--eval", "evaluation.")
    output = parser.add_argument_group("output")
    output.add_argument("--output", type=Path, metavar="DIR", help="default runs/NAME-RATIO")
    output.add_argument("--overwrite", action="store_true", help="give up what another run left there")
    output.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = vars(_prune_parser().parse_args(arguments))
    typed.pop("debug", None)
    if typed.get("model") == "list":
        return recipes.run([])
    output, overwrite = typed.pop("output", None), typed.pop("overwrite", False)
    recipe_file = typed.pop("recipe", None)
    from multipruner.recipe import Recipe
    from multipruner.recipes import mapping_for, read_file

    sources = [read_file(recipe_file)] if recipe_file else []
    model = typed.pop("model", None)
    if model is not None:
        named = mapping_for(model)
        # what the model is goes with the flag; everything else of the catalogue gives way to the file
        sources = [named, *sources, {key: named.get(key) for key in ("model", "name", "revision", "fallback")}]
    elif not sources:
        raise ConfigError("which model? give --model NAME (see --model list), a Hub id, a folder or a .gguf file")
    flags = nested(typed)
    evaluation_values(flags)
    if "budgets" in flags and "ratio" not in flags:
        flags["ratio"] = None  # a budget that was typed replaces the recipe's ratio
    recipe = Recipe.build(*sources, flags)
    from rich.console import Console

    from multipruner.api import default_output
    from multipruner.pipeline import prune
    from multipruner.quiet import quiet_libraries

    quiet_libraries()
    command = shlex.join(["python", "-m", "multipruner", *arguments])
    prune(recipe, output or default_output(recipe), console=Console(), command=command, overwrite=overwrite)
    return 0
