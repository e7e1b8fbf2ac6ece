"""What the commands share: a parser that fails in one line, the flags of a recipe's fields, nested keys. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from multipruner.config.choices import LEVELS
from multipruner.core.errors import ConfigError

if TYPE_CHECKING:
    from multipruner.console.events import Screen


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as everything else does; may have a short help beside the whole one.

    Attributes:
        everyday: destinations that the short help shows, and what it says of them where it says less than the whole
            one; empty where there is one help only.
        brief: what the short help begins and ends with.
    """

    def __init__(
        self, *, brief: tuple[str, str] = ("", ""), everyday: Mapping[str, str] | None = None, **options: Any
    ) -> None:
        super().__init__(add_help=False, **options)
        self.everyday, self.brief = dict(everyday or {}), brief
        shown = self.add_argument_group("help")
        shown.add_argument("-h", "--help", action="help", help="show this and end" if not brief[0] else "the everyday "
                           "flags")  # fmt: skip
        shown.add_argument("--help-all", action=_HelpAll, nargs=0, default=argparse.SUPPRESS,
                           help="every flag, in groups" if brief[0] else argparse.SUPPRESS)  # fmt: skip

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (--help{'-all' if self.everyday else ''} lists the flags)")

    def format_help(self) -> str:
        """The everyday flags under one heading, where there is a short help."""
        if not self.everyday:
            return self.format_all()
        first, last = self.brief
        formatter = self._get_formatter()
        formatter.add_text(first)
        formatter.start_section("everyday flags")
        flags = [action for action in self._actions if action.dest in self.everyday]
        last_of_all = [action for action in self._actions if action.dest == "help_all"]
        formatter.add_arguments([self._briefly(action) for action in (*flags, *last_of_all)])
        formatter.end_section()
        formatter.add_text(last)
        return formatter.format_help()

    def _briefly(self, action: argparse.Action) -> argparse.Action:
        """The same flag with the short help's words."""
        short = copy(action)
        short.help = self.everyday.get(action.dest) or action.help
        return short

    def format_all(self) -> str:
        """Every flag under the heading of its group."""
        return super().format_help()


class _HelpAll(argparse.Action):
    """Prints the whole help."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any, **options: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_all(), end="")
        parser.exit()


def add_fields(
    parser: Parser,
    wanted: Callable[[str], bool] = lambda key: True,
    names: Mapping[str, str] | None = None,
    heading: str = "",
) -> None:
    """Add the flags of the recipe's fields. Destinations are the (dotted) keys.

    Args:
        parser: gets them, under the fields' own headings.
        wanted: tells by the key which ones.
        names: flags by key that are called differently here.
        heading: one for all, instead of the fields' own.
    """
    from multipruner.config.fields import flags_of
    from multipruner.config.recipe import Recipe

    groups = {group.title: group for group in parser._action_groups}
    for field in filter(lambda field: wanted(field.key), flags_of(Recipe)):
        title = heading or field.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {"dest": field.key, "help": field.help.replace("%", "%%")}
        if field.kind is bool:
            options["action"] = "store_true"
        elif field.choices:
            options["choices"] = field.choices
        else:
            options |= {"type": field.kind, "metavar": field.metavar}
        groups[title].add_argument((names or {}).get(field.key, field.flag), **options)
        if field.everyday:
            parser.everyday.setdefault(field.key, field.brief)


def log_flags(parser: argparse.ArgumentParser) -> None:
    """What is said, and where programs read it (:func:`on_screen` takes it)."""
    told = parser.add_argument_group("what is told")
    told.add_argument("--log-level", choices=LEVELS, default=argparse.SUPPRESS,
                      help="error: nothing but errors; info (default): stages, decisions and results; debug: what "
                      "libraries say as well")  # fmt: skip
    told.add_argument("--log-json", type=Path, metavar="FILE", default=argparse.SUPPRESS,
                      help="append what happens to a file, one JSON object a line: stages, progress, losses, "
                      "decisions, the result")  # fmt: skip


@contextmanager
def on_screen(typed: dict[str, Any], command: str) -> Iterator[Screen]:
    """The console of a command and its log, as the flags of :func:`log_flags` say.

    Args:
        typed: by destination; these are taken out.
        command: its name.
    """
    from multipruner.console.events import screen
    from multipruner.console.quiet import quiet_libraries

    level = typed.pop("log_level", "info")
    with screen(command, level, typed.pop("log_json", None)) as console:
        if level != "debug":
            quiet_libraries()
        yield console


def nested(arguments: dict[str, Any]) -> dict[str, Any]:
    """``{"calibration.seed": 1}`` as ``{"calibration": {"seed": 1}}``."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        *parents, last = name.split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return result


def evaluation_values(mapping: dict[str, Any]) -> None:
    """Task lists and batch sizes arrive as text.

    Raises:
        ConfigError: for a list without a task.
    """
    evaluation = mapping.get("evaluation", {})
    if isinstance(evaluation.get("tasks"), str):
        evaluation["tasks"] = [task.strip() for task in evaluation["tasks"].split(",") if task.strip()]
        if not evaluation["tasks"]:
            raise ConfigError("no task is named: give ppl, names of lm-eval tasks, or several with commas between them")
    batch = evaluation.get("batch_size")
    if isinstance(batch, str) and batch.isdigit():
        evaluation["batch_size"] = int(batch)
