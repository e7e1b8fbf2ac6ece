"""The structure as a genome: sizes block by block, and operators that keep the budget.

Whatever an operator does to a structure, it is then brought back into the budget by level switching: a step of the
grid is taken from one block and given to another (as in evolutionary searches over compression levels such as EvoPress,
arXiv 2410.14649). One block of each kind always stays.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from math import exp, inf
from typing import Any

from multipruner.core.errors import ConfigError, InfeasibleError
from multipruner.core.structure import Anatomy, Structure
from multipruner.search.grid import Grid
from multipruner.search.ladder import Ladder, Levels
from multipruner.search.limits import Budget

RESTARTS = 12  # random kicks before a repair gives up
SWITCHES = 150  # exchanges between two blocks tried before a kick
ATTEMPTS = 20  # new beginnings before a random structure is declared impossible
SEAM = 0.15  # how readily a repair removes a whole block or brings one back, against changing a width
CHANGES = {"transfer": 4, "resize": 3, "exchange": 2, "block": 1}  # how often each mutation happens


class StructureSpace:
    """All structures on a grid within a budget.

    Args:
        anatomy: the dense model's blocks.
        grid: how finely they are cut (alignment: every count is the dense one less whole steps).
        budget: what must hold.

    Raises:
        ConfigError: when the grid does not divide the dense sizes.
        InfeasibleError: when no structure fits, or none was found; ``nearest`` is the nearest value of the bound.
    """

    kind = "structure"

    def __init__(self, anatomy: Anatomy, grid: Grid, budget: Budget | None = None) -> None:
        self.ladder = Ladder(anatomy, grid)
        self.budget = budget or Budget()
        self._grid, self._kinds = grid, anatomy.kinds
        if not self._kinds:
            raise ConfigError("the dense structure has no block at all: there is nothing to search")
        groups = {(self.ladder.kind(rung), self.ladder.rungs[rung].axis): self.ladder.alike(rung)
                  for rung in range(len(self.ladder))}  # fmt: skip
        self._alike = list(groups.values())
        if len(self.ladder) < 2:
            raise ConfigError("fewer than two parts of the model may change: there is nothing to search; freeze less")
        self._check_reachable()

    def holds(self, structure: Structure) -> bool:
        """Tell whether a structure is on the grid, within the budget, and keeps one block of each kind."""
        levels = self.ladder.levels(structure)
        on_grid = self.ladder.structure(levels) == structure
        kept = all(self.ladder.blocks(levels, kind) for kind in self._kinds)
        return on_grid and kept and self.budget.holds(structure)

    def random(self, rng: random.Random) -> Structure:
        """Return a structure whose blocks differ widely in how much they lose; some are gone altogether."""
        free = all(bound.least == -inf for bound in self.budget.bounds) and not self.budget.fill
        tried: list[Structure] = []
        for _ in range(ATTEMPTS):
            gone = rng.uniform(0, 0.3)
            scale = rng.random() if free else 1.0  # without a lower limit any size is of interest
            levels = [
                0 if rng.random() < gone else round(top * min(1.0, scale * exp(rng.uniform(-0.5, 0.5))))
                for top in self.ladder.tops
            ]
            taste = [exp(rng.uniform(-2, 2)) for _ in levels]
            if found := self._settle(levels, rng, taste):
                return found
            tried.append(self.ladder.structure(levels))
        raise self._impossible(tried)

    def admit(self, candidate: Structure, rng: random.Random) -> Structure:
        """Return the structure itself when it holds, else one near it (moved to the grid, then into the budget).

        Raises:
            ConfigError: when it is larger than the dense structure.
            InfeasibleError: when none near it was found.
        """
        if not candidate.fits_in(self.ladder.dense):
            raise ConfigError("a structure given to the search is larger than the dense model, or of another depth")
        if self.holds(candidate) and not self.budget.fill:
            return candidate
        tried: list[Structure] = []
        for _ in range(ATTEMPTS):
            levels = self.ladder.levels(candidate)
            if found := self._settle(levels, rng):
                return found
            tried.append(self.ladder.structure(levels))
        raise self._impossible(tried)

    def mate(self, one: Structure, other: Structure, rng: random.Random) -> tuple[Structure, Structure]:
        """Exchange a stretch of layers, or single blocks; repairs touch first what the parents disagree about."""
        a, b = self.ladder.levels(one), self.ladder.levels(other)
        if rng.random() < 0.5:
            first, last = sorted(rng.sample(range(self.ladder.anatomy.layers + 1), 2))
            swapped = [first <= self.ladder.layer(rung) < last for rung in range(len(a))]
        else:
            swapped = [rng.random() < 0.5 for _ in a]
        taste = [4.0 if x != y else 0.5 for x, y in zip(a, b, strict=True)]
        children = (
            [y if swap else x for x, y, swap in zip(mine, yours, swapped, strict=True)]
            for mine, yours in ((a, b), (b, a))
        )
        left, right = (self._settle(child, rng, taste) for child in children)
        return left or one, right or other

    def mutate(self, candidate: Structure, rng: random.Random, strength: float = 1.0) -> Structure:
        """Return one or more of: level switching, another width, two blocks' widths exchanged, a block removed or
        restored.

        Returns the candidate itself when the budget allows no change.
        """
        before = self.ladder.levels(candidate)
        for _ in range(ATTEMPTS):
            levels = list(before)
            again = True
            while again:
                change = rng.choices(list(CHANGES), list(CHANGES.values()))[0]
                getattr(self, f"_{change}")(levels, rng)
                again = rng.random() < 1 - 1 / max(strength, 1.0)
            # what was changed on purpose should not be what the repair changes back
            taste = [0.05 if new != old else 1.0 for new, old in zip(levels, before, strict=True)]
            found = self._settle(levels, rng, taste)
            if found is not None and found != candidate:
                return found
        return candidate

    def to_json(self, candidate: Structure) -> dict[str, Any]:
        """See :meth:`Structure.to_json`."""
        return candidate.to_json()

    def from_json(self, value: Any) -> Structure:
        """Return the inverse of :meth:`to_json`."""
        return Structure.from_json(value)

    def identity(self) -> dict[str, Any]:
        """Return dense sizes, grid and budget."""
        dense = self.ladder.dense.to_json()
        return {"kind": self.kind, "dense": dense, "grid": self._grid.to_json(), **self.budget.to_json()}

    # The mutations: each changes the levels in place; some have no effect on some structures.

    def _transfer(self, levels: Levels, rng: random.Random) -> None:
        giver, taker = rng.sample(range(len(levels)), 2)
        amount = _few(rng)
        if self.ladder.can(levels, giver, -amount) and self.ladder.can(levels, taker, amount):
            levels[giver] -= amount
            levels[taker] += amount

    def _resize(self, levels: Levels, rng: random.Random) -> None:
        place, amount = rng.randrange(len(levels)), _few(rng) * rng.choice((-1, 1))
        if self.ladder.can(levels, place, amount):
            levels[place] += amount

    def _exchange(self, levels: Levels, rng: random.Random) -> None:
        alike = self._alike[rng.randrange(len(self._alike))]
        one, other = (alike[rng.randrange(len(alike))] for _ in range(2))
        if levels[one] <= self.ladder.tops[other] and levels[other] <= self.ladder.tops[one]:
            levels[one], levels[other] = levels[other], levels[one]

    def _block(self, levels: Levels, rng: random.Random) -> None:
        place = rng.randrange(len(levels))
        change = -levels[place] or self.ladder.tops[place]
        if self.ladder.can(levels, place, change):
            levels[place] += change

    # The repair.

    def _restore(self, levels: Levels, rng: random.Random) -> None:
        """See to it that one block of each kind is there."""
        for kind in self._kinds:
            if not self.ladder.blocks(levels, kind):
                place = rng.choice(self.ladder.of_kind(kind))
                levels[place] = rng.randint(1, self.ladder.tops[place])

    def _settle(self, levels: Levels, rng: random.Random, taste: Sequence[float] | None = None) -> Structure | None:
        """Return the levels brought into the budget, changing first the places with the greater taste; ``None``:
        not found.
        """
        taste = taste or [1.0] * len(levels)
        self._restore(levels, rng)
        for restart in range(RESTARTS):
            for _ in range(3 if restart else 0):
                self._resize(levels, rng)
            if self._descend(levels, rng, taste):
                return self._filled(levels, rng) if self.budget.fill else self.ladder.structure(levels)
        return None

    def _violation(self, levels: Levels) -> tuple[float, float]:
        return self.budget.excess(self.ladder.structure(levels)) if self.budget.bounds else (0.0, 0.0)

    def _descend(self, levels: Levels, rng: random.Random, taste: Sequence[float]) -> bool:
        """Lower the violation step by step until there is none (then true), or until no step and no switch helps."""
        while True:
            above, below = self._violation(levels)
            if not above and not below:
                return True
            change, here = (-1 if above else 1), above + below
            for place in self._order(levels, change, rng, taste):
                levels[place] += change
                if sum(self._violation(levels)) < here:
                    break
                levels[place] -= change
            else:
                if not self._switch(levels, here, rng):
                    return False

    def _order(self, levels: Levels, change: int, rng: random.Random, taste: Sequence[float]) -> list[int]:
        """Return the places that may change, in random order, the tasty ones earlier (Efraimidis and Spirakis 2006)."""
        keys: list[tuple[float, int]] = []
        for place, liking in enumerate(taste):
            if self.ladder.can(levels, place, change):
                seam = self.ladder.removes(place) and 0 in (levels[place], levels[place] + change)
                keys.append((-(rng.random() ** (1 / (liking * (SEAM if seam else 1.0)))), place))
        return [place for _, place in sorted(keys)]

    def _switch(self, levels: Levels, here: float, rng: random.Random) -> bool:
        """Take steps from one block and give steps to another so that the violation falls; whether that was found."""
        for _ in range(SWITCHES):
            giver, taker = rng.sample(range(len(levels)), 2)
            taken, given = _few(rng), _few(rng)
            if self.ladder.can(levels, giver, -taken) and self.ladder.can(levels, taker, given):
                levels[giver] -= taken
                levels[taker] += given
                if sum(self._violation(levels)) < here:
                    return True
                levels[giver] += taken
                levels[taker] -= given
        return False

    def _filled(self, levels: Levels, rng: random.Random) -> Structure:
        """Grow until nothing fits any more; whole blocks come back last."""
        grown = True
        while grown:
            grown = False
            for place in self._order(levels, 1, rng, [1.0] * len(levels)):
                if self.ladder.can(levels, place, 1):
                    levels[place] += 1
                    if any(self._violation(levels)):
                        levels[place] -= 1
                    else:
                        grown = True
        return self.ladder.structure(levels)

    # What cannot be done.

    def _check_reachable(self) -> None:
        """Refuse bounds that even the least structure exceeds, or the dense one does not reach."""
        ends = self._extremes()
        for bound in self.budget.bounds:
            amounts = [bound.cost(structure) for structure in ends]
            if (nearest := bound.nearest(min(amounts), max(amounts))) is not None:
                raise InfeasibleError(
                    f"no structure keeps {bound}: the nearest that any comes to that is {nearest:g}; ask for that, or "
                    "take a finer grid",
                    nearest=nearest,
                )

    def _extremes(self) -> list[Structure]:
        """Return the dense structure, and all that keep the least of one block of each kind; where one always stays
        that is no block that could leave.
        """
        found, none = [self.ladder.dense], [0] * len(self.ladder)
        kinds = [kind for kind in self._kinds if not self.ladder.blocks(none, kind)]
        rows = [self.ladder.of_kind(kind) for kind in kinds]
        for number in range(max(map(len, rows), default=1)):  # kinds that fewer layers have come round again
            places = {row[number % len(row)] for row in rows}
            found.append(self.ladder.structure([int(place in places) for place in range(len(self.ladder))]))
        return found

    def _impossible(self, tried: Sequence[Structure]) -> InfeasibleError:
        near = min(tried, key=lambda structure: sum(self.budget.excess(structure)))
        bound = max(self.budget.bounds, key=lambda bound: abs(bound.violation(near)))
        return InfeasibleError(
            f"no structure on the grid was found that keeps {bound}, the nearest has {bound.cost(near):g}; take a "
            "wider tolerance or a finer grid",
            nearest=bound.cost(near),
        )


def _few(rng: random.Random) -> int:
    """Return 1 in half of the cases, 2 in a quarter, and so on."""
    count = 1
    while rng.random() < 0.5:
        count += 1
    return count
