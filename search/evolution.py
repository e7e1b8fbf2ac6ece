"""NSGA-II (Deb et al. 2002) over any space of candidates, on DEAP's operators, and random search beside it.

Fidelities. The loss on few tokens and the loss on many are different quantities and are never ranked together. The
population lives at one fidelity, ``Settings.home``. Children are scored at fidelity 0 and compared with each other
there; the better share of them is scored at the next, and so on; those that arrive at the home fidelity compete with
the population on what was measured there. When all generations are over, the finalists (the best ever seen at home,
and the structures that were given) are scored at the last fidelity, and the front is made of those values alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, inf
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from deap import base, tools

from multipruner.core.errors import NumericsError
from multipruner.search.front import Front, Point
from multipruner.search.individual import Individual, mating_pool, select
from multipruner.search.memo import Memo
from multipruner.search.scoring import Evaluate, Scorer
from multipruner.search.settings import Settings
from multipruner.search.space import Space
from multipruner.search.state import State, load, rng_from_json, rng_to_json, save

T = TypeVar("T", bound=Hashable)
NOVELTY = 12  # attempts per child to find one that was not scored before


@dataclass(frozen=True, slots=True)
class Result(Generic[T]):
    """What a search found, and what it took.

    Attributes:
        front: non-dominated points at the last fidelity.
        history: one record per generation and one for the final, as ``search.jsonl`` holds them.
        logbook: the same as DEAP's logbook.
        scored: different candidates asked for, per fidelity: the size of the search.
        computed: evaluations that this process really carried out (others came from the memo or the checkpoint).
    """

    front: Front[T]
    history: tuple[dict[str, Any], ...]
    logbook: tools.Logbook
    scored: tuple[int, ...]
    computed: int


def evolve(space: Space[T], evaluate: Evaluate[T], **keywords: Any) -> Result[T]:
    """Search by NSGA-II; see :class:`Search` for what can be given.

    Raises:
        ConfigError: when the checkpoint belongs to another search.
        InfeasibleError: when the space holds no candidate.
        NumericsError: when no candidate of the first population has a finite loss.
        OutputError: when checkpoint or memo cannot be written.
    """
    return Search(space, evaluate, "nsga2", **keywords).run()


def random_search(space: Space[T], evaluate: Evaluate[T], **keywords: Any) -> Result[T]:
    """Return the same search, with as many evaluations at every fidelity, but every child is a random candidate."""
    return Search(space, evaluate, "random", **keywords).run()


class Search(Generic[T]):
    """One search: a first population, generations, a final. One process decides; ``evaluate`` may spread the work.

    Args:
        space: the candidates and their operators.
        evaluate: (candidates, fidelity) -> a loss for each (or a value per name in ``measured``); candidates are all
            different and new, so a caller may spread them over processes and share prefixes.
        algorithm: where children come from.
        costs: further objectives by name, candidate -> number, exact and cheap.
        settings: population, generations, seed, ...
        seeds: candidates to start from; those not allowed are moved to the nearest allowed place. They take part in
            the final, so the result is never worse than they are.
        memo: evaluations on disk, shared between searches.
        checkpoint: file that is replaced after every generation; when it is there, the search goes on from it.
        on_generation: called after every generation with the history so far.
        measured: names of what ``evaluate`` measures, the first being the one that counts as "best".
    """

    def __init__(
        self,
        space: Space[T],
        evaluate: Evaluate[T],
        algorithm: Literal["nsga2", "random"],
        *,
        costs: Mapping[str, Callable[[T], float]] | None = None,
        settings: Settings | None = None,
        seeds: Sequence[T] = (),
        memo: Memo | None = None,
        checkpoint: Path | None = None,
        on_generation: Callable[[Sequence[Mapping[str, Any]]], None] | None = None,
        measured: Sequence[str] = ("loss",),
    ) -> None:
        self.space, self.settings, self.checkpoint = space, settings or Settings(), checkpoint
        self._on_generation = on_generation
        self.scorer = Scorer(
            space, evaluate, costs or {}, measured, self.settings.fidelities, memo, self.settings.batch_size or None
        )
        self.rng = random.Random(self.settings.seed)
        self.seeds = list(dict.fromkeys(space.admit(seed, self.rng) for seed in seeds))
        self.population: list[Individual[T]] = []
        self.stalled = 0
        several = len(self.scorer.objectives) > 1
        self.archive = tools.ParetoFront() if several else tools.HallOfFame(self.settings.finalists)
        self.logbook = tools.Logbook()
        self.statistics = tools.Statistics(key=lambda individual: individual.fitness.values)
        for name, function in (("min", np.min), ("mean", np.mean), ("max", np.max)):
            self.statistics.register(name, function, axis=0)
        self.toolbox = self._toolbox(algorithm)
        decisive = {k: v for k, v in asdict(self.settings).items() if k not in ("generations", "batch_size")}
        self.identity: dict[str, Any] = {
            "algorithm": algorithm, "settings": decisive, "space": space.identity(),
            "seeds": [space.to_json(seed) for seed in self.seeds], "objectives": self.scorer.objectives,
            "namespace": None if memo is None else memo.namespace,
        }  # fmt: skip

    def _toolbox(self, algorithm: str) -> Any:
        toolbox: Any = base.Toolbox()
        toolbox.register("candidate", self.space.random)
        toolbox.register("mate", self.space.mate)
        toolbox.register("mutate", self.space.mutate)
        toolbox.register("evaluate", self.scorer)
        toolbox.register("pool", mating_pool)
        toolbox.register("select", select)
        toolbox.register("beginners", self._neighbours if algorithm == "nsga2" else self._strangers)
        toolbox.register("children", self._bred if algorithm == "nsga2" else self._strangers)
        return toolbox

    def run(self) -> Result[T]:
        """Run to the end, from the checkpoint when there is one."""
        state = load(self.checkpoint, self.identity) if self.checkpoint else None
        if state is not None:
            self._restore(state)
        for generation in range(len(self.logbook), self.settings.generations + 1):
            began, computed = time.perf_counter(), self.scorer.computed
            if generation:
                self._next_generation()
            else:
                self._first_population()
            self._record(generation, time.perf_counter() - began, self.scorer.computed - computed)
            self._save()
            if self._on_generation is not None:
                self._on_generation(list(self.logbook))
        return self._final()

    def _first_population(self) -> None:
        size = self.settings.population
        candidates = list(self.seeds)
        candidates += self._fresh(self.toolbox.beginners(), (size - len(candidates) + 1) // 2, candidates)
        candidates += self._fresh(self._strangers(), size - len(candidates), candidates)
        scored = self.toolbox.evaluate(candidates, self.settings.home)
        if not scored:
            raise NumericsError(f"none of {len(candidates)} first candidates has a finite {self.scorer.objectives[0]}")
        self.archive.update(scored)
        self.population = self.toolbox.select(scored, size)

    def _next_generation(self) -> None:
        # crowding distances depend on this population alone, so that a resumed search sees the same ones
        self.population = self.toolbox.select(self.population, len(self.population))
        size = self.settings.offspring or self.settings.population
        children = self._fresh(self.toolbox.children(), size)
        for fidelity in range(self.settings.home):
            scored = self.toolbox.evaluate(children, fidelity)
            promising = self.toolbox.select(scored, ceil(self.settings.keep * len(scored)))
            children = [individual.candidate for individual in promising]
        arrived = self.toolbox.evaluate(children, self.settings.home)
        before = self._best_values()
        self.archive.update(arrived)
        self.stalled = 0 if self._best_values() != before else self.stalled + 1
        self.population = self.toolbox.select([*self.population, *arrived], self.settings.population)

    def _best_values(self) -> list[tuple[float, ...]]:
        """Return the front at the home fidelity; with one objective, its best value."""
        best = self.archive if isinstance(self.archive, tools.ParetoFront) else self.archive[:1]
        return [individual.fitness.values for individual in best]

    # Where candidates come from: endless streams, of which only what is new is taken.

    def _fresh(self, stream: Iterator[T], wanted: int, besides: Sequence[T] = ()) -> list[T]:
        """Return so many different candidates that were never scored; fewer when the space is nearly used up."""
        old, found = set(besides), {}
        for _ in range(NOVELTY * max(0, wanted)):
            if len(found) == wanted:
                break
            candidate = next(stream)
            if candidate not in old and not self.scorer.seen(candidate):
                found[candidate] = None
        return list(found)

    def _strangers(self) -> Iterator[T]:
        while True:
            yield self.toolbox.candidate(self.rng)

    def _neighbours(self) -> Iterator[T]:
        """Yield of the seeds; without seeds, strangers."""
        while True:
            if self.seeds:
                yield self.toolbox.mutate(self.rng.choice(self.seeds), self.rng)
            else:
                yield self.toolbox.candidate(self.rng)

    def _pressure(self) -> int:
        """Tell how many generations the search has stood still beyond its patience, at most 6."""
        return min(6, max(0, self.stalled - self.settings.patience + 1))

    def _bred(self) -> Iterator[T]:
        """Yield children of tournament winners, and some immigrants; bolder the longer nothing better was found."""
        parents, rng = self._parents(), self.rng
        strength = 1 + self._pressure() / 2
        immigrants = min(0.5, self.settings.immigrants * (1 + self._pressure()))
        while True:
            if rng.random() < immigrants:
                yield self.toolbox.candidate(rng)
            elif rng.random() < self.settings.crossover:
                for child in self.toolbox.mate(next(parents), next(parents), rng):
                    known = self.scorer.seen(child) or rng.random() < 0.5
                    yield self.toolbox.mutate(child, rng, strength) if known else child
            else:
                yield self.toolbox.mutate(next(parents), rng, strength)

    def _parents(self) -> Iterator[T]:
        while True:
            for individual in self.toolbox.pool(self.population, self.rng):
                yield individual.candidate

    # What is written down.

    def _record(self, generation: int, seconds: float, computed: int) -> None:
        """Return one line of the history; all but ``computed`` and ``seconds`` is the same in every run of one seed."""
        summary = {name: row.tolist() for name, row in self.statistics.compile(self.population).items()}
        self.logbook.record(
            generation=generation, stage="generation", fidelity=self.settings.home,
            objectives=list(self.scorer.objectives), scored=self._scored(), population=len(self.population),
            **summary, front=[list(values) for values in self._best_values()], stalled=self.stalled,
            computed=computed, seconds=round(seconds, 3),
        )  # fmt: skip

    def _scored(self) -> list[int]:
        return [len(table) for table in self.scorer.table]

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        places = {candidate: place for place, candidate in enumerate(self.scorer.table[self.settings.home])}
        population = [places[individual.candidate] for individual in self.population]
        tables, history = self.scorer.to_json(), list(self.logbook)
        save(self.checkpoint, self.identity, State(rng_to_json(self.rng), population, self.stalled, tables, history))

    def _restore(self, state: State) -> None:
        self.scorer.restore(state.tables)
        home = self.settings.home
        individuals = [self.scorer.individual(candidate, home) for candidate in self.scorer.table[home]]
        self.archive.update([i for i in individuals if all(abs(value) < inf for value in i.fitness.values)])
        self.population = [individuals[place] for place in state.population]
        self.rng, self.stalled = rng_from_json(state.rng), state.stalled
        for record in state.history:
            self.logbook.record(**record)

    def _final(self) -> Result[T]:
        """Score the finalists at the last fidelity, and make the front of those values alone."""
        began, computed, last = time.perf_counter(), self.scorer.computed, self.settings.fidelities - 1
        best: list[Individual[T]] = list(self.archive)
        if last > self.settings.home:
            best = self.toolbox.select(best, self.settings.finalists)
        finalists = dict.fromkeys([*(individual.candidate for individual in best), *self.seeds])
        scored = self.toolbox.evaluate(list(finalists), last)
        if not scored:
            raise NumericsError(f"none of {len(finalists)} finalists has a finite {self.scorer.objectives[0]}")
        front = tools.ParetoFront(similar=lambda one, other: True)  # of equals in every value, the first
        front.update(scored)
        self._save()
        record = {
            "generation": len(self.logbook) - 1, "stage": "final", "fidelity": last,
            "objectives": list(self.scorer.objectives), "scored": self._scored(), "finalists": len(finalists),
            "front": [list(individual.fitness.values) for individual in front],
            "computed": self.scorer.computed - computed, "seconds": round(time.perf_counter() - began, 3),
        }  # fmt: skip
        history = (*self.logbook, record)
        if self._on_generation is not None:
            self._on_generation(history)
        points = tuple(
            Point(i.candidate, dict(zip(self.scorer.objectives, i.fitness.values, strict=True))) for i in front
        )
        return Result(
            Front(self.space.kind, points), history, self.logbook, tuple(self._scored()), self.scorer.computed
        )
