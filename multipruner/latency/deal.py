"""Which options stand where in a probe."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from multipruner.core.structure import GONE, Anatomy, Size, Structure


class Deck:
    """Options in random order, every one once before any comes again."""

    def __init__(self, options: Sequence[Size], rng: random.Random) -> None:
        self._options, self._rng = list(options), rng
        self._left: list[Size] = []

    def draw(self, count: int) -> list[Size]:
        """Return the next options."""
        drawn: list[Size] = []
        while len(drawn) < count:
            if not self._left:
                self._left = self._rng.sample(self._options, len(self._options))
            drawn.append(self._left.pop())
        return drawn


def deal(decks: Mapping[str, Deck], layers: int, anatomy: Anatomy, rng: random.Random) -> Structure:
    """Return a structure whose first layers hold the decks' next options in random places, and the others nothing.

    No layer of the probe loses all its blocks, for it would vanish.

    Args:
        decks: of every kind of block.
        layers: of the probe.
        anatomy: of the dense model, every layer of which has a block of each kind, all of one size.
        rng: chance.
    """
    drawn = {kind: deck.draw(layers) for kind, deck in decks.items()}
    for _ in range(200):
        for options in drawn.values():
            rng.shuffle(options)
        if all(map(any, zip(*drawn.values(), strict=True))):
            break
    sizes = []
    for place in anatomy:
        if place.layer >= layers:
            sizes.append(GONE)
            continue
        size = drawn[place.kind][place.layer]
        alone = not any(drawn[kind][place.layer] for kind in decks)
        first = place.kind == next(iter(decks))
        sizes.append(place.dense if alone and first else size)
    return Structure(tuple(sizes))
