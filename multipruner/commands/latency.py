"""``python -m multipruner latency --model NAME``: measure the milliseconds of every block option on this machine."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.config.choices import RUNTIMES
from multipruner.config.counts import MOST, MOST_UNITS, check_counts
from multipruner.core.errors import ConfigError, OutputError
from multipruner.core.latency_table import FORMAT, USUAL, LatencyTable, Workload

from .base import Parser, add_fields, log_flags, on_screen

if TYPE_CHECKING:
    from rich.console import Console

    from multipruner.console.events import Screen

_HELP = """\
Measure how long every attention and MLP option of a model takes on this machine, and write the look-up table from
which the latency of any pruned structure is predicted. --runtime measures it in the program that will serve: exported
models, of which one option is everywhere, beside the dense one.

examples
  python -m multipruner latency --model llama --output table.json
  python -m multipruner latency --model llama --output table.json --phase prefill --prompt 512 --prompt 128
  python -m multipruner latency --model meta-llama/Llama-3.1-8B --output h100.json --device cuda --batch 8
  python -m multipruner latency --model llama --output table.json --runtime llama.cpp --outtype q8_0
  python -m multipruner latency --model ./vit --output table.json --batch 1 --batch 8
  python -m multipruner latency --model llama --output table.json --hidden-sizes 576,512,448

