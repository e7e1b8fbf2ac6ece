"""``python -m multipruner vocabulary --model MODEL --text TEXT --output DIR``: a model with fewer tokens."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from .base import Parser, add_fields, log_flags, on_screen
from .recipe_flags import recipe_of

_HELP = """\
Cut a model's vocabulary down to what a text needs: a language, a domain, or code. On small models of today the rows of
the embeddings are 13 to 63 % of all parameters, and blocks, channels and heads are none of them.

What stays: every byte (or every character where a tokenizer has no bytes), special and added tokens, what the chat
template, the configuration and the generation settings name, then the tokens that the text has most often, with all
that merging passes through on the way to them. So any text can still be told, if with more tokens. Rows of embeddings
and head are those of the dense model; no weight changes, and text of tokens that stay gives the same logits for them.

The result is an ordinary checkpoint of the same class, with its tokenizer, that transformers open, and that multipruner
prunes like any other:
  python -m multipruner vocabulary --model llama --text alpaca --tokens 24576 --output small-words
  python -m multipruner --model ./small-words --ratio 0.2

It changes what the model reads, and other text than that named costs more tokens, so it never happens unasked. A
twentieth of the text is held out; on it, and on WikiText-2 (or --eval-text), bits per byte are compared, which do not
depend on what a token is. Without --tokens all that the text has stays.

examples
  python -m multipruner vocabulary --model llama --text wikitext2 --text my-texts/ --tokens 32768 --output llama-32k
  python -m multipruner vocabulary --model ./model --text corpus.jsonl --output smaller --dry-run"""


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(
        prog="multipruner vocabulary",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--model", metavar="NAME", required=True, help="the dense model: recipe, Hub id, folder or GGUF"
    )
    parser.add_argument("--text", metavar="TEXT", action="append", required=True,
                        help="text of the language or domain, as for --calibration; may be repeated")  # fmt: skip
    parser.add_argument("--tokens", type=int, metavar="N", default=None,
                        help="how many tokens stay (default: all that the text has)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", required=True, help="the folder to write")
    parser.add_argument("--multiple", type=int, metavar="N", default=64,
                        help="raise the number to a multiple of N, for fast products (default: 64)")  # fmt: skip
    parser.add_argument("--text-tokens", type=int, metavar="N", default=20_000_000,
                        help="tokens read at most of a data set that is streamed (default: 20000000)")  # fmt: skip
    parser.add_argument("--drop-reserved", action="store_true", default=False,
                        help="let added tokens go that are called reserved or unused")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", default=False,
                        help="show what several sizes would save and cost in tokens; write nothing")  # fmt: skip
    parser.add_argument("--no-measure", dest="measure", action="store_false", default=True,
                        help="do not compare bits per byte, which takes memory for the model")  # fmt: skip
    add_fields(
        parser,
        lambda key: key in ("revision", "trust_remote_code", "device", "compute_dtype", "evaluation.text",
                            "calibration.text_column", "calibration.chat_template"),
    )  # fmt: skip
    parser.everyday.clear()  # there are few enough to show them all
    parser.add_argument("--overwrite", action="store_true", default=False, help="replace an earlier result's folder")
    log_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = vars(make_parser().parse_args(arguments))
    typed.pop("debug", None)
    names = ("text", "tokens", "output", "multiple", "text_tokens", "drop_reserved", "dry_run", "measure", "overwrite")
    options = {name: typed.pop(name) for name in names}
    with on_screen(typed, "vocabulary") as console:
        from multipruner.jobs.prune.given_plan import NO_BUDGET
        from multipruner.jobs.vocabulary.run import Wanted, cut_vocabulary

        recipe = recipe_of(typed, {**NO_BUDGET, "repair": "none"})
        command = shlex.join(["python", "-m", "multipruner", "vocabulary", *arguments])
        output, overwrite = options.pop("output"), options.pop("overwrite")
        cut_vocabulary(recipe, Wanted(**options), output, console=console, command=command, overwrite=overwrite)
    return 0
