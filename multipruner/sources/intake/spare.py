"""Tensors that checkpoints hold and stock models have no place for, without harm."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from multipruner.core.families import Family

HARMLESS = re.compile(
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.(self_attn|self_attention|attention|attn)\.(masked_bias|bias)$"
)
"""Tensors that older versions of transformers stored and that follow from the configuration."""
_MOST_AHEAD = 64
"""More layers behind the others than any model has."""


def spare_names(config: Any, spec: Family) -> re.Pattern[str]:
    """Return what tensors are called that a checkpoint may hold and the stock model has no place for: harmless ones,
    layers behind the others that predict further tokens, and the pooler of a model of pictures, which a classifier
    lacks.
    """
    more = min(int(getattr(config, spec.ahead, 0) or 0), _MOST_AHEAD) if spec.ahead else 0
    first = getattr(spec.part_of(config), spec.depth)
    layers = "".join(rf"|^({spec.decoder}\.)?{spec.layers}\.{first + number}\." for number in range(more))
    beside = rf"|^{re.escape(spec.beside)}" if spec.beside else ""
    pooler = "" if spec.task.reads_text else rf"|^({spec.decoder}\.)?pooler\."
    return re.compile(f"{HARMLESS.pattern}{layers}{beside}{pooler}")


def ahead_in(config: Any, spec: Family, names: Callable[[], Iterable[str]]) -> str:
    """Return what tells that a checkpoint has layers that predict further tokens; empty where it has none.

    Args:
        config: of the model.
        spec: its family.
        names: gives those of the tensors in its files.
    """
    if further := getattr(config, spec.ahead or "-", 0):
        return f"{spec.ahead} = {further}"
    return f"{spec.beside}*" if spec.beside and any(name.startswith(spec.beside) for name in names()) else ""
