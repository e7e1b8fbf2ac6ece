"""The command line: finds the command, and turns every failure into one line and an exit code."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from multipruner.commands import COMMANDS
from multipruner.core.errors import MultiprunerError
from multipruner.storage.memory import memory_shortage

_RESUMABLE = ("prune", "search", "latency", "push", "tune")


def _terminate(number: int, frame: object) -> None:
    """A polite kill ends a run as Ctrl-C does."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; user errors become one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "prune"
    try:
        signal.signal(signal.SIGTERM, _terminate)
        return import_module(f".{command}", __package__).run(arguments)
    except MultiprunerError as error:
        if "--debug" in arguments:
            raise
        print(f"multipruner: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if "--debug" in arguments:
            raise
        hint = "; the same command goes on from here" if command in _RESUMABLE else ""
        print(f"multipruner: stopped{hint}", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in arguments:
            raise
        if shortage := memory_shortage(error):
            print(f"multipruner: {shortage}", file=sys.stderr)
            return 2
        print(f"multipruner: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 1
