"""What the commands share: a parser that fails in one line, the flags of a recipe's fields, nested keys. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from multipruner.config.choices import LEVELS
from multipruner.console.trackers import FOLDER, PROJECT, TRACKERS, Tracker
from multipruner.core.errors import ConfigError, shortened

from . import COMMANDS

SHELLS = ("bash", "zsh", "fish")

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
        raise ConfigError(f"{shortened(message)} (--help{'-all' if self.everyday else ''} lists the flags)")

    def format_help(self) -> str:
        """Return the everyday flags under one heading, where there is a short help."""
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
        """Return the same flag with the short help's words."""
        short = copy(action)
        short.help = self.everyday.get(action.dest) or action.help
        return short

    def format_all(self) -> str:
        """Return every flag under the heading of its group."""
        return super().format_help()


class _HelpAll(argparse.Action):
    """Prints the whole help."""

    def __call__(self, parser: argparse.ArgumentParser, *rest: Any, **options: Any) -> None:
        assert isinstance(parser, Parser)
        print(parser.format_all(), end="")
        parser.exit()


class PrintCompletion(argparse.Action):
    """Prints the script by which a shell completes the commands, their flags and what these are chosen from."""

    def __call__(self, parser: argparse.ArgumentParser, space: Any, values: Any, *rest: Any) -> None:
        print(completion(str(values)))
        parser.exit()


def completion(shell: str) -> str:
    """Write the script that makes a shell complete ``multipruner`` (one of :data:`SHELLS`)."""
    import shtab

    parsers = {name: _completable(import_module(f".{name}", __package__).make_parser()) for name in COMMANDS}
    root = parsers["prune"]
    # a ready parser for every command, in place of a new one
    ready: Any = lambda **made: parsers[made["prog"]]  # noqa: E731
    commands = root.add_subparsers(metavar="COMMAND", parser_class=ready)
    for name, text in COMMANDS.items():
        if name != "prune":
            commands.add_parser(name, prog=name, help=text)
    return shtab.complete(root, shell)


def _completable(parser: Parser) -> Parser:
    """Return a parser whose flags know what their values are completed with: folders, files or recipes."""
    import shtab

    from multipruner.recipes import names

    for action in parser._actions:
        if action.dest == "model":
            action.choices = ("list", *names())
        elif action.metavar in ("DIR", "FOLDER", "RUN"):
            action.complete = shtab.DIRECTORY  # pyright: ignore[reportAttributeAccessIssue]
        elif action.metavar and "FILE" in str(action.metavar):
            action.complete = shtab.FILE  # pyright: ignore[reportAttributeAccessIssue]
    return parser


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
    from multipruner.config.spellings import old_flags, value_now

    groups = {group.title: group for group in parser._action_groups}
    for field in filter(lambda field: wanted(field.key), flags_of(Recipe)):
        title = heading or field.group
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        options: dict[str, Any] = {"dest": field.key, "help": field.help.replace("%", "%%")}
        if field.kind is bool:
            options["action"] = "store_true"
        elif field.choices:
            options |= {"choices": field.choices, "type": partial(value_now, "recipe", field.key)}
        else:
            options |= {"type": field.kind, "metavar": field.metavar}
        groups[title].add_argument((names or {}).get(field.key, field.flag), **options)
        if field.everyday:
            parser.everyday.setdefault(field.key, field.brief)
    known = {action.dest for action in parser._actions}
    for old, new in old_flags("recipe"):
        if new in known:
            flag = f"--{old.rpartition('.')[2].replace('_', '-')}"
            parser.add_argument(flag, dest=old, help=argparse.SUPPRESS, default=argparse.SUPPRESS)


def log_flags(parser: argparse.ArgumentParser, *, tracked: bool = False) -> None:
    """Add the flags for what is said, and where programs read it (:func:`on_screen` takes it).

    Args:
        parser: gets them.
        tracked: whether the command's runs are worth a place in an experiment tracker.
    """
    told = parser.add_argument_group("what is told")
    told.add_argument("--log-level", choices=LEVELS, default=argparse.SUPPRESS,
                      help="error: nothing but errors; info (default): stages, decisions and results; debug: what "
                      "libraries say as well")  # fmt: skip
    told.add_argument("--log-json", type=Path, metavar="FILE", default=argparse.SUPPRESS,
                      help="append what happens to a file, one JSON object a line: stages, progress, losses, "
                      "decisions, the result")  # fmt: skip
    if not tracked:
        return
    told.add_argument("--track", action="append", metavar="NAMES", default=argparse.SUPPRESS,
                      help=f"tell an experiment tracker of the run, one or several of {', '.join(TRACKERS)}: losses, "
                      "decisions, progress and seconds of every stage, forecast, perplexities and accuracies, with "
                      "flags and recipe as parameters. The tracker's own environment variables hold (WANDB_MODE, "
                      f"MLFLOW_TRACKING_URI); tensorboard reads {FOLDER}/PROJECT. One that fails during a run is left "
                      "out")  # fmt: skip
    told.add_argument("--track-project", metavar="NAME", default=argparse.SUPPRESS,
                      help=f"that the run is filed under (mlflow: the experiment), default {PROJECT}")  # fmt: skip


@contextmanager
def on_screen(typed: dict[str, Any], command: str) -> Iterator[Screen]:
    """Hold the console of a command, its log and its trackers, as the flags of :func:`log_flags` say.

    Args:
        typed: by destination; these are taken out.
        command: its name.

    Raises:
        ConfigError: for a tracker that is unknown or not installed.
        OutputError: for a log that cannot be written.
    """
    from multipruner.console.events import screen
    from multipruner.console.quiet import quiet_libraries

    level = typed.pop("log_level", "info")
    with screen(command, level, typed.pop("log_json", None), _trackers(typed)) as console:
        if level != "debug":
            quiet_libraries()
        yield console


def _trackers(typed: dict[str, Any]) -> list[Tracker]:
    """Return the trackers that were asked for, each once; their flags are taken out."""
    asked, project = typed.pop("track", []), typed.pop("track_project", None)
    names = list(dict.fromkeys(name.strip() for part in asked for name in part.split(",") if name.strip()))
    if not names and (asked or project is not None):
        raise ConfigError(f"--track names no tracker: give one or several of {', '.join(TRACKERS)}")
    return [Tracker(name, project or PROJECT) for name in names]


def nested(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return ``{"calibration.seed": 1}`` as ``{"calibration": {"seed": 1}}``."""
    result: dict[str, Any] = {}
    for name, value in arguments.items():
        *parents, last = name.split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
        table[last] = value
    return result


def evaluation_values(mapping: dict[str, Any]) -> None:
    """Turn task lists and batch sizes, which arrive as text, into what they mean.

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
