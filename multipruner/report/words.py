"""Numbers as people read them, and what is said in several places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from multipruner.core.costs import reported_as
from multipruner.core.families import first_row
from multipruner.core.families.tasks import CAUSAL_LM, Task
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


_REMOTE_CODE = (
    "The code of this family travels with the checkpoint and is written for older versions of transformers.\n"
    "multipruner has run it only with a tiny stand-in of the same shape, not with the official code:\n"
    "compare logits before you rely on this model."
)
_OWN = """\
Layers differ in size, so the checkpoint brings its modelling code (needs torch and transformers>=5.14; continuous
batching, which asks for layers that are alike, does not work):"""
_STOCK = """\
Layers are all alike: this is an ordinary checkpoint of its family, for whatever opens the dense one (tried with
transformers 4.57 and newer):"""


_OWN_PICTURES = """\
Layers differ in size, so the checkpoint brings its modelling code (needs torch and transformers>=5.14):"""
_STOCK_PICTURES = """\
Layers are all alike: this is an ordinary checkpoint of its family (where heads left, `config.json` says their width,
which transformers>=5.14 read):"""


def task_named(model_type: str) -> Task:
    """Return what models of a type are for: language models where there is no row."""
    row = first_row(model_type)
    return CAUSAL_LM if row is None else row.task


def whole_loading(name: str) -> str:
    """Return how a model of several modalities is loaded, by its folder or Hub id."""
    return _WHOLE.format(name=name)


def loading(model_type: str, name: str, *, stock: bool) -> str:
    """Return how a checkpoint is loaded.

    Args:
        model_type: of the dense model.
        name: its folder or Hub id.
        stock: whether a stock class opens it.
    """
    row, task = first_row(model_type), task_named(model_type)
    remote = row is not None and row.remote_code
    option = ", trust_remote_code=True" if remote else ""
    own, alike = (_OWN, _STOCK) if task.reads_text else (_OWN_PICTURES, _STOCK_PICTURES)
    trusted, how, other = ", trust_remote_code=True", own, "With" if remote else "Or, running no code from it, with"
    untrusted = "" if stock else ", trust_remote_code=False"  # not given, transformers ask, as the model has code
    if stock:
        trusted, how, other = "", alike, "Or with"
    return f"""\
## How to load it

{how}

```python
from transformers import {task.auto_class}, {task.reader}

model = {task.auto_class}.from_pretrained("{name}"{trusted})
{task.reader_name.rpartition(" ")[2]} = {task.reader}.from_pretrained("{name}"{option or untrusted})
```

{other} the package multipruner:

```python
import multipruner

model = multipruner.load("{name}"{option})
```{chr(10) * 2 + _REMOTE_CODE if remote else ""}"""


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
