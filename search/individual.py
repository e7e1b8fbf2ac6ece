"""Individuals as DEAP wants them, without classes written into ``deap.creator``."""

from __future__ import annotations

import random
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from deap import base, tools

T = TypeVar("T", bound=Hashable)


class Minimum(base.Fitness):
    """A fitness of which every value is minimised."""

    weights: Any = ()

    def __init__(self, values: Sequence[float] = ()) -> None:
        self.weights = (-1.0,) * len(values)
        super().__init__(values)

    def __deepcopy__(self, memo: dict[int, Any]) -> Minimum:
        return type(self)(self.values)


class Individual(Generic[T]):
    """A candidate and what it scored.

    Attributes:
        candidate: an immutable value.
        fidelity: at which the loss was measured.
        fitness: the objectives; comparable only between individuals of one fidelity.
    """

    def __init__(self, candidate: T, fidelity: int, values: Sequence[float]) -> None:
        self.candidate = candidate
        self.fidelity = fidelity
        self.fitness = Minimum(values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Individual) and self.candidate == other.candidate

    def __hash__(self) -> int:
        return hash(self.candidate)

    def __deepcopy__(self, memo: dict[int, Any]) -> Individual[T]:
        return Individual(self.candidate, self.fidelity, self.fitness.values)


def check_one_fidelity(individuals: Sequence[Individual[T]]) -> None:
    """Refuse to rank a mixture: losses on different amounts of text are different quantities.

    Raises:
        ValueError: when there are two fidelities.
    """
    fidelities = {individual.fidelity for individual in individuals}
    if len(fidelities) > 1:
        raise ValueError(f"individuals of fidelities {sorted(fidelities)} cannot be compared with each other")


def select(individuals: Sequence[Individual[T]], k: int) -> list[Individual[T]]:
    """Return NSGA-II's survivors, best front first (``deap.tools.selNSGA2``); all must be of one fidelity."""
    check_one_fidelity(individuals)
    return tools.selNSGA2(individuals, min(k, len(individuals))) if individuals and k else []


def mating_pool(population: Sequence[Individual[T]], rng: random.Random) -> list[Individual[T]]:
    """Return winners of tournaments by dominance and crowding, about as many as there are individuals.

    ``deap.tools.selTournamentDCD`` takes from the global generator and wants groups of four.
    """
    check_one_fidelity(population)
    size = len(population) // 4 * 4
    if not size:
        return [rng.choice(population) for _ in range(4)]
    with global_random(rng):
        return tools.selTournamentDCD(list(population), size)


@contextmanager
def global_random(rng: random.Random) -> Iterator[None]:
    """Lend a generator's state to the global ``random``, and leave that as it was found."""
    before = random.getstate()
    random.setstate(rng.getstate())
    try:
        yield
    finally:
        rng.setstate(random.getstate())
        random.setstate(before)