Close other programs first. What was measured is kept in OUTPUT.partial: the same command goes on."""

_OF_THE_RECIPE = ("dtype", "device", "revision", "hidden_step", "trust_remote_code")
_BOUNDS = {"batch": (1, MOST_UNITS), "channel_step": (1, MOST_UNITS), "threads": (1, 1024), "repeats": (1, 1000)}
RESTLESS = 0.15
"""Relative spread from which other programs must have been at work: a quiet machine's is a few per cent."""


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(prog="multipruner latency", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="NAME", help="recipe, Hub id, local folder or .gguf file")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the table, JSON")
    parser.add_argument("--overwrite", action="store_true", help="measure anew what FILE or FILE.partial holds")
    work = parser.add_argument_group("workloads")
    work.add_argument("--phase", choices=("prefill", "decode", "both"), help="of texts (default both)")
    work.add_argument("--batch", type=int, action="append", metavar="SEQUENCES",
                      help="sequences, or pictures (default 1); may be given several times")  # fmt: skip
    work.add_argument("--prompt", type=int, action="append", metavar="TOKENS",
                      help="tokens of the prompt (default 512); may be given several times")  # fmt: skip
    cache = work.add_mutually_exclusive_group()
    cache.add_argument("--generate", type=int, metavar="TOKENS", help="decode: tokens generated behind the prompt; the "
                       "cache is measured half-way")  # fmt: skip
    cache.add_argument("--cached", type=int, metavar="TOKENS", help="decode: tokens in the cache (default 256)")
    where = parser.add_argument_group("where")
    where.add_argument("--runtime", choices=tuple(RUNTIMES), default=USUAL,
                       help=f"what runs the model (default {USUAL}); others run exported ones, on the processor"
                       )  # fmt: skip
    where.add_argument("--outtype", choices=tuple(dict.fromkeys(t for row in RUNTIMES.values() for t in row.outtypes)),
                       help="of exported matrices (default f16)")  # fmt: skip
    where.add_argument("--repeats", type=int, metavar="N", help="samples of every exported model (default 7)")
    how = parser.add_argument_group("how")
    how.add_argument("--attn-implementation", metavar="NAME", help="transformers' name: sdpa, eager, flash_attention_2")
    how.add_argument("--compile", action="store_true", help="compile every block (torch.compile)")
    how.add_argument("--threads", type=int, metavar="N", help="processor threads (default: torch's choice)")
    how.add_argument("--channel-step", type=int, default=128, metavar="N", help="MLP widths (default 128)")
    how.add_argument("--hidden-sizes", metavar="N,N|auto", help="widths of the residual stream besides the model's "
                     "own, which is always measured; auto: those that a run with --hidden-size auto tries")  # fmt: skip
    add_fields(parser, lambda key: key in _OF_THE_RECIPE, heading="how")
    parser.everyday.clear()  # there are few enough to show them all
    log_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def workloads_of(typed: argparse.Namespace) -> list[Workload]:
    """Return the workloads that the flags ask for, of texts.

    Raises:
        ConfigError: for numbers below one.
    """
    prompts, batches = typed.prompt or [512], typed.batch or [1]
    found = [Workload("prefill", *each) for each in product(batches, prompts)] if typed.phase != "decode" else []
    if typed.phase != "prefill":
        if typed.generate is not None:
            check_counts(typed, {"generate": (1, MOST)})
            cached = [prompt + typed.generate // 2 for prompt in prompts]
        else:
            cached = [256 if typed.cached is None else typed.cached]
        found += [Workload("decode", *each) for each in product(batches, cached)]
    return list(dict.fromkeys(found))


def _check_pictures(typed: argparse.Namespace) -> None:
    """Refuse flags that texts have alone.

    Raises:
        ConfigError: naming the first.
    """
    texts = {"--phase": typed.phase, "--prompt": typed.prompt, "--generate": typed.generate, "--cached": typed.cached}
    if wrong := [flag for flag, value in texts.items() if value is not None]:
        raise ConfigError(f"{typed.model} is an image classifier, timed by batches of pictures: give no {wrong[0]}")


def _check_runtime(typed: argparse.Namespace) -> None:
    """Refuse flags that the runtime has no use for, and one that is not here.

    Raises:
        ConfigError: naming them.
    """
    served = typed.runtime != USUAL
    theirs = {"--attn-implementation": typed.attn_implementation, "--compile": typed.compile, "--device": typed.device,
              "--hidden-sizes": typed.hidden_sizes}  # fmt: skip
    others = theirs if served else {"--outtype": typed.outtype, "--repeats": typed.repeats}
    if wrong := [flag for flag, value in others.items() if value not in (None, False)]:
        exporting = " or ".join(name for name, row in RUNTIMES.items() if row.export)
        there, why = (
            (USUAL, "others run what is exported for them, on the processor") if served
            else (exporting, f"{USUAL} run the model as it is")
        )  # fmt: skip
        raise ConfigError(f"{' and '.join(wrong)}: with --runtime {there} only; {why}")
    if served:
        from multipruner.runtimes.served import row_for

        row_for(typed.runtime, typed.outtype)


def run(arguments: Sequence[str]) -> int:
    typed = make_parser().parse_args(arguments)
    check_counts(typed, _BOUNDS)
    _check_runtime(typed)
    workloads = workloads_of(typed)
    partial = typed.output.with_name(typed.output.name + ".partial")
    _check_output(typed.output, partial, typed.overwrite)
    with on_screen(vars(typed), "latency") as console:
        _make(typed, workloads, partial, console)
    return 0


def _make(typed: argparse.Namespace, workloads: list[Workload], partial: Path, console: Screen) -> None:
    """Measure, write the table and show it."""
    from multipruner.console.events import tell
    from multipruner.core.families import anatomy_of, spec_for
    from multipruner.latency.asked import check_context, narrower_than, on_pictures
    from multipruner.latency.probe_journal import discard
    from multipruner.latency.shown import spread_of, summary
    from multipruner.storage.files import write_atomically

    model, tokenizer, step = _load(typed, console)
    if not spec_for(model.config).task.reads_text:
        _check_pictures(typed)
        workloads = on_pictures(typed.model, model.config, tokenizer, typed.batch or [1])
    check_context(workloads, model.config)
    narrower = narrower_than(model.config, typed.hidden_sizes, step)
    if typed.overwrite:
        discard(partial)
    if typed.runtime == USUAL:
        table = _measured(model, workloads, narrower, typed, partial, console)
    else:
        table = _measured_served(model, tokenizer, workloads, typed, partial, console)
    write_atomically(typed.output, table.to_json())
    partial.unlink(missing_ok=True)
    console.print(summary(table, anatomy_of(model.config)))
    wild = spread_of(table)
    if wild > RESTLESS:
        console.print(f"warning: times spread by {100 * wild:.0f}%: close other programs and use --overwrite")
    console.print(f"wrote {typed.output}", highlight=False, markup=False)
    tell(console, "result", file=str(typed.output), spread=wild)


def _check_output(output: Path, partial: Path, overwrite: bool) -> None:
    """Refuse to replace anything but an earlier table and what an interrupted measurement left.

    Raises:
        OutputError: naming what is there.
    """
    from multipruner.latency.probe_journal import check_journal
    from multipruner.storage.partial import header_of

    if output.exists() and not overwrite:
        raise OutputError(f"{output} is there already; choose another --output, or measure anew with --overwrite")
    if os.path.lexists(output) and (header_of(output) or {}).get("format") != FORMAT:
        raise OutputError(f"{output} is no latency table and will not be replaced; choose another --output")
    check_journal(partial)


def _load(typed: argparse.Namespace, console: Console) -> tuple[Any, Any, int]:
    """Return the dense model, as the flags want it, its tokenizer or image processor, and what its hidden sizes are
    multiples of.
    """
    import torch

    from multipruner.config.recipe import Recipe
    from multipruner.console.progress import waiting_display
    from multipruner.recipes import mapping_for
    from multipruner.sources.dense import load_dense
    from multipruner.sources.resolve import resolve

    names = ("dtype", "device", "revision", "hidden_step")
    flags = {name: getattr(typed, name) for name in names if getattr(typed, name) is not None}
    if typed.trust_remote_code:
        flags["trust_remote_code"] = True
    recipe = Recipe.build(mapping_for(typed.model), flags)
    if typed.threads is not None:
        torch.set_num_threads(typed.threads)
    say = lambda text: console.print(text, highlight=False, soft_wrap=True)  # noqa: E731
    with waiting_display(console, "loading the model"):
        model, tokenizer = load_dense(resolve(recipe, say), recipe, pictures=typed.runtime == USUAL)
    if typed.attn_implementation is not None:
        try:
            model.set_attn_implementation(typed.attn_implementation)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"--attn-implementation {typed.attn_implementation}: {error}") from None
    return model, tokenizer, recipe.hidden_step


