"""The command line: finds the command, and turns every failure into one line and an exit code."""

from __future__ import annotations

import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from multipruner.commands import COMMANDS
from multipruner.config.spellings import OldSpelling
from multipruner.core.errors import MultiprunerError
from multipruner.storage.memory import memory_shortage

_RESUMABLE = ("prune", "search", "latency", "push", "tune")
_LESS_MEMORY = {
    "prune": "lower --length, --sequences or --moments-sequences, give --moments disk",
    "search": "lower --length, --sequences or --moments-sequences, give --moments disk",
    "eval": "lower --batch-size or --limit",
    "tune": "lower --micro-batch, --length or --rank, give --gradient-checkpointing",
    "latency": "lower --batch, --prompt or --cached",
}
"""What of a command's flags makes it need less memory."""


def _terminate(number: int, frame: object) -> None:
    """End a run by a polite kill as Ctrl-C does."""
    raise KeyboardInterrupt


@contextmanager
def _old_spellings_in_one_line() -> Iterator[None]:
    """Say every old name once, in a line on standard error; other warnings stay as they are."""
    said: set[str] = set()
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any, **options: Any) -> None:
            if category is not OldSpelling:
                others(message, category, *rest, **options)
            elif str(message) not in said:
                said.add(str(message))
                print(f"multipruner: {message}", file=sys.stderr)

        warnings.showwarning = show
        warnings.simplefilter("always", OldSpelling)
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; user errors become one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "prune"
    try:
        signal.signal(signal.SIGTERM, _terminate)
        with _old_spellings_in_one_line():
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
        if shortage := memory_shortage(error, _LESS_MEMORY.get(command, "")):
            print(f"multipruner: {shortage}", file=sys.stderr)
            return 2
        print(f"multipruner: {type(error).__name__}: {error} (--debug shows where)", file=sys.stderr)
        return 1
