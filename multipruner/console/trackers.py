"""A run in an experiment tracker (``--track``): one more listener of the events, which jobs know nothing of.

What is told comes from accelerate's own classes of trackers, without an ``Accelerator``. Numbers of an event become
series, what a run was asked (the event ``settings``) becomes the tracker's table of parameters:

==============================  ========================================================================
``seconds/STAGE``               of every stage, when it ends
``progress/STAGE/WHAT``         share that is done
``calibration/loss``, ...       every number of a ``loss`` or ``decision``, below its ``what``
``forecast/...``, ``result/...``  every number of these events, perplexities and accuracies among them
``failed``                      1 where the run did not get to its end
==============================  ========================================================================
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from multipruner.core.errors import ConfigError, did_you_mean, in_brief

PROJECT = "multipruner"
FOLDER = Path("tensorboard-runs")
"""Where trackers write that want a folder, below the one that the command was given in; no name of a package."""
EVERY = 1.0
"""Seconds between two numbers of the same progress."""
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
"""Where accelerate reads that there are other processes."""
_OF_EVERY_EVENT = ("time", "event", "what", "step")


@dataclass(frozen=True, slots=True)
class Kind:
    """What is particular about a tracker; its class is accelerate's of the same name.

    Attributes:
        packages: any of which it needs.
        install: what pip is to install.
        hint: what to look at when it does not begin.
        named: its options that give a run a name.
        environment: variables that are set where nobody has set them: no statistics of use are sent, and a server that
            is not there holds a run up for seconds, not minutes.
        steps: whether every series may count for itself; else all share one count, which never goes back.
    """

    packages: tuple[str, ...]
    install: str
    hint: str
    named: Callable[[str], dict[str, Any]]
    environment: tuple[tuple[str, str], ...] = ()
    steps: bool = True


TRACKERS = {
    "tensorboard": Kind(
        ("tensorboard", "tensorboardX"),
        "'multipruner[track]'",
        f"can the folder {FOLDER} be written?",
        lambda name: {},
    ),
    "mlflow": Kind(
        ("mlflow",),
        "mlflow",
        "MLFLOW_TRACKING_URI says where its server or database is, such as sqlite:///mlflow.db",
        lambda name: {"run_name": name},
        (
            ("MLFLOW_DISABLE_TELEMETRY", "true"),
            ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
            ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
        ),
    ),
    "wandb": Kind(
        ("wandb",),
        "wandb",
        "run 'wandb login', or set WANDB_MODE=offline",
        lambda name: {"name": name, "settings": {"console": "off"}},  # the screen is no event, and hides no secrets
        (("WANDB_ERROR_REPORTING", "false"),),
        steps=False,
    ),
}
"""The trackers by name."""


class Tracker:
    """Tells one tracker of a run; a listener of :class:`multipruner.console.events.EventLog`.

    Args:
        name: a key of :data:`TRACKERS`.
        project: that the run is filed under.

    Raises:
        ConfigError: when there is no such tracker, or it is not installed; the text says what pip is to install.
    """

    def __init__(self, name: str, project: str = PROJECT) -> None:
        if name not in TRACKERS:
            raise ConfigError(f"--track {name}{did_you_mean(name, TRACKERS)}: there are {', '.join(TRACKERS)}")
        self.name, self._kind, self._project = name, TRACKERS[name], project
        if not any(_is_installed(package) for package in self._kind.packages):
            raise ConfigError(f"--track {name}: {name} is not installed; pip install {self._kind.install}")
        self._about: dict[str, Any] = {}
        self._to: Any = None
        self._counts: dict[str, int] = {}
        self._shown: dict[str, float] = {}

    def hear(self, event: Mapping[str, Any], /) -> None:
        """Begin with the settings, and take the numbers of everything after them.

        Raises:
            ConfigError: when the tracker does not begin.
        """
        if event["event"] == "run began":
            self._about = {name: event[name] for name in ("command", "version")}
        elif event["event"] == "settings":
            self._begin(event)
        elif self._to is not None and not self._is_too_soon(event):
            self._log(event)

    def close(self) -> None:
        """End the run in the tracker."""
        if self._to is not None:
            with _alone():
                self._to.finish()

    def _begin(self, event: Mapping[str, Any]) -> None:
        for variable, value in self._kind.environment:
            os.environ.setdefault(variable, value)
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        output = Path(str(event.get("output") or self._about.get("command", "run")))
        name = f"{_part(output.name)}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        try:
            with _alone():
                if kind.requires_logging_directory:
                    told = kind(name, FOLDER / _part(self._project), **self._kind.named(name))
                else:
                    told = kind(self._project, **self._kind.named(name))
                told.start()
                told.store_init_configuration({**self._about, **parameters_of(event)})
        except Exception as error:
            raise ConfigError(f"--track {self.name} cannot begin ({in_brief(error)}): {self._kind.hint}") from error
        self._to = told

    def _is_too_soon(self, event: Mapping[str, Any]) -> bool:
        """Tell whether it is progress that a reader would not miss."""
        if event["event"] != "progress":
            return False
        what, now = f"{event['stage']} {event['what']}", time.monotonic()
        ends = not event["done"] or event["done"] >= event["total"]
        if not ends and now - self._shown.get(what, -EVERY) < EVERY:
            return True
        self._shown[what] = now
        return False

    def _log(self, event: Mapping[str, Any]) -> None:
        """Hand the numbers of an event on, at the step it names, or the next one of its series."""
        numbers = numbers_of(event)
        if not numbers:
            return
        first, step = next(iter(numbers)), event.get("step")
        if not isinstance(step, int):
            step = self._counts[first] = self._counts.get(first, -1) + 1
        with _alone():
            if self._kind.steps:
                self._to.log(numbers, step=step)
            else:
                self._to.log({**numbers, f"{first.partition('/')[0]}/step": step} if "step" in event else numbers)


def _is_installed(package: str) -> bool:
    """Tell whether it can be imported; a mere folder of its name, such as some trackers write, cannot."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


