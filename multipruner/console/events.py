"""What a run does as JSON lines, for programs that wrap it: stages, progress, losses, decisions, the result.

A line is an object with ``time`` (UTC, ISO 8601) and ``event``; what else it has:

==============  ========================================================================================
``run began``   ``command``, ``version``, ``process``
``settings``    ``output``, the folder; ``recipe``, where there is one; ``options``: what else the flags came to
``message``     ``text``: what is said on the screen
``forecast``    what ``report.json`` says under this name, before anything is measured
``stage began``, ``stage ended``  ``stage``, a key of the report's ``seconds``; ``seconds``
``progress``    ``stage``, ``what``, ``done``, ``total`` (0: not known), ``detail``
``loss``        ``what``, ``loss`` in nats; of a training its ``step``
``decision``    ``what``, and what was decided
``result``      ``folder``, ratios, perplexities
``run ended``   ``outcome``: ``done``, ``failed`` or ``stopped``; ``error``
==============  ========================================================================================

Every line is on its way to the disk before the run goes on, and is written in one piece, so that a kill loses none. A
file is only ever appended to. Others may hear the same events (:class:`Listener`), trackers of experiments for one.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console

from multipruner.core import __version__
from multipruner.core.errors import MultiprunerError, OutputError, in_brief

EVERY = 1.0
"""Seconds between two events of the same progress, unless every one is wanted."""
_SECRET_NAMES = re.compile(r"(TOKEN|SECRET|PASSWORD|API_?KEY|CREDENTIAL)", re.IGNORECASE)
_SECRETS = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=://)[^/\s@]+(?=@)")
"""Keys of the Hub, and who an address is asked as."""
_HIDDEN = "***"
_SHORTEST = 6
"""Characters of a secret: shorter values of such variables are switches."""


class Listener(Protocol):
    """Hears the events of a run as the file has them, without secrets.

    What it raises ends the run where it is a :class:`MultiprunerError`; otherwise it alone is done with.
    """

    @property
    def name(self) -> str:
        """What a warning calls it."""
        ...

    def hear(self, event: Mapping[str, Any], /) -> None:
        """Take one event, a JSON object."""
        ...

    def close(self) -> None:
        """End what was begun; the last call."""
        ...


class EventLog:
    """Appends events to a file, and tells them to others.

    Args:
        path: of the file; made where there is none. ``None``: there is none.
        every: seconds between two events of one progress; 0: every report.
        listeners: who hears them, too.
        warn: told of a listener that failed, which hears nothing more.

    Raises:
        OutputError: when the file cannot be written, or holds something else than events.
    """

    def __init__(
        self,
        path: Path | None,
        every: float = EVERY,
        listeners: Sequence[Listener] = (),
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._path, self._every, self._listeners, self._warn = path, every, list(listeners), warn
        self._lock, self._stages = threading.Lock(), list[str]()
        self._last: tuple[str | None, str, float] = (None, "", 0.0)
        named = {value for name, value in os.environ.items() if _SECRET_NAMES.search(name)}
        self._secrets = sorted((value for value in named if len(value) >= _SHORTEST), key=len, reverse=True)
        try:
            self._stream = None if path is None else _opened(path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; choose another --log-json") from error

    def add(self, event: str, **more: Any) -> None:
        """Append one event; numbers that are none become text.

        Raises:
            OutputError: when it cannot be written.
            MultiprunerError: whatever a listener ends the run with.
        """
        record = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **more}
        plain = _plain(record, self._without_secrets)
        if self._stream is not None:
            line = json.dumps(plain, ensure_ascii=False) + "\n"
            with self._lock:
                try:
                    self._stream.write(line.encode())  # unbuffered: in one piece, and at once
                except OSError as error:
                    raise OutputError(f"cannot write {self._path}: {error.strerror}") from error
        for listener in tuple(self._listeners):
            self._told(listener, lambda one: one.hear(plain))

    def progress(self, what: str, done: float, total: float, detail: str = "") -> None:
        """Append how far something is: its first and its last report, and in between one now and then."""
        stage, now = self._stages[-1] if self._stages else None, time.monotonic()
        before, name, told = self._last
        if (stage, what) == (before, name) and now - told < self._every and not (total and done >= total):
            return
        self._last = (stage, what, now)
        self.add("progress", stage=stage, what=what, done=done, total=total, detail=" ".join(detail.split()))

    def began(self, stage: str) -> None:
        """Note that a stage of the report begins."""
        self._stages.append(stage)
        self.add("stage began", stage=stage)

    def ended(self, stage: str, seconds: float, *, whole: bool = True) -> None:
        """Note that it is over, or what was raised within ended it."""
        self._stages.remove(stage)
        self.add("stage ended", stage=stage, seconds=round(seconds, 3), whole=whole)

    def close(self) -> None:
        """Let the listeners end, and go of the file."""
        for listener in tuple(self._listeners):
            self._told(listener, lambda one: one.close())
        if self._stream is not None:
            self._stream.close()

    def _told(self, listener: Listener, what: Callable[[Listener], None]) -> None:
        """Have a listener do something; one that fails hears nothing more, and the run goes on without it."""
        if listener not in self._listeners:  # it failed at the message of another's failure
            return
        try:
            what(listener)
        except MultiprunerError:
            self._listeners.remove(listener)
            raise
        except Exception as error:
            self._listeners.remove(listener)
            text = f"warning: {listener.name} takes no events any more ({in_brief(error)}); the run goes on without it"
            self._warn(text)
            with suppress(MultiprunerError):
                self.add("message", text=text)

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, _HIDDEN)
        return _SECRETS.sub(_HIDDEN, text)


def _plain(value: Any, hide: Callable[[str], str]) -> Any:
    """Return a value of JSON, with every text as ``hide`` returns it: other numbers than finite ones are no numbers
    there.
    """
    if isinstance(value, Mapping):
        return {hide(str(key)): _plain(inner, hide) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, hide) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if value is None or isinstance(value, bool | int) else hide(str(value))


def _opened(path: Path) -> IO[bytes]:
    """Return the file at its end, after a newline.

    Raises:
        OutputError: when it holds something else than events.
    """
    stream = path.open("ab+", buffering=0)
    size = stream.seek(0, os.SEEK_END)
    if not size:
        return stream
    stream.seek(0)
    first = stream.readline(1 << 16)
    try:
        ours = "event" in json.loads(first)
    except (ValueError, TypeError):
        ours = False
    if not ours:
        stream.close()
        raise OutputError(f"{path} is there and holds no events of a run; move it, or choose another --log-json")
    stream.seek(size - 1)
    if stream.read(1) != b"\n":  # a line that was torn off, by a machine that went down
        stream.write(b"\n")
    return stream


class Screen(Console):
    """A console whose stages and messages are events as well.

    Attributes:
        events: where they go; ``None`` where nobody asked for them.
    """

    def __init__(self, events: EventLog | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.events = events


def events_of(console: Console) -> EventLog | None:
    """Tell where the events of what a console shows go."""
    return console.events if isinstance(console, Screen) else None


def tell(console: Console, event: str, **more: Any) -> None:
    """Append one event, where events are wanted."""
    if (log := events_of(console)) is not None:
        log.add(event, **more)


@contextmanager
def screen(
    command: str, level: str = "info", path: Path | None = None, listeners: Sequence[Listener] = ()
) -> Iterator[Screen]:
    """Hold the console of one command, and its log from the first event to the last.

    Args:
        command: that runs.
        level: one of :data:`multipruner.config.choices.LEVELS`; with ``debug`` every report of progress is an event.
        path: of the log; ``None``: there is none.
        listeners: who hears the events, too. Only the first of several processes of a job writes or tells any.

    Raises:
        OutputError: see :class:`EventLog`.
    """
    shown = Screen(quiet=level == "error")
    if os.environ.get("RANK", "0") != "0" or (path is None and not listeners):
        yield shown
        return

    def warn(text: str) -> None:
        shown.print(text, highlight=False, markup=False, soft_wrap=True)

    shown.events = log = EventLog(path, 0.0 if level == "debug" else EVERY, listeners, warn)
    log.add("run began", command=command, version=__version__, process=os.getpid())
    outcome: dict[str, Any] = {"outcome": "done"}
    try:
        yield shown
    except KeyboardInterrupt:
        outcome = {"outcome": "stopped"}
        raise
    except BaseException as error:
        kind = {} if isinstance(error, MultiprunerError) else {"kind": type(error).__name__}
        outcome = {"outcome": "failed", "error": " ".join(str(error).split()), **kind}
        raise
    finally:
        log.add("run ended", **outcome)
        log.close()
