"""What an evolutionary search asks of the things it breeds."""

from __future__ import annotations

import random
from collections.abc import Hashable
from typing import Any, Protocol, TypeVar

T = TypeVar("T", bound=Hashable)


class Space(Protocol[T]):
    """Candidates and their operators. Candidates are hashable values; every operator returns one that is allowed.

    Chance comes from the generator that is passed, and from nowhere else.
    """

    @property
    def kind(self) -> str:
        """What a candidate is called in files, such as ``"structure"``."""
        ...

    def random(self, rng: random.Random) -> T:
        """Return any candidate."""
        ...

    def admit(self, candidate: T, rng: random.Random) -> T:
        """Return the candidate itself when it is allowed, else one near it."""
        ...

    def mate(self, one: T, other: T, rng: random.Random) -> tuple[T, T]:
        """Return two children of two parents."""
        ...

    def mutate(self, candidate: T, rng: random.Random, strength: float = 1.0) -> T:
        """Return a neighbour; ``strength`` is the mean number of changes, at least 1."""
        ...

    def to_json(self, candidate: T) -> Any:
        """Return a JSON value that stands for the candidate."""
        ...

    def from_json(self, value: Any) -> T:
        """Return the inverse of :meth:`to_json`."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return what tells this space from another, as JSON."""
        ...
