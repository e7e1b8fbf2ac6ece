"""Numbers as people read them, and what is said in several places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from multipruner.core.costs import reported_as
from multipruner.eval.comparison import Contrast

UNREPAIRED = (
    "a plan says what stays and holds no repair: output projections are the dense model's, cut; "
    "`multipruner --plan` repairs them, with the model in memory"
)
"""What is said of a model that a plan alone was made into."""


_WHOLE = """\
## How to load it

A model of several modalities: its text tower was pruned, and the numbers here are of that alone. Everything else is as
it was, and stock transformers open it:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
```"""


def whole_loading(name: str) -> str:
    """Return how a model of several modalities is loaded, by its folder or Hub id."""
    return _WHOLE.format(name=name)


def label_of(cost: str) -> str:
    """Return what a page calls a cost that ``report.json`` or a front names."""
    row = reported_as(cost)
    return row.label if row else cost


def amount(cost: str, value: float) -> str:
    """Return a cost with a unit that keeps the number short."""
    row = reported_as(cost)
    return row.shown(value) if row else f"{value:,.4g}"


def finite(value: Any) -> bool:
    """Tell whether a value of a report is a number, and a finite one."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def measured(value: Any) -> str:
    """Return a value of a report with three digits, or a dash for what is no number."""
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """Return a number, or a dash for none."""
    return "–" if value is None else f"{value:{sign},.{digits}f}".replace("-", "−")


def signed(share: float) -> str:
    """Return a change in per cent."""
    return f"{share:+.1%}".replace("-", "−")


def with_error(value: float, stderr: float | None, digits: int, sign: str = "") -> str:
    """Return a number and its standard error."""
    return number(value, digits, sign) + ("" if stderr is None else f" ±\N{NO-BREAK SPACE}{stderr:,.{digits}f}")


def contrast_cells(contrast: Contrast, digits: int) -> list[str]:
    """Return dense, pruned, difference, number of examples."""
    return [
        with_error(contrast.dense, contrast.dense_stderr, digits),
        with_error(contrast.pruned, contrast.pruned_stderr, digits),
        with_error(contrast.difference, contrast.difference_stderr, digits, "+"),
        f"{contrast.examples:,}" if contrast.examples else "–",
    ]


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.{1 if seconds < 1 else 2}g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tokens_of(calibration: Mapping[str, Any]) -> str:
    """Tell how much text decided, after its name: for scores, and beside it for order and repair, and held out."""
    if (pictures := calibration.get("pictures")) is not None:
        return f", {pictures:,} pictures for scores"
    keys = {"tokens": "tokens for scores", "moments_tokens": "for order and repair", "held_out_tokens": "held out"}
    counts = {key: count for key in keys if isinstance(count := calibration.get(key), int) and count}
    if set(counts) == {"tokens"}:
        return f", {counts['tokens']:,} tokens"
    return "".join(f", {count:,} {keys[key]}" for key, count in counts.items())
