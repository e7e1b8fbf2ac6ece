"""Old names of keys, values and flags: one table. Version 0.2 accepts them with a line that names the new ones.

What is kept in files by which measured losses are found (identities in journals and in the cache) stays in the spelling
of version 1, so that no loss is measured again; :func:`now_called` shows it in today's words.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from multipruner.core.errors import ConfigError

from .choices import METHODS

FOUND_BY = "<found by>"
"""Key among the sources of a recipe, of commands alone: the method that finds the structure whatever the recipe says.
The preset of the recipe's own method stays."""


class OldSpelling(UserWarning):
    """A name of an earlier version was used; the text says what it is called now."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """One thing that is called otherwise now.

    Attributes:
        where: ``recipe``, ``report``, ``search`` or ``sweep`` (flags of these), ``text`` (tensors of ready token ids),
            ``identity`` (what losses depend on, as journals keep it).
        old, new: dotted keys; the same where only values have changed.
        values: old value -> new value.
        goes_to: the key that takes the value, where it is not ``new``.
    """

    where: str
    old: str
    new: str
    values: Mapping[str, str] = field(default_factory=dict)
    goes_to: str = ""


_FINDERS = {"milp": "program", "sequential": "greedy"}
SPELLINGS: tuple[Spelling, ...] = (
    Spelling("recipe", "compensation", "repair"),
    Spelling("recipe", "compensate", "repair_stage"),
    Spelling("recipe", "method", "method", {"global": "program"}),
    Spelling("recipe", "strategy", "method", _FINDERS, FOUND_BY),
    Spelling("recipe", "order", "stages"),
    Spelling("recipe", "calibration.statistics_sequences", "calibration.moments_sequences"),
    Spelling("search", "compensations", "repairs"),
    Spelling("search", "seeds", "seeds", _FINDERS),
    Spelling("sweep", "sweep_sequential", "sweep_greedy"),
    Spelling("report", "calibration.statistics_tokens", "calibration.moments_tokens"),
    Spelling("report", "search.statistics_tokens", "search.moments_tokens"),
    Spelling("report", "search.strategy", "search.method", _FINDERS),
    Spelling("report", "seconds.statistics", "seconds.moments"),
    Spelling("text", "statistics_ids", "moments_ids"),
    Spelling("identity", "compensation", "repair"),
    Spelling("identity", "compensations", "repairs"),
    Spelling("identity", "strategy", "method", _FINDERS),
    Spelling("identity", "seeds", "seeds", _FINDERS),
    Spelling("identity", "order", "stages"),
    Spelling("identity", "statistics", "moments"),
)


def old_flags(where: str) -> Iterator[tuple[str, str]]:
    """Yield old keys of flags and the keys they are now, for parsers."""
    return ((row.old, row.new) for row in SPELLINGS if row.where == where and row.old != row.new)


def respelled(where: str, given: Mapping[str, Any], origin: str = "") -> dict[str, Any]:
    """Return a mapping in today's words; one warning says which old ones there were.

    Args:
        where: see :class:`Spelling`.
        given: nested mappings; stays as it is.
        origin: what the mapping is of, for the warning.

    Raises:
        ConfigError: when something is said in both spellings.
    """
    found, told = _copy(given), list[str]()
    if where == "report" and isinstance(found.get("recipe"), dict):
        told += _put_right("recipe", found["recipe"])
        settle_method(found["recipe"])
    told += _put_right(where, found)
    if told:
        warnings.warn(f"{origin + ': ' if origin else ''}{_sentence(told)}", OldSpelling, stacklevel=2)
    return found


def settle_method(given: dict[str, Any]) -> None:
    """Make what the structure is to be found by the method, where the recipe's own does not find it so anyway."""
    finder, row = given.pop(FOUND_BY, None), METHODS.get(str(given.get("method", next(iter(METHODS)))))
    other = METHODS.get(str(finder))
    if finder is not None and not (row and other and row.by == other.by):
        given["method"] = finder


def value_now(where: str, key: str, value: str) -> str:
    """Return a value of a flag in today's words; a warning names an old one."""
    return str(respelled(where, {key: value}).get(key, value))


def now_called(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what losses depend on, in today's words, for messages."""
    names = {row.old: row for row in SPELLINGS if row.where == "identity"}
    return {
        names[key].new if key in names else key: _now(names[key].values, value) if key in names else value
        for key, value in identity.items()
    }


def _put_right(where: str, found: dict[str, Any]) -> list[str]:
    """Change a mapping into today's words, and say what has changed."""
    told: list[str] = []
    for row in (row for row in SPELLINGS if row.where == where):
        *parents, last = row.old.split(".")
        table: Any = found
        for parent in parents:
            table = table.get(parent) if isinstance(table, dict) else None
        if isinstance(table, dict) and last in table:
            told += _moved(row, table, last)
    return told


def _moved(row: Spelling, table: dict[str, Any], old: str) -> list[str]:
    """Put one entry where it belongs now, and say what has changed."""
    value, new = table[old], row.new.rpartition(".")[2]
    changed = _now(row.values, value)
    if old == new:
        table[old] = changed
        return [f"{row.old} {value} is {changed}"] if changed != value else []
    target = row.goes_to or new
    if target in table and target != FOUND_BY:
        raise ConfigError(f"{row.old} is an old name of {row.new}: both are given; say {row.new} alone")
    del table[old]
    table[target] = changed
    return [
        f"{row.old} {value} is {row.new} {changed}" if row.values and changed != value else f"{row.old} is {row.new}"
    ]


def _now(values: Mapping[str, str], value: Any) -> Any:
    """Return a value, the parts of a list, or those of a text with commas."""
    if isinstance(value, (list, tuple)):
        return type(value)(_now(values, one) for one in value)
    if isinstance(value, str) and values:
        return ",".join(values.get(part.strip(), part) for part in value.split(","))
    return value


def _copy(given: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in given.items()}


def _sentence(told: Iterable[str]) -> str:
    return f"old spelling, accepted for one version: {'; '.join(told)} now"
