"""How an evolutionary search is run."""

from __future__ import annotations

from dataclasses import dataclass

from multipruner.config.counts import MOST_UNITS
from multipruner.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """How a search is run.

    Attributes:
        population: individuals that survive a generation; a multiple of 4 (tournaments are held in fours).
        generations: after the first population.
        offspring: children per generation; 0: as many as the population has.
        fidelities: how many the evaluation knows; 0 is the cheapest.
        keep: share of the children that goes on from one fidelity to the next.
        finalists: how many are scored at the last fidelity, beside the structures that were given.
        crossover: share of the children that have two parents.
        immigrants: share of the children that are random; grows while nothing better is found.
        patience: generations without an improvement before mutations get stronger and immigrants more.
        seed: of everything random.
        batch_size: most candidates evaluated in one call; 0: all.
    """

    population: int = 24
    generations: int = 20
    offspring: int = 0
    fidelities: int = 1
    keep: float = 0.5
    finalists: int = 12
    crossover: float = 0.8
    immigrants: float = 0.05
    patience: int = 3
    seed: int = 0
    batch_size: int = 0

    def __post_init__(self) -> None:
        faults = [
            f"{name} {value if isinstance(value, int) else f'{value:g}'}: {allowed}"
            for name, value, allowed, good in (
                ("seed", self.seed, "from 0 to 2**63 - 1", 0 <= self.seed < 2**63),
                (
                    "population",
                    self.population,
                    f"a multiple of 4, at most {MOST_UNITS:,}",
                    0 < self.population <= MOST_UNITS and self.population % 4 == 0,
                ),
                ("generations", self.generations, f"0 to {MOST_UNITS:,}", 0 <= self.generations <= MOST_UNITS),
                ("offspring", self.offspring, f"0 to {MOST_UNITS:,}", 0 <= self.offspring <= MOST_UNITS),
                ("fidelities", self.fidelities, "at least 1", self.fidelities >= 1),
                ("keep", self.keep, "more than 0, at most 1", 0 < self.keep <= 1),
                ("finalists", self.finalists, "at least 1", self.finalists >= 1),
                ("crossover", self.crossover, "between 0 and 1", 0 <= self.crossover <= 1),
                ("immigrants", self.immigrants, "between 0 and 1", 0 <= self.immigrants <= 1),
                ("patience", self.patience, "at least 1", self.patience >= 1),
                ("batch_size", self.batch_size, "0 or more", self.batch_size >= 0),
            )
            if not good
        ]
        if faults:
            raise ConfigError(f"search settings: {'; '.join(faults)}")

    @property
    def home(self) -> int:
        """The fidelity at which the population lives: the last but one, if there are two or more."""
        return max(0, self.fidelities - 2)
