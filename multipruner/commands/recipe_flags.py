"""The flags of a recipe, shared by the commands that prune. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.config.choices import IMPORTANCES
from multipruner.core.costs import COSTS
from multipruner.core.errors import ConfigError

from .base import evaluation_values, nested

if TYPE_CHECKING:
    from multipruner.config.recipe import Recipe


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Which model, where it runs. Destinations are (dotted) recipe fields; absent means "not given"."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="NAME", help="recipe, Hub id, local folder or .gguf file; 'list' lists")
    model.add_argument("--recipe", type=Path, metavar="FILE", help="a recipe of your own (YAML)")
    model.add_argument("--revision", help="Hub revision of the model")
    model.add_argument("--trust-remote-code", dest="trust_remote_code", action="store_true", help="run its code")
    model.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), help="default: the recipe's")
    model.add_argument("--compute-dtype", dest="compute_dtype", choices=("auto", "bfloat16", "float16", "float32"),
                       help="that is computed in; default: what this machine multiplies fastest")  # fmt: skip
    model.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda when there is one")


def budget_flags(parser: argparse.ArgumentParser) -> None:
    """How much goes."""
    what = parser.add_argument_group("how much goes")
    what.add_argument("--ratio", type=float, help="removed / all parameters, between 0 and 1 (default 0.2)")
    budget = parser.add_argument_group(
        "budgets",
        "upper bounds, any number together: a share of the dense model (0.7x) or a number (12ms, 200MiB, 100M); "
        "with one of them --ratio is not needed",
    )
    for cost in COSTS.values():
        budget.add_argument(cost.flag, dest=f"budgets.{cost.name}", metavar=cost.metavar, help=cost.help)
    budget.add_argument("--latency-table", dest="latency_table", metavar="FILE", help="of `multipruner latency`")
    budget.add_argument("--workload", help="of that table, such as prefill-b1-t512; default: its first")


def judging_flags(parser: argparse.ArgumentParser) -> None:
    """What candidates are judged by, and what orders and repairs them."""
    how = parser.add_argument_group("how candidates are made and judged")
    how.add_argument("--objective", choices=("nll", "kl"), help="what calibration measures: kl to the dense model")
    how.add_argument("--compensation", choices=("none", "bias", "lstsq"),
                     help="closed-form repair of what stays; bias: where block outputs have biases")  # fmt: skip
    how.add_argument("--accumulate", type=float, metavar="SHARE",
                     help="of the error of earlier blocks that each makes good, default 1; 0: none")  # fmt: skip
    how.add_argument("--accumulate-ridge", dest="accumulate_ridge", metavar="RIDGE",
                     help="of that last repair, or auto: every row takes what held-out text prefers")  # fmt: skip
    how.add_argument("--final-norm", dest="final_norm", choices=("refit", "keep"),
                     help="whether the last repair includes the gain of the last norm")  # fmt: skip
    how.add_argument("--compensate", choices=("search", "final"),
                     help="search: candidates are scored with their repair; final: the result only")  # fmt: skip
    how.add_argument("--moments", choices=("memory", "disk"),
                     help="where second moments and repaired weights are while the search needs them")  # fmt: skip
    how.add_argument("--ridge", type=float, help="of the repair, default 0.01")
    how.add_argument("--order", help="sequential: of the dimensions, default blocks,mlp,heads")
    how.add_argument("--shares", help="of the ratio for blocks:mlp:heads, default 44:52:4")
    how.add_argument("--stop", choices=("nearest", "reach"), help="a dimension ends nearest to its share, or beyond")
    how.add_argument("--rounds", type=int, help="times the program is refined with losses measured around its answer")
    how.add_argument("--align", type=int, metavar="N",
                     help="cut widths of matrices are multiples of N, such as 64 for tensor cores")  # fmt: skip
    how.add_argument("--channel-group", dest="channel_group", type=int, help="MLP channels that leave together")
    how.add_argument("--partial-groups", dest="partial_groups", action="store_true",
                     help="allow channel groups that do not divide the width")  # fmt: skip
    how.add_argument("--kv-group-step", dest="kv_group_step", type=int, help="KV groups that leave together")
    how.add_argument("--query-head-step", dest="query_head_step", type=int, metavar="N",
                     help="query heads that leave inside every KV group of a layer; default: none do")  # fmt: skip
    how.add_argument("--importance", choices=tuple(IMPORTANCES),
                     help="order of channels and KV groups")  # fmt: skip


def calibration_flags(parser: argparse.ArgumentParser) -> None:
    """The text that decides."""
    text = parser.add_argument_group("calibration")
    text.add_argument("--calibration", dest="calibration.source", metavar="TEXT",
                      help="alpaca, wikitext2, c4, self (sampled from the model), or a local .txt .jsonl .json "
                      ".parquet .safetensors file; several: alpaca+self, or weighted alpaca:1+self:3; default self "
                      "(--method global) or alpaca (paper)")  # fmt: skip
    text.add_argument("--text-column", dest="calibration.text_column", help="column of a local file")
    text.add_argument("--sequences", dest="calibration.sequences", type=int, help="that structures are judged on")
    text.add_argument(
        "--width-sequences",
        dest="calibration.width_sequences",
        type=int,
        help="of them, sequential: for widths; global: for the first tables",
    )
    text.add_argument("--statistics-sequences", dest="calibration.statistics_sequences", type=int,
                      help="for the moments behind order and repair (default 256)")  # fmt: skip
    text.add_argument("--length", dest="calibration.length", type=int, help="tokens per sequence")
    text.add_argument("--packing", dest="calibration.packing", choices=("concat", "rows"))
    text.add_argument("--batch-size", dest="calibration.batch_size", type=int, help="sequences per forward")
    text.add_argument("--seed", dest="calibration.seed", type=int, help="of the calibration text")


Amend = Callable[[dict[str, Any], Sequence[Mapping[str, Any]]], None]
"""Changes the fields that were typed, given the mappings of lower precedence."""


def recipe_of(typed: dict[str, Any], *fixed: dict[str, Any], amend: Amend | None = None) -> Recipe:
    """The recipe that typed flags make: flags over the --recipe file over the catalogue's recipe over the defaults.

    Args:
        typed: flags by dotted destination, nothing else left in it.
        fixed: mappings that win over everything.
        amend: called before anything is merged.

    Raises:
        ConfigError: when no model is named, or a value cannot be meant.
    """
    from multipruner.config.recipe import Recipe
    from multipruner.recipes import mapping_for, read_file

    recipe_file, model = typed.pop("recipe", None), typed.pop("model", None)
    sources = [read_file(recipe_file)] if recipe_file else []
    if model is not None:
        named = mapping_for(model)
        # what the model is goes with the flag; everything else of the catalogue gives way to the file
        sources = [named, *sources, {key: named.get(key) for key in ("model", "name", "revision", "fallback")}]
    elif not sources:
        raise ConfigError("which model? give --model NAME (see --model list), a Hub id, a folder or a .gguf file")
    flags = nested(typed)
    evaluation_values(flags)
    if amend is not None:
        amend(flags, sources)
    return Recipe.build(*sources, flags, *fixed)
