"""Which of the programs that serve models are here."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from multipruner.config.choices import RUNTIMES

HERE = [
    name
    for name, row in RUNTIMES.items()
    if row.export and all(find_spec(one.replace("-", "_")) for one in row.packages)
]
SERVED = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in HERE,
            reason=f"{name} is not installed (pip install {' '.join(row.packages)})",
        ),
    )
    for name, row in RUNTIMES.items()
    if row.export
]