def numbers_of(event: Mapping[str, Any]) -> dict[str, float]:
    """Return the series that an event adds to, each with its number; empty where it has none.

    What is counted by folder of this machine, such as bytes on its disks, is left out.

    Args:
        event: see :mod:`multipruner.console.events`.
    """
    kind = event["event"]
    if kind == "stage ended":
        return {f"seconds/{_part(event['stage'])}": event["seconds"]}
    if kind == "progress":
        if not event["total"]:
            return {}
        place = "/".join(_part(part) for part in (event["stage"], event["what"]) if part)
        return {f"progress/{place}": min(event["done"] / event["total"], 1.0)}
    if kind == "run ended":
        return {"failed": float(event["outcome"] != "done")}
    heads = {"forecast": "forecast", "result": "result", "loss": event.get("what"), "decision": event.get("what")}
    if (head := heads.get(kind)) is None:
        return {}
    inner = {name: value for name, value in event.items() if name not in _OF_EVERY_EVENT}
    return {
        "/".join(_part(part) for part in (head, *names)): value
        for names, value in _leaves(inner)
        if isinstance(value, int | float) and not isinstance(value, bool) and not Path(names[-1]).is_absolute()
    }


def _leaves(values: Mapping[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Walk through what is within mappings, each with the names that lead to it."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, *above, name)
        else:
            yield (*above, name), value


def parameters_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run was asked, by dotted keys as a recipe's are typed; trackers take texts, numbers and switches.

    Args:
        event: ``settings``, see :mod:`multipruner.console.events`.
    """
    found = {}
    for names, value in _leaves({name: value for name, value in event.items() if name not in _OF_EVERY_EVENT}):
        plain = value is None or isinstance(value, bool | int | float | str)
        found[".".join(names[names[0] in ("recipe", "options") :])] = value if plain else json.dumps(value)
    return found


def _part(name: Any) -> str:
    """Return a name that every tracker takes as one part of a series' own."""
    return re.sub(r"[^\w.-]+", "_", str(name)).strip("._") or "_"


@contextmanager
def _alone() -> Iterator[None]:
    """Let accelerate know for a while that this process is the one that writes, which its trackers ask at every call.

    A Trainer's answer is left as it is. Where there is none, it must not be looked for among the other processes of a
    job, which do not take part, and nothing of it stays.
    """
    from accelerate.state import PartialState

    if PartialState._shared_state:
        yield
        return
    launched = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    try:
        PartialState(cpu=True)
    finally:
        os.environ.update(launched)
    try:
        yield
    finally:
        PartialState._reset_state()
