"""Amounts as typed: a share of the dense model, or a number with a unit."""

from __future__ import annotations

import re

from multipruner.core.errors import ConfigError

_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([a-zA-Z]*)\s*")
UNITS: dict[str, dict[str, float]] = {
    "parameters": {"": 1, "k": 1e3, "M": 1e6, "B": 1e9},
    "weight_bytes": {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    "kv_bytes": {"": 1, "KiB": 2**10, "MiB": 2**20, "KB": 1e3, "MB": 1e6},
    "flops": {"": 1, "M": 1e6, "G": 1e9},
    "latency": {"": 1, "ms": 1, "s": 1e3},
}
"""What a unit multiplies, by cost; latency is in milliseconds."""


def amount_of(name: str, text: str, dense: float) -> float:
    """An upper bound as typed: ``0.7x`` of the dense model, or a number with a unit.

    Raises:
        ConfigError: for what is neither, or a share outside 0 to 1.
    """
    units = UNITS[name]
    match = _AMOUNT.fullmatch(text)
    if match and match[2] == "x":
        share = float(match[1])
        if not 0 < share <= 1:
            raise ConfigError(f"{name} {text}: a share of the dense model lies between 0 and 1")
        return share * dense
    if not match or match[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ConfigError(f"{name} {text!r}: give a share such as 0.7x, or a number ({known})")
    return float(match[1]) * units[match[2]]
