"""Scores every candidate once per fidelity: from this run's table, from the memo, or by asking the caller."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from math import inf, isnan
from typing import Any, Generic, TypeVar

from multipruner.core.errors import NumericsError
from multipruner.search.individual import Individual
from multipruner.search.memo import Memo, Values
from multipruner.search.space import Space

T = TypeVar("T", bound=Hashable)
Evaluate = Callable[[Sequence[T], int], Sequence[Any]]


class Scorer(Generic[T]):
    """Values of candidates at several fidelities.

    A table per fidelity keeps the values; one of them is never filled from, or compared with, another. Costs are exact
    and therefore the same at every fidelity.

    Args:
        space: gives candidates their JSON form.
        evaluate: (candidates, fidelity) -> for each one number, or one per name in ``measured``. Called with
            candidates that are new at this fidelity, each once. A loss that is not finite rules a candidate out.
        costs: exact further objectives by name, candidate -> number.
        measured: the names of what ``evaluate`` answers.
        fidelities: how many there are.
        memo: evaluations on disk, or ``None``.
        batch_size: most candidates that ``evaluate`` gets at once (each batch is in the memo before the next begins);
            ``None``: no limit.

    Attributes:
        table: per fidelity, what this run has asked for: candidate -> measured values.
        computed: how many evaluations were really carried out by this process.
    """

    def __init__(
        self,
        space: Space[T],
        evaluate: Evaluate[T],
        costs: Mapping[str, Callable[[T], float]],
        measured: Sequence[str],
        fidelities: int,
        memo: Memo | None = None,
        batch_size: int | None = None,
    ) -> None:
        self._space, self._evaluate, self._costs, self._memo = space, evaluate, dict(costs), memo
        self._measured, self._batch_size = tuple(measured), batch_size
        self.objectives: tuple[str, ...] = (*measured, *costs)
        self.table: list[dict[T, Values]] = [{} for _ in range(fidelities)]
        self.computed = 0

    def __call__(self, candidates: Sequence[T], fidelity: int) -> list[Individual[T]]:
        """Return the candidates scored at one fidelity, without those whose values are not finite.

        Raises:
            NumericsError: when a cost is not a number.
        """
        wanted = list(dict.fromkeys(candidates))
        self._ask([candidate for candidate in wanted if candidate not in self.table[fidelity]], fidelity)
        scored = [self.individual(candidate, fidelity) for candidate in wanted]
        return [individual for individual in scored if all(abs(v) < inf for v in individual.fitness.values)]

    def individual(self, candidate: T, fidelity: int) -> Individual[T]:
        """Return a candidate that was scored before."""
        costs = [float(cost(candidate)) for cost in self._costs.values()]
        for name, amount in zip(self._costs, costs, strict=True):
            if isnan(amount):
                raise NumericsError(f"{name} of a candidate is not a number; look at how it is computed")
        return Individual(candidate, fidelity, (*self.table[fidelity][candidate], *costs))

    def seen(self, candidate: T) -> bool:
        """Tell whether this run has scored a candidate at any fidelity."""
        return any(candidate in table for table in self.table)

    def _ask(self, candidates: Sequence[T], fidelity: int) -> None:
        found: dict[T, Values] = {}
        if self._memo is not None:
            self._memo.refresh()
            for candidate in candidates:
                values = self._memo.get(self._space.to_json(candidate), fidelity)
                if values is not None:
                    found[candidate] = self._checked(values)
        missing = [candidate for candidate in candidates if candidate not in found]
        size = self._batch_size or len(missing)
        for start in range(0, len(missing), size or 1):
            found.update(self._compute(missing[start : start + size], fidelity))
        # in the order asked for, so that a run that finds some in the memo equals one that does not
        self.table[fidelity].update((candidate, found[candidate]) for candidate in candidates)

    def _compute(self, batch: Sequence[T], fidelity: int) -> dict[T, Values]:
        answers = list(self._evaluate(batch, fidelity))
        if len(answers) != len(batch):
            raise ValueError(f"evaluate() gave {len(answers)} values for {len(batch)} candidates")
        self.computed += len(batch)
        values = [self._checked(_as_tuple(answer)) for answer in answers]
        if self._memo is not None:
            named = zip(batch, values, strict=True)
            self._memo.add((self._space.to_json(candidate), fidelity, row) for candidate, row in named)
        return dict(zip(batch, values, strict=True))

    def _checked(self, values: Values) -> Values:
        if len(values) != len(self._measured):
            raise ValueError(f"{len(values)} values for a candidate, but {len(self._measured)} are measured")
        return tuple(inf if isnan(value) else value for value in values)

    def to_json(self) -> list[list[list[Any]]]:
        """Return the tables, in the order in which they were filled."""
        return [
            [[self._space.to_json(candidate), [v if abs(v) < inf else None for v in values]] for candidate, values in
             table.items()]
            for table in self.table
        ]  # fmt: skip

    def restore(self, tables: Sequence[Sequence[Sequence[Any]]]) -> None:
        """Take over what :meth:`to_json` gave."""
        self.table = [
            {self._space.from_json(row): tuple(inf if v is None else v for v in values) for row, values in table}
            for table in tables
        ]


def _as_tuple(answer: Any) -> Values:
    return tuple(map(float, answer)) if hasattr(answer, "__len__") else (float(answer),)
