"""``python -m multipruner push FOLDER user/name``: share a pruned model on the Hugging Face Hub, also at the end of
another command (``--push USER/NAME``).
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.core.errors import ConfigError, MultiprunerError
from multipruner.publish.errors import PublishError
from multipruner.publish.push import check_push, push
from multipruner.publish.upload import Pushed

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
    push(**typed)
    return 0


@dataclass(frozen=True)
class PushLater:
    """A push that another command does at its end; what would stop it is found at the beginning.

    Attributes:
        repo, public, yes, token_file: as for :func:`push`.
    """

    repo: str
    public: bool = False
    yes: bool = False
    token_file: Path | None = None

    @staticmethod
    def flags(parser: Any) -> None:
        """Add ``--push USER/NAME`` and what belongs to it to a parser or a group of one."""
        absent: dict[str, Any] = {"default": argparse.SUPPRESS}
        parser.add_argument("--push", metavar="USER/NAME", help="share the result on the Hugging Face Hub", **absent)
        parser.add_argument("--public", action="store_true", help="for everybody to see; asks at the start", **absent)
        parser.add_argument("--yes", action="store_true", help="do not ask", **absent)
        parser.add_argument("--token-file", metavar="FILE", type=Path, help="a file with the Hub token; default "
                            "HF_TOKEN, else `hf auth login`", **absent)  # fmt: skip

    @classmethod
    def take(cls, typed: dict[str, Any]) -> PushLater | None:
        """Return what was typed about a push, taken out of ``typed``; ``None`` when nothing was.

        Raises:
            ConfigError: for a flag that says how to push without one that says where.
        """
        given = {name: typed.pop(name) for name in ("push", "public", "yes", "token_file") if name in typed}
        repo = given.pop("push", None)
        if repo is None and given:
            raise ConfigError(f"--{next(iter(given)).replace('_', '-')} is about --push USER/NAME, which is not there")
        return None if repo is None else cls(repo, **given)

    @classmethod
    def without(cls, arguments: Sequence[str]) -> list[str]:
        """Return a command line's arguments less these flags: how a result was made, not where its maker's token
        lies.
        """
        parser = argparse.ArgumentParser(add_help=False)
        cls.flags(parser)
        return parser.parse_known_args(arguments)[1]

    def check(self, **options: Any) -> None:
        """Check before the work what can be known about the push, see :func:`check_push`.

        Raises:
            PublishError: as the push would.
        """
        check_push(self.repo, public=self.public, yes=self.yes, token_file=self.token_file, **options)

    def run(self, folder: str | Path, **options: Any) -> Pushed | None:
        """Push after the work, without asking again (:func:`push`).

        Files in the folder that are not part of the run stay there, and are named.

        Raises:
            PublishError: naming the command that pushes what is finished.
        """
        more = {"skip_foreign": True, **options}
        try:
            return push(folder, self.repo, public=self.public, yes=True, token_file=self.token_file, **more)
        except MultiprunerError as error:
            token = ["--token-file", str(self.token_file)] if self.token_file else []
            words = ["push", str(folder), self.repo, *(["--public"] if self.public else []), *token]
            later = f"the run is finished; to push it: python -m multipruner {shlex.join(words)}"
            raise PublishError(f"{error}. {later}") from error
