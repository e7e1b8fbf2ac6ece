"""The schedule of a greedy path as a genome: in which order the dimensions are pruned, and how far each goes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from multipruner.core.axes import DIMENSIONS, Dimension
from multipruner.core.errors import ConfigError

TOTAL = 100  # shares are whole percentages of the target ratio: nearby schedules coincide and are scored once


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a greedy path is walked.

    Attributes:
        order: the dimensions in the order in which they are pruned.
        shares: of the target ratio, in per cent, for blocks, mlp, heads (whatever the order); they add up to 100.
        channel_group: MLP channels that leave together.
        importance: what orders channels and heads.
        compensation: whether the kept weights are refitted.

    Raises:
        ConfigError: when the order is no permutation or the shares do not add up.
    """

    order: tuple[Dimension, ...]
    shares: tuple[int, ...]
    channel_group: int
    importance: str
    compensation: bool

    def __post_init__(self) -> None:
        if sorted(self.order) != sorted(DIMENSIONS):
            raise ConfigError(f"order {self.order!r}: name each of {', '.join(DIMENSIONS)} once")
        if len(self.shares) != len(DIMENSIONS) or min(self.shares) < 0 or sum(self.shares) != TOTAL:
            raise ConfigError(f"shares {self.shares!r}: give blocks, mlp, heads in whole per cent, {TOTAL} in all")

    def decode(self) -> dict[str, Any]:
        """Return settings by keyword, as a recipe has them (and whether there is a ``repair``)."""
        return {
            "stages": self.order,
            "shares": dict(zip(DIMENSIONS, map(float, self.shares), strict=True)),
            "channel_group": self.channel_group,
            "importance": self.importance,
            "repair": self.compensation,
        }

    def share(self, dimension: Dimension) -> int:
        """Return the share of one dimension, in per cent."""
        return self.shares[DIMENSIONS.index(dimension)]


