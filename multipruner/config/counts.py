"""Whole numbers as recipes and flags have them: within what can be meant, and never beyond 64 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from multipruner.core.errors import ConfigError

MOST = 2**63 - 1
MOST_UNITS = 2**20
"""More than any layer has of anything, and than runs side by side."""
MOST_ROUNDS = 1000
Count = Annotated[int, Field(ge=1, le=MOST)]
Units = Annotated[int, Field(ge=1, le=MOST_UNITS)]
"""Parts of a layer that leave together."""
Rounds = Annotated[int, Field(ge=0, le=MOST_ROUNDS)]
Length = Annotated[int, Field(ge=2, le=MOST)]
"""Tokens of a sequence: one is predicted from another."""
Seed = Annotated[int, Field(ge=0, le=MOST)]


def narrower_sizes(whole: int, step: int) -> tuple[int, ...]:
    """Return the widths of the residual stream that a run with ``--hidden-size auto`` tries below the model's own, the
    widest first: multiples of a step down to half of it.
    """
    return tuple(range((whole - 1) // step * step, whole // 2, -step))


def check_counts(given: Any, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Refuse whole numbers of flags that cannot be meant, all of them in one line.

    Args:
        given: an object that has them as attributes, lists where a flag is given several times; ``None`` is none.
        bounds: least and most by name.

    Raises:
        ConfigError: naming each with its value and what is allowed.
    """
    said = {name: getattr(given, name) for name in bounds}
    faults = [
        f"--{name.replace('_', '-')} {value}: give {least:,} to {most:,}"
        for name, (least, most) in bounds.items()
        for value in (said[name] if isinstance(said[name], list) else [said[name]])
        if value is not None and not least <= value <= most
    ]
    if faults:
        raise ConfigError("; ".join(faults))
