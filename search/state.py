"""The state of an evolutionary search on disk: one JSON file, replaced whole after every generation."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.core.errors import ConfigError, OutputError
from multipruner.storage.files import write_atomically

FORMAT = "multipruner-evolution"
VERSION = 1


@dataclass
class State:
    """All that the next generation depends on.

    Attributes:
        rng: the generator's state, as :func:`rng_to_json` gives it.
        population: places in the table of the fidelity at which the population lives.
        stalled: generations since the archive last changed.
        tables: what :meth:`multipruner.search.scoring.Scorer.to_json` gives.
        history: the logbook's records, one per finished generation.
    """

    rng: list[Any]
    population: list[int]
    stalled: int
    tables: list[Any]
    history: list[dict[str, Any]]


def rng_to_json(rng: random.Random) -> list[Any]:
    """Return a generator's state as JSON."""
    version, words, gauss = rng.getstate()
    return [version, list(words), gauss]


def rng_from_json(value: list[Any]) -> random.Random:
    """Return the inverse of :func:`rng_to_json`."""
    rng = random.Random()
    rng.setstate((value[0], tuple(value[1]), value[2]))
    return rng


def save(path: Path, identity: Mapping[str, Any], state: State) -> None:
    """Replace the checkpoint.

    Raises:
        OutputError: when it cannot be written.
    """
    record = {"format": FORMAT, "version": VERSION, "identity": dict(identity), **vars(state)}
    write_atomically(path, json.dumps(record, separators=(",", ":")) + "\n")


def load(path: Path, identity: Mapping[str, Any]) -> State | None:
    """Return the state that was saved last, or ``None`` when there is none.

    Raises:
        ConfigError: when it belongs to another search; names what differs.
        OutputError: when the file is something else, or of a newer format.
    """
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_bytes())
        if (record.pop("format"), record.pop("version")) != (FORMAT, VERSION):
            raise ValueError("another format")
        theirs, state = record.pop("identity"), State(**record)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise OutputError(f"{path} is not a checkpoint that this version of multipruner reads; remove it") from None
    ours = json.loads(json.dumps(dict(identity)))
    different = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    if different:
        listed = "; ".join(f"{name}: {_short(theirs.get(name))} -> {_short(ours.get(name))}" for name in different)
        raise ConfigError(f"{path} belongs to another search ({listed}); give another folder, or remove it")
    return state


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