@dataclass(frozen=True, slots=True)
class ScheduleSpace:
    """All schedules over some choices.

    A schedule is kept in a canonical form, so that schedules that lead to the same path are one: dimensions without a
    share stand last in the order, and a channel group that is never used is the first of the choices.

    Raises:
        ConfigError: when a list of choices is empty.
    """

    channel_groups: Sequence[int]
    importances: Sequence[str] = ("magnitude",)
    compensations: Sequence[bool] = (False,)
    kind: str = field(default="schedule", init=False)

    def __post_init__(self) -> None:
        for name in ("channel_groups", "importances", "compensations"):
            if not getattr(self, name):
                raise ConfigError(f"a search over schedules needs at least one choice of {name.replace('_', ' ')}")

    def random(self, rng: random.Random) -> Schedule:
        """Return shares uniform on the simplex; in a quarter of the cases one dimension gets none."""
        cuts = sorted(rng.randint(0, TOTAL) for _ in DIMENSIONS[1:])
        shares = [b - a for a, b in pairwise([0, *cuts, TOTAL])]
        if rng.random() < 0.25:
            giver, taker = rng.sample(range(len(shares)), 2)
            _move(shares, giver, taker, TOTAL)
        return self._canonical(
            Schedule(
                tuple(rng.sample(DIMENSIONS, len(DIMENSIONS))), tuple(shares), rng.choice(self.channel_groups),
                rng.choice(self.importances), rng.choice(self.compensations),
            )
        )  # fmt: skip

    def admit(self, candidate: Schedule, rng: random.Random) -> Schedule:
        """Return the schedule in its canonical form.

        Raises:
            ConfigError: when one of its choices is not among this space's.
        """
        for value, choices, name in (
            (candidate.channel_group, self.channel_groups, "channel group"),
            (candidate.importance, self.importances, "importance"),
            (candidate.compensation, self.compensations, "compensation"),
        ):
            if value not in choices:
                raise ConfigError(f"{name} {value!r} is not among the choices {', '.join(map(str, choices))}")
        return self._canonical(candidate)

    def mate(self, one: Schedule, other: Schedule, rng: random.Random) -> tuple[Schedule, Schedule]:
        """Return shares on the line between the parents'; everything else from either."""
        weight = rng.uniform(-0.25, 1.25)
        left, right = (
            rounded([max(0.0, a + w * (b - a)) for a, b in zip(one.shares, other.shares, strict=True)])
            for w in (weight, 1 - weight)
        )
        picks = {name: rng.random() < 0.5 for name in ("order", "channel_group", "importance", "compensation")}
        swapped = {name: getattr(other if pick else one, name) for name, pick in picks.items()}
        rest = {name: getattr(one if pick else other, name) for name, pick in picks.items()}
        children = (Schedule(shares=left, **swapped), Schedule(shares=right, **rest))
        return self._canonical(children[0]), self._canonical(children[1])

    def mutate(self, candidate: Schedule, rng: random.Random, strength: float = 1.0) -> Schedule:
        """Move a part of one share to another, swap two dimensions, or change one of the choices."""
        found = candidate
        again = True
        while again:
            found = self._canonical(self._change(found, rng))
            again = found == candidate or rng.random() < 1 - 1 / max(strength, 1.0)
        return found

    def _change(self, schedule: Schedule, rng: random.Random) -> Schedule:
        names = [name for name in ("channel_group", "importance", "compensation") if len(self._choices(name)) > 1]
        change = rng.choice(["shares", "shares", "order", *names])
        if change == "shares":
            shares = list(schedule.shares)
            giver, taker = rng.sample(range(len(shares)), 2)
            _move(shares, giver, taker, rng.choice((1, 2, 5, 10, 20, TOTAL)))
            return replace(schedule, shares=tuple(shares))
        if change == "order":
            order = list(schedule.order)
            a, b = rng.sample(range(len(order)), 2)
            order[a], order[b] = order[b], order[a]
            return replace(schedule, order=tuple(order))
        others = [choice for choice in self._choices(change) if choice != getattr(schedule, change)]
        return replace(schedule, **{change: rng.choice(others)})

    def _choices(self, name: str) -> Sequence[Any]:
        return getattr(self, f"{name}s")

    def _canonical(self, schedule: Schedule) -> Schedule:
        used = [dimension for dimension in schedule.order if schedule.share(dimension)]
        unused = [dimension for dimension in DIMENSIONS if not schedule.share(dimension)]
        group = schedule.channel_group if schedule.share("mlp") else self.channel_groups[0]
        return replace(schedule, order=(*used, *unused), channel_group=group)

    def to_json(self, candidate: Schedule) -> dict[str, Any]:
        """Return plain lists and numbers."""
        return {
            "order": list(candidate.order),
            "shares": list(candidate.shares),
            "channel_group": candidate.channel_group,
            "importance": candidate.importance,
            "compensation": candidate.compensation,
        }

    def from_json(self, value: Any) -> Schedule:
        """Return the inverse of :meth:`to_json`."""
        return Schedule(**{**value, "order": tuple(value["order"]), "shares": tuple(value["shares"])})

    def identity(self) -> dict[str, Any]:
        """Return the choices."""
        return {
            "kind": self.kind,
            "channel_groups": list(self.channel_groups),
            "importances": list(self.importances),
            "compensations": list(self.compensations),
        }


def _move(shares: list[int], giver: int, taker: int, amount: int) -> None:
    """Give as much of one share to another as there is."""
    amount = min(amount, shares[giver])
    shares[giver] -= amount
    shares[taker] += amount


def rounded(shares: Sequence[float]) -> tuple[int, ...]:
    """Return whole per cent that add up to 100: rounded down, what is missing goes to the largest remainders."""
    scaled = [share * TOTAL / sum(shares) for share in shares]
    whole = [int(share) for share in scaled]
    by_remainder = sorted(range(len(shares)), key=lambda i: (whole[i] - scaled[i], i))
    for i in by_remainder[: TOTAL - sum(whole)]:
        whole[i] += 1
    return tuple(whole)