def _measured(
    model: Any,
    workloads: list[Workload],
    narrower: Sequence[int],
    typed: argparse.Namespace,
    partial: Path,
    console: Console,
) -> LatencyTable:
    """Measure, and show how far it is."""
    from multipruner.console.progress import sharing_display
    from multipruner.latency.bench import measure_table

    with sharing_display(console, "latency") as show:
        return measure_table(
            model,
            workloads,
            channel_step=typed.channel_step,
            compiled=typed.compile,
            hidden_sizes=narrower,
            resume_from=partial,
            progress=lambda name, share: show(name, share, 1),
        )


def _measured_served(
    model: Any, tokenizer: Any, workloads: list[Workload], typed: argparse.Namespace, partial: Path, console: Console
) -> LatencyTable:
    """Measure in the program that will serve, and show how far it is."""
    import torch

    from multipruner.console.progress import sharing_display
    from multipruner.runtimes.bench import REPEATS, measure_served

    with sharing_display(console, "latency") as show:
        return measure_served(
            model,
            tokenizer,
            workloads,
            typed.runtime,
            place=typed.output,
            outtype=typed.outtype,
            threads=torch.get_num_threads(),
            channel_step=typed.channel_step,
            repeats=typed.repeats or REPEATS,
            resume_from=partial,
            progress=lambda name, share: show(name, share, 1),
        )
