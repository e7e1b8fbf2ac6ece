"""Amounts as typed: a share of the dense model, or a number with a unit."""

from __future__ import annotations

import re
from math import inf
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from multipruner.core.axes import BLOCK_KINDS, DIMENSIONS, Dimension, units_in
from multipruner.core.costs import cost_named
from multipruner.core.errors import ConfigError

_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*")


def amount_of(name: str, text: str, dense: float) -> float:
    """Return an upper bound as typed: ``0.7x`` of the dense model, or a number with a unit of the cost's row.

    Raises:
        ConfigError: for what is neither, or a share outside 0 to 1.
    """
    units = cost_named(name).typed
    match = _AMOUNT.fullmatch(text)
    if match and match[2] == "x":
        share = float(match[1])
        if not 0 < share <= 1:
            raise ConfigError(f"{name} {text}: a share of the dense model lies between 0 and 1")
        return share * dense
    if not match or match[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ConfigError(f"{name} {text!r}: give a share such as 0.7x, or a number ({known})")
    amount = float(match[1]) * units[match[2]]
    if not 0 < amount < inf:
        raise ConfigError(f"{name} {text}: give more than 0, and a number that a float holds")
    return amount


def shares_of(text: str) -> dict[Dimension, float]:
    """Read the shares of the dimensions as typed: ``44:52:4``, in the order blocks, mlp, heads.

    Raises:
        ValueError: for what is not three numbers.
    """
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != len(DIMENSIONS):
        raise ValueError(f"shares {text!r} do not parse: give blocks:mlp:heads, such as 44:52:4")
    return dict(zip(DIMENSIONS, numbers, strict=True))


def names_of(value: Any) -> Any:
    """Read names as typed, ``"blocks,mlp,heads"``; anything but a text stays as it is."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def in_order(names: tuple[Dimension, ...]) -> tuple[Dimension, ...]:
    """Return dimensions in the order of :data:`~multipruner.core.axes.DIMENSIONS`, each once.

    Raises:
        ValueError: when there is none.
    """
    if not names:
        raise ValueError(f"name one or more of {', '.join(DIMENSIONS)}")
    return tuple(name for name in DIMENSIONS if name in names)


Dimensions = Annotated[tuple[Dimension, ...], BeforeValidator(names_of), AfterValidator(in_order)]
"""Names of dimensions, as typed with commas or as a list."""


def parsed_shares(value: Any) -> Any:
    """Return shares that were typed as a text as :func:`shares_of` reads them, and anything else as it is."""
    return shares_of(value) if isinstance(value, str) else value


def frozen_blocks(text: str | None) -> frozenset[tuple[str, int]]:
    """Read which blocks stay whole as typed: ``0,1,29`` (layers), or ``attention:0-3,mlp:29``.

    Returns:
        (kind, layer) of every block; the kind is empty where all of a layer are meant.

    Raises:
        ValueError: naming what cannot be meant.
    """
    found: set[tuple[str, int]] = set()
    for part in () if text is None else text.replace(" ", "").split(","):
        kind, colon, layers = part.rpartition(":")
        if colon and kind not in BLOCK_KINDS:
            raise ValueError(f"freeze {part!r}: a kind of block is one of {', '.join(BLOCK_KINDS)}")
        try:
            own = units_in(layers)
        except ValueError:
            own = ()
        if not own:
            raise ValueError(f"freeze {part!r}: give layers such as 0,1,29, or with kinds: attention:0-3,mlp:29")
        found |= {(kind, layer) for layer in own}
    return frozenset(found)


def checked_blocks(value: Any) -> Any:
    """Return blocks that stay whole as a text that :func:`frozen_blocks` reads; a list or one layer is such a text too.

    Raises:
        ValueError: naming what cannot be meant.
    """
    if isinstance(value, (int, list, tuple)) and not isinstance(value, bool):
        value = ",".join(map(str, value if isinstance(value, (list, tuple)) else [value]))
    if isinstance(value, str):
        frozen_blocks(value)
    return value
