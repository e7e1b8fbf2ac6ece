"""Token ids that settings name: in ``config.json``, ``generation_config.json`` and ``tokenizer_config.json``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_NAMED = re.compile(r".*_token_ids?")
"""One id, or several of which each has a meaning: all stay."""


def named_ids(settings: Any) -> Iterator[int]:
    """Yield the ids that settings name and that must stay, at any depth."""
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            if _NAMED.fullmatch(str(key)):
                yield from (one for one in (value if isinstance(value, list) else [value]) if _is_id(one))
            else:
                yield from named_ids(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from named_ids(value)


def renumbered(settings: Any, numbers: Mapping[int, int]) -> Any:
    """Return settings with new ids for the old ones, at any depth; ids of tokens that are gone leave their lists.

    Args:
        settings: what a JSON file holds.
        numbers: new ids by old ones.
    """
    if isinstance(settings, list):
        return [renumbered(value, numbers) for value in settings]
    if not isinstance(settings, Mapping):
        return settings
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if _NAMED.fullmatch(str(key)):
            found[key] = _each(value, numbers)
        elif key in _KNOWN and isinstance(value, list):
            found[key] = _KNOWN[key](value, numbers)
        else:
            found[key] = renumbered(value, numbers)
    return found


def _each(value: Any, numbers: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [_each(one, numbers) for one in value]
    return numbers.get(value, value) if _is_id(value) else value


def _left(values: list[Any], numbers: Mapping[int, int]) -> list[Any]:
    """Return the ids that are still there."""
    return [numbers[one] for one in values if one in numbers]


def _sequences(values: list[Any], numbers: Mapping[int, int]) -> list[Any]:
    """Return the sequences of ids, at any depth of lists, whose ids are all still there: others mean nothing now."""
    if all(_is_id(one) for one in values):
        return [numbers[one] for one in values] if all(one in numbers for one in values) else []
    return [new for one in values if (new := _sequences(one, numbers))]


def _biases(values: list[Any], numbers: Mapping[int, int]) -> list[Any]:
    """Return pairs of a sequence of ids and its bias, for sequences whose ids are all still there."""
    return [[new, bias] for ids, bias in values if (new := _sequences(ids, numbers))]


def _forced(values: list[Any], numbers: Mapping[int, int]) -> list[Any]:
    """Return pairs of a place and the id that stands there, for ids that are still there."""
    return [[place, numbers[one]] for place, one in values if one in numbers]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_KNOWN: Mapping[str, Callable[[list[Any], Mapping[int, int]], list[Any]]] = {
    "suppress_tokens": _left,
    "begin_suppress_tokens": _left,
    "bad_words_ids": _sequences,
    "force_words_ids": _sequences,
    "sequence_bias": _biases,
    "forced_decoder_ids": _forced,
}
"""Settings of other forms (transformers' ``GenerationConfig``), and what becomes of them."""
