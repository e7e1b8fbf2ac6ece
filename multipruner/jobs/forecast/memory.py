"""How much memory and disk a run takes, counted from its recipe: arithmetic, which measures nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .work import Base, Candidate, Shape, Texts

_BATCH = 4096
"""Tokens that run together while moments are gathered (:data:`multipruner.engine.moments.BATCH_TOKENS`)."""
_TEMPORARIES = 4
"""Of a block's width, that a pass has at once: gate, up, their product, and what is cast."""


_MATRICES = 6
"""As large as a block's moments, that an order or the errors of its outputs take at once."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What memory depends on beside the shape.

    Attributes:
        weights: bytes of the weights as they are computed with, all that is kept of them included.
        result: bytes of the pruned weights as they are stored.
        item: bytes of a number that is computed with.
        kv: bytes of keys and values for one token.
        vocabulary: tokens that there are.
        states: bytes that the states of scored text may take.
        moments: whether second moments stay in memory.
        on_disk: whether decoder layers do not, nor what is as large as all of them.
    """

    weights: int
    result: int
    item: int
    kv: int
    vocabulary: int
    states: int
    moments: bool = True
    on_disk: bool = False


def peaks(
    stages: Iterable[str], texts: Texts, shape: Shape, sizes: Sizes, base: Base, options: Iterable[Candidate]
) -> dict[str, int]:
    """Return bytes of the largest things that are there at once, by stage, beside what an idle process has.

    Args:
        stages: that there are.
        texts, shape, sizes: of the run.
        base: a structure such as will be found.
        options: what is scored with a repair, and kept repaired.
    """
    item, hidden = sizes.item, shape.hidden
    stream = texts.statistics * texts.length * hidden * item
    moments = grams(texts, shape) if sizes.moments else 0
    narrowed = {(one.block, one.kept) for one in options if 0 < one.kept < 1} if texts.statistics else set()
    repaired = sum(int(kept * shape.inputs[block]) * hidden * item for block, kept in narrowed) if sizes.moments else 0
    widest = max(shape.inputs)
    square = 4 * widest**2 if texts.statistics else 0
    pruned, written = (0, 0) if sizes.on_disk else (sizes.result * item // 2, 2 * sizes.result)
    state = (1 if sizes.on_disk else shape.blocks + 1) * texts.length * hidden * item
    states = min(sizes.states, state * texts.scored) + min(sizes.states, state * texts.sketched)
    rows = min(texts.side_by_side, texts.sampled)
    outputs = sum(kept * n for kept, n in zip(base.kept, shape.inputs, strict=True)) * hidden * item
    refit = 0 if sizes.on_disk else outputs
    found: Mapping[str, float] = {
        "text": rows * (texts.length * sizes.kv * (1 + 1 / shape.layers) + sizes.vocabulary * (item + 12)),
        "moments": moments + 2 * stream + max(_BATCH * widest * _TEMPORARIES * item, _MATRICES * square),
        "search": moments + repaired + states + _MATRICES * square,
        "repair": moments + repaired + 3 * stream + stream * widest / hidden + refit + 3 * square,
        "evaluation": moments + repaired + refit + pruned,
        "writing": moments + repaired + refit + written,
    }
    return {stage: int(sizes.weights + found.get(stage, 0)) for stage in stages}


def grams(texts: Texts, shape: Shape) -> int:
    """Return bytes of all second moments."""
    return sum(4 * n * n for n in shape.inputs) if texts.statistics else 0
