"""``python -m multipruner tune FOLDER``: train a pruned model a little, and merge the result."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.config.choices import TEXTS, listed_texts
from multipruner.jobs.tune.settings import LEARN, LOGITS

from .base import Parser, log_flags, on_screen

if TYPE_CHECKING:
    from multipruner.console.events import Screen

_HELP = """\
Train a pruned model a little after the cut, into an ordinary checkpoint folder. Pruning itself trains nothing; this is
a step of its own, which reads one folder and writes another.
Needs the extra: pip install 'multipruner[tune]'

examples
  python -m multipruner tune runs/llama-0.2 --minutes 10
  python -m multipruner tune runs/llama-0.2 --data my.jsonl --text-column answer --steps 500 --output runs/mine
  python -m multipruner tune runs/llama-0.2 --data alpaca --no-distill

Who teaches? Where the dense model is at hand it does (distillation): at every position the pruned model learns its
whole distribution, which says far more than the one token that a text has there. It needs no data: the default text
is then 'self', written by the dense model. With --no-distill, or without that model, the text alone teaches.
Which data? The model moves towards the text it is trained on: take text like that which it will meet.
Which steps? 200 of 8 x 256 tokens (the default) are 400,000 tokens; or say the minutes. Watch both perplexities: when
the one on held-out text falls and the one on --eval-text rises, the text is too narrow or the learning rate too high.
Who learns? Adapters (lora) need the least memory. On a CPU '--learn layers' sees more text in the same minutes and won
back about twice as much there; it takes some 16 bytes for every weight that learns.
Which memory? The dense model runs beside; '--logits disk --top-k 64' asks it once, before, and lets it go.

A training that was stopped goes on with the same command. The folder's card and report.json (section 'tuned') say
what was done, and what was measured before: a tuned model's numbers never stand among those of pruning alone."""


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(
        prog="multipruner tune",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a finished run; it stays as it is")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default FOLDER-tuned")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    text = parser.add_argument_group("text")
    text.add_argument("--data", metavar="TEXT", help=f"{listed_texts(TEXTS, ids=False)} (default self where "
                      "the dense model teaches, else alpaca)")  # fmt: skip
    text.add_argument("--text-column", dest="text_column", metavar="NAME", help="column of a table that is the text")
    text.add_argument("--chat-template", dest="chat_template", metavar="FILE|NAME",
                      help="for conversations and question-answer columns; default: the tokenizer's own")  # fmt: skip
    text.add_argument("--length", type=int, metavar="N", help="tokens per sequence, default 256")
    text.add_argument("--sequences", type=int, metavar="N", help="that the dense model writes at most, for 'self'; "
                      "default 1024, with --minutes on a CPU 32 a minute")  # fmt: skip
    taught = parser.add_argument_group("teacher")
    taught.add_argument("--distill", action=argparse.BooleanOptionalAction,
                        help="learn the dense model's distribution; default: where that model is at hand")  # fmt: skip
    taught.add_argument("--top-k", dest="top_k", type=int, metavar="N",
                        help="only its N likeliest tokens at every place, the rest as one; default: all")  # fmt: skip
    taught.add_argument("--logits", choices=tuple(LOGITS), help="; ".join(f"{k}: {v}" for k, v in LOGITS.items()))
    how = parser.add_argument_group("training")
    how.add_argument("--learn", choices=tuple(LEARN), help="; ".join(f"{k}: {v}" for k, v in LEARN.items()))
    how.add_argument("--steps", type=int, metavar="N", help="optimizer steps, default 200; with --minutes at most 2000")
    how.add_argument("--minutes", type=float, metavar="MINUTES", help="of training at most, stops and goes on included")
    how.add_argument("--batch", type=int, metavar="N", help="sequences per step, default 8")
    how.add_argument("--micro-batch", dest="micro_batch", type=int, metavar="N",
                     help="sequences per forward pass, for less memory; default: the batch")  # fmt: skip
    how.add_argument("--rank", type=int, metavar="N", help="of the adapters, default 16 (alpha is twice the rank)")
    how.add_argument("--lr", type=float, metavar="RATE", help="peak learning rate, default 2e-4")
    how.add_argument("--seed", type=int, metavar="N", help="default 0")
    how.add_argument("--gradient-checkpointing", dest="gradient_checkpointing", action="store_true",
                     help="less memory, a third more time")  # fmt: skip
    how.add_argument("--save-every", dest="save_every", type=int, metavar="N",
                     help="steps between two states on disk, default 25")  # fmt: skip
    how.add_argument("--device", choices=("auto", "cpu", "cuda"))
    how.add_argument("--trust-remote-code", dest="trust_remote_code", action="store_true", help="run the model's code")
    judged = parser.add_argument_group("evaluation, before and after")
    judged.add_argument("--eval-text", dest="eval_text", metavar="FILE", help="instead of WikiText-2")
    judged.add_argument("--eval-length", dest="eval_length", type=int, metavar="N", help="tokens per sequence, 2048")
    judged.add_argument("--eval-tokens", dest="eval_tokens", type=int, metavar="N", help="of the text, default 49152")
    log_flags(parser, tracked=True)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = vars(make_parser().parse_args(arguments))
    typed.pop("debug", None)
    with on_screen(typed, "tune") as console:
        _tune(typed, console, shlex.join(["python", "-m", "multipruner", "tune", *arguments]))
    return 0


def _tune(typed: dict[str, Any], console: Screen, command: str) -> None:
    from multipruner.config.recipe import Recipe
    from multipruner.console.events import tell
    from multipruner.jobs.tune.run import tune
    from multipruner.jobs.tune.steps import TuneSettings

    folder = typed.pop("folder")
    options = {name: typed.pop(name) for name in ("device", "trust_remote_code", "overwrite") if name in typed}
    names = {"eval_text": "text", "eval_length": "length", "eval_tokens": "max_tokens"}
    evaluation = {field: typed.pop(flag) for flag, field in names.items() if flag in typed}
    output = typed.pop("output", None) or Path(f"{folder if folder.name else folder.resolve()}-tuned")
    spec = Recipe.build({"model": str(folder), "evaluation": evaluation}).evaluation
    settings = TuneSettings(**typed)
    asked = {"folder": str(folder), "tune": asdict(settings), "evaluation": spec.model_dump(mode="json"), **options}
    tell(console, "settings", output=str(output), options=asked)
    tune(folder, output, settings, evaluation=spec, console=console, command=command, **options)
