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
        anatomy: of the dense model. A block that is smaller than what it was dealt stays as it is.
        rng: chance.
    """
    seats = {kind: [number for number in anatomy.of_kind(kind) if anatomy[number].layer < layers] for kind in decks}
    drawn = {kind: deck.draw(len(seats[kind])) for kind, deck in decks.items()}
    sizes: dict[int, Size] = {}
    for _ in range(200):
        for kind, options in drawn.items():
            rng.shuffle(options)
            sizes |= zip(seats[kind], options, strict=True)
        if all(any(sizes[number] for number in anatomy.of_layer(layer)) for layer in range(layers)):
            break
    for layer in range(layers):
        first, *others = anatomy.of_layer(layer)
        if not any(sizes[number] for number in (first, *others)):
            sizes[first] = anatomy[first].dense
    dealt = [sizes.get(number, GONE) for number in range(len(anatomy))]
    return Structure(
        tuple(
            size if all(count <= most for count, most in zip(size, place.dense, strict=False)) else place.dense
            for place, size in zip(anatomy, dealt, strict=True)
        )
    )
