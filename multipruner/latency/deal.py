"""Which options stand where in a probe."""

from __future__ import annotations

import random
from collections.abc import Sequence

from multipruner.core.latency_table import Width
from multipruner.core.structure import LayerSize, Structure


class Deck:
    """Options in random order, every one once before any comes again."""

    def __init__(self, options: Sequence[Width], rng: random.Random) -> None:
        self._options, self._rng = list(options), rng
        self._left: list[Width] = []

    def draw(self, count: int) -> list[Width]:
        """The next options."""
        drawn: list[Width] = []
        while len(drawn) < count:
            if not self._left:
                self._left = self._rng.sample(self._options, len(self._options))
            drawn.append(self._left.pop())
        return drawn


def deal(attention: Deck, mlp: Deck, layers: int, full: LayerSize, rng: random.Random) -> Structure:
    """Layers with the decks' next options in random places; none loses both blocks, for it would vanish."""
    groups, channels = attention.draw(layers), mlp.draw(layers)
    for _ in range(200):
        rng.shuffle(groups)
        rng.shuffle(channels)
        if all(a or b for a, b in zip(groups, channels, strict=True)):
            break
    per_kv = full.query_heads // full.kv_heads
    pairs = [(a or (0 if b else full.kv_heads), b) for a, b in zip(groups, channels, strict=True)]
    return Structure(tuple(LayerSize(a * per_kv, a, b) for a, b in pairs))
