"""``python -m multipruner push FOLDER user/name``: share a pruned model on the Hugging Face Hub."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .base import Parser

_HELP = """\
Push a finished run to the Hugging Face Hub: weights, code, tokenizer, plan, report and a model card that says how to
load it from there. Only files of the run go, only changed ones are sent, and an interrupted push goes on.

examples
  python -m multipruner push runs/llama-0.2 me/llama-small --dry-run
  python -m multipruner push runs/llama-0.2 me/llama-small
  python -m multipruner push runs/llama-0.2 me/llama-small --public --tag v1"""

_EPILOG = """\
The token comes from --token-file, HF_TOKEN or `hf auth login`, and must be able to write. There is no flag for the
token itself: others can read a command line. HF_ENDPOINT names another Hub."""


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(
        prog="multipruner push",
        description=_HELP,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="what a run wrote")
    parser.add_argument("repo", metavar="USER/NAME", help="the repository; created when it is not there")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--private", dest="public", action="store_false", help="only for you (default)")
    who.add_argument("--public", dest="public", action="store_true", help="for everybody; asks first")
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument("--token-file", metavar="FILE", type=Path, help="a file with the token")
    parser.add_argument("--dry-run", action="store_true", help="list what would go; needs no token")
    parser.add_argument("--tag", metavar="NAME", help="default: the next free of v1, v2 ...")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--license", metavar="ID", help="default: what the dense model's card says")
    parser.add_argument("--skip-foreign", action="store_true", help="leave out files that are not part of the run")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(public=False)
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = vars(make_parser().parse_args(arguments))
    typed.pop("debug")
    from multipruner.publish.push import push

    push(**typed)
    return 0
