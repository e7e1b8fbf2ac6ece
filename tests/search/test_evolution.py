"""Evolution on toy objectives whose optimum and whose front are known: no torch, no model, seconds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise, product
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deap import creator

from multipruner.core.errors import ConfigError, NumericsError, OutputError
from multipruner.core.structure import Structure
from multipruner.search.evolution import Result, evolve, random_search
from multipruner.search.front import Front, Point, pick
from multipruner.search.genome import StructureSpace
from multipruner.search.grid import Grid
from multipruner.search.individual import Individual, select
from multipruner.search.limits import Budget
from multipruner.search.memo import Memo
from multipruner.search.schedule import Schedule, ScheduleSpace
from multipruner.search.settings import Settings
from tests.support.layers import layers_of, uniform
from tests.support.toys import costs_of


class Toy:
    """A sum of convex losses, one per block, and a term that couples neighbouring layers."""

    def __init__(self, layers: int, seed: int, coupling: float = 0.0, offsets: Sequence[float] = (0.0,)) -> None:
        self.anatomy = uniform(layers, 4, 2, 32)
        self.dense, self.costs = self.anatomy.dense, costs_of(self.anatomy, 1000)
        rng = random.Random(seed)
        self.weights = [(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(layers)]
        self.coupling, self.offsets = coupling, offsets
        self.asked: list[tuple[Structure, int]] = []

    def loss(self, structure: Structure) -> float:
        """Dyadic numbers throughout, so that sums are exact."""
        cut = [(1 - s.kv_heads / 2, 1 - s.channels / 32) for s in layers_of(structure)]
        alone = sum(a * x**2 + b * y**2 for (a, b), (x, y) in zip(self.weights, cut, strict=True))
        return alone + self.coupling * sum(x[1] * y[1] for x, y in pairwise(cut))

    def __call__(self, structures: Sequence[Structure], fidelity: int) -> list[float]:
        self.asked += [(structure, fidelity) for structure in structures]
        return [self.loss(structure) + self.offsets[fidelity] for structure in structures]

    def space(self, ratio: float | None, tolerance: float = 0.03) -> StructureSpace:
        budget = Budget() if ratio is None else Budget.from_ratio(self.costs, ratio, tolerance)
        return StructureSpace(self.anatomy, Grid({"channels": 8, "kv_groups": 1}), budget)


def everything(space: StructureSpace) -> list[Structure]:
    levels = product(*(range(top + 1) for top in space.ladder.tops))
    return [s for s in map(space.ladder.structure, levels) if space.holds(s)]


def same(one: Result[Any], other: Result[Any]) -> None:
    """Equal to the bit, save for what was computed by whom and in which time."""

    def decisions(result: Result[Any]) -> list[dict[str, Any]]:
        return [{k: v for k, v in record.items() if k not in ("computed", "seconds")} for record in result.history]

    assert one.front == other.front
    assert decisions(one) == decisions(other)
    assert one.scored == other.scored


@pytest.mark.parametrize("coupling", [0.0, 8.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_best_structure_under_a_budget_is_found(seed: int, coupling: float) -> None:
    toy = Toy(3, seed, coupling)
    space = toy.space(0.35)
    allowed = everything(space)
    result = evolve(space, toy, settings=Settings(population=12, generations=24, seed=seed))
    assert pick(result.front, "best").values["loss"] == min(map(toy.loss, allowed))
    assert len(toy.asked) == sum(result.scored) <= 300 < len(allowed)


def hypervolume(points: Sequence[tuple[float, float]], corner: tuple[float, float]) -> float:
    """The area that two minimised objectives dominate, below a corner."""
    area, floor = 0.0, corner[1]
    for x, y in sorted(points):
        if x < corner[0] and y < floor:
            area += (corner[0] - x) * (floor - y)
            floor = y
    return area


def true_front(values: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The pairs that no other pair beats."""
    front: list[tuple[float, float]] = []
    for loss, size in sorted(set(values)):
        if not front or size < front[-1][1]:
            front.append((loss, size))
    return front


@pytest.mark.parametrize("coupling", [0.0, 8.0])
def test_the_front_of_loss_and_parameters_is_found(coupling: float) -> None:
    toy = Toy(2, 5, coupling)
    space = toy.space(None)
    known = true_front([(toy.loss(s), toy.costs.parameters(s)) for s in everything(space)])
    result = evolve(
        space, toy, costs={"parameters": toy.costs.parameters}, settings=Settings(population=24, generations=4)
    )
    assert result.front.objectives == ("loss", "parameters")
    found = [(point.values["loss"], point.values["parameters"]) for point in result.front.points]
    assert found == true_front(found)
    longer = evolve(
        space, toy, costs={"parameters": toy.costs.parameters}, settings=Settings(population=24, generations=24)
    )
    complete = [(point.values["loss"], point.values["parameters"]) for point in longer.front.points]
    assert complete == known


def test_the_front_of_a_larger_toy_is_nearly_found_and_random_search_does_worse() -> None:
    toy, areas = Toy(3, 7, 4.0), {evolve: [], random_search: []}
    space, corner = toy.space(None), (200.0, 6000.0)
    known = true_front([(toy.loss(s), toy.costs.parameters(s)) for s in everything(space)])
    for seed in range(3):
        for search, found in areas.items():
            result = search(
                space, toy, costs={"parameters": toy.costs.parameters}, settings=Settings(generations=20, seed=seed)
            )
            points = [(point.values["loss"], point.values["parameters"]) for point in result.front.points]
            found.append(hypervolume(points, corner) / hypervolume(known, corner))
    assert min(areas[evolve]) > 0.99
    assert max(areas[random_search]) < min(areas[evolve])


def test_evolution_beats_random_search_at_equal_evaluations_on_every_seed() -> None:
    for seed in range(8):
        toy = Toy(8, seed, 4.0)
        space, chosen = toy.space(0.3, 0.01), Settings(generations=15, seed=seed)
        evolved, drawn = (search(space, toy, settings=chosen) for search in (evolve, random_search))
        assert evolved.scored == drawn.scored
        assert pick(evolved.front, "best").values["loss"] < pick(drawn.front, "best").values["loss"]


def test_no_structure_is_evaluated_twice() -> None:
    toy = Toy(3, 1, offsets=(0.0, 64.0, 128.0))
    space = toy.space(0.35)
    seeds = [space.random(random.Random(n)) for n in (1, 1, 2)]
    result = evolve(space, toy, seeds=seeds, settings=Settings(fidelities=3, generations=10, batch_size=5))
    assert len(toy.asked) == len(set(toy.asked)) == sum(result.scored) == result.computed


def test_losses_of_different_fidelities_are_never_compared() -> None:
    """Shifting the loss of any fidelity by a constant changes no decision at all."""
    results = []
    for offsets in ((0.0, 0.0, 0.0), (512.0, 0.0, 0.0), (0.0, 1024.0, 64.0), (-256.0, 0.0, 4096.0)):
        toy = Toy(6, 3, 2.0, offsets)
        chosen = Settings(fidelities=3, population=12, generations=8, seed=2)
        result = evolve(toy.space(0.3), toy, settings=chosen)
        results.append((toy.asked, [(p.candidate, p.values["loss"] - offsets[2]) for p in result.front.points]))
        first, second, last = result.scored
        assert first == 8 * 12
        assert second == 12 + 8 * 6
        assert last == chosen.finalists
    assert all(result == results[0] for result in results[1:])
    mixture = [Individual("a", 0, (1.0,)), Individual("b", 1, (2.0,))]
    with pytest.raises(ValueError, match="cannot be compared"):
        select(mixture, 1)


def test_the_result_is_never_worse_than_what_was_given() -> None:
    """Even when the cheap fidelity says the opposite of the truth."""
    toy = Toy(4, 2)
    space = toy.space(0.3)
    best = pick(evolve(space, toy, settings=Settings(seed=9)).front, "best").candidate

    def contrary(structures: Sequence[Structure], fidelity: int) -> list[float]:
        return [toy.loss(s) * (1 if fidelity == 2 else -1) for s in structures]

    result = evolve(space, contrary, seeds=[best], settings=Settings(fidelities=3, generations=4))
    assert pick(result.front, "best").values["loss"] <= toy.loss(best)


def test_one_seed_gives_one_result_and_the_global_generators_are_left_alone() -> None:
    toy = Toy(5, 4, 2.0, (0.0, 1.0))
    chosen = Settings(population=8, generations=6, seed=11, fidelities=2)
    random.seed(3)
    np.random.seed(3)
    python, numpy, classes = random.getstate(), np.random.get_state(legacy=False), set(vars(creator))
    first = evolve(toy.space(0.3), toy, costs={"kv": toy.costs.kv_bytes_per_token}, settings=chosen)
    assert random.getstate() == python
    assert str(np.random.get_state(legacy=False)) == str(numpy)
    assert set(vars(creator)) == classes
    random.seed(4)
    same(first, evolve(toy.space(0.3), toy, costs={"kv": toy.costs.kv_bytes_per_token}, settings=chosen))
    other = evolve(
        toy.space(0.3), toy, costs={"kv": toy.costs.kv_bytes_per_token}, settings=Settings(8, 6, seed=12, fidelities=2)
    )
    assert other.history[0]["mean"] != first.history[0]["mean"]


WORKER = """
import os, signal, sys
from pathlib import Path
from multipruner.search.evolution import evolve
from multipruner.search.memo import Memo
from multipruner.search.settings import Settings
from tests.search.test_evolution import KILLED, Toy
toy, folder, calls = Toy(5, 4, 2.0, (0.0, 1.0, 2.0)), Path(sys.argv[1]), 0
def evaluate(structures, fidelity):
    global calls
    calls += 1
    if calls > int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    return toy(structures, fidelity)
memo = Memo(folder / "memo.jsonl", "toy") if sys.argv[3] == "memo" else None
evolve(toy.space(0.3), evaluate, settings=KILLED, memo=memo, checkpoint=folder / "state.json",
       costs={"parameters": toy.costs.parameters})
"""
KILLED = Settings(population=8, generations=5, fidelities=3, seed=1, batch_size=3)


@pytest.mark.parametrize(("calls", "memo"), [(0, ""), (4, "memo"), (12, ""), (23, "memo"), (29, "")])
def test_a_search_that_was_killed_goes_on_and_ends_the_same(tmp_path: Path, calls: int, memo: str) -> None:
    def run(folder: Path) -> tuple[Result[Structure], Toy]:
        toy = Toy(5, 4, 2.0, (0.0, 1.0, 2.0))
        found = evolve(
            toy.space(0.3), toy, settings=KILLED, checkpoint=folder / "state.json",
            memo=Memo(folder / "memo.jsonl", "toy") if memo else None, costs={"parameters": toy.costs.parameters},
        )  # fmt: skip
        return found, toy

    whole, _ = run(tmp_path / "whole")
    arguments = [sys.executable, "-c", WORKER, str(tmp_path / "killed"), str(calls), memo]
    root = Path(__file__).parents[2]
    killed = subprocess.run(arguments, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, check=False)
    assert killed.returncode == -9
    kept = len(Memo(tmp_path / "killed" / "memo.jsonl", "toy"))
    resumed, toy = run(tmp_path / "killed")
    same(whole, resumed)
    if memo:  # only the batch that was under way is evaluated again
        assert kept >= calls
        assert len(toy.asked) == whole.computed - kept
    again, toy = run(tmp_path / "killed")
    same(whole, again)
    assert not toy.asked
    assert [path.name for path in (tmp_path / "killed").iterdir() if path.name.startswith(".state")] == []


def test_a_search_may_be_prolonged_and_equals_one_that_was_long_from_the_start(tmp_path: Path) -> None:
    def run(generations: int, checkpoint: Path | None) -> Result[Structure]:
        toy = Toy(4, 1, 2.0)
        return evolve(toy.space(0.3), toy, settings=Settings(8, generations), checkpoint=checkpoint)

    run(3, tmp_path / "state.json")
    prolonged = run(7, tmp_path / "state.json")
    same(prolonged, run(7, None))
    assert prolonged.computed == 4 * 8


def test_a_second_search_starts_warm(tmp_path: Path) -> None:
    results = []
    for name in ("first", "second"):
        toy = Toy(5, 4, 2.0, (0.0, 1.0))
        results.append(
            evolve(
                toy.space(0.3), toy, settings=Settings(8, 5, fidelities=2),
                memo=Memo(tmp_path / "memo.jsonl", "toy"), checkpoint=tmp_path / f"{name}.json",
            )
        )  # fmt: skip
    same(*results)
    assert results[0].computed > 0 == results[1].computed
    assert not toy.asked
    fresh = Toy(5, 4, 2.0, (0.0, 1.0))
    evolve(fresh.space(0.3), fresh, settings=Settings(8, 5, fidelities=2), memo=Memo(tmp_path / "memo.jsonl", "other"))
    assert len(fresh.asked) == results[0].computed


def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path) -> None:
    toy, path = Toy(3, 1), tmp_path / "state.json"
    evolve(toy.space(0.3), toy, settings=Settings(8, 1), checkpoint=path)
    for space, chosen, named in ((toy.space(0.3), Settings(8, 1, seed=5), "settings"), (toy.space(0.2), None, "space")):
        with pytest.raises(ConfigError, match=f"another search.*{named}"):
            evolve(space, toy, settings=chosen or Settings(8, 1), checkpoint=path)
    with pytest.raises(ConfigError, match="algorithm"):
        random_search(toy.space(0.3), toy, settings=Settings(8, 1), checkpoint=path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(OutputError, match="remove it"):
        evolve(toy.space(0.3), toy, settings=Settings(8, 1), checkpoint=path)


def test_losses_that_are_not_finite_rule_a_structure_out_and_are_remembered(tmp_path: Path) -> None:
    toy = Toy(4, 3)

    def width(structure: Structure) -> int:
        return layers_of(structure)[0].channels

    def brittle(structures: Sequence[Structure], fidelity: int) -> list[float]:
        toy(structures, fidelity)
        return [(nan, inf)[width(s) % 16 // 8] if width(s) < 24 else toy.loss(s) for s in structures]

    memo, chosen = Memo(tmp_path / "memo.jsonl", "toy"), Settings(generations=10)
    result = evolve(toy.space(0.3), brittle, memo=memo, settings=chosen, checkpoint=tmp_path / "state")
    assert all(width(point.candidate) >= 24 for point in result.front.points)
    assert any(width(structure) < 24 for structure, _ in toy.asked)
    toy.asked.clear()
    same(result, evolve(toy.space(0.3), brittle, memo=Memo(memo.path, "toy"), settings=chosen))
    same(result, evolve(toy.space(0.3), brittle, memo=memo, settings=chosen, checkpoint=tmp_path / "state"))
    assert not toy.asked
    with pytest.raises(NumericsError, match="finite loss"):
        evolve(toy.space(0.3), lambda structures, fidelity: [nan] * len(structures))


def test_a_used_up_space_ends_well() -> None:
    toy = Toy(1, 1)
    result = evolve(toy.space(None), toy, settings=Settings(population=8, generations=12, immigrants=0.5))
    assert sum(result.scored) == 2 * 4 == len(everything(toy.space(None)))
    assert pick(result.front, "best").candidate == toy.dense


def test_files_hold_what_was_found(tmp_path: Path) -> None:
    toy, seen = Toy(3, 1), []
    space = toy.space(None)
    result = evolve(
        space, toy, costs={"parameters": toy.costs.parameters}, settings=Settings(8, 3), on_generation=seen.append
    )
    result.front.write(tmp_path / "front.json", space.to_json)
    record = json.loads((tmp_path / "front.json").read_text())
    assert list(record["points"][0]) == ["structure", "values"]
    assert list(record["points"][0]["values"]) == ["loss", "parameters"]
    assert Front.from_json(record, "structure", space.from_json) == result.front
    lines = json.loads(json.dumps(result.history))
    assert lines == list(result.history) == list(seen[-1])
    assert [line["stage"] for line in lines] == ["generation"] * 4 + ["final"]
    assert [len(history) for history in seen] == [1, 2, 3, 4, 5]
    best = [line["min"][0] for line in lines[:-1]]
    assert best == sorted(best, reverse=True)
    assert result.logbook.select("generation") == [0, 1, 2, 3]
    with pytest.raises(ConfigError, match="not a front"):
        Front.from_json({"points": [{}]}, "structure", space.from_json)


def test_a_point_is_picked_by_its_name_or_its_place() -> None:
    rows = [(1.0, 100.0), (1.2, 60.0), (2.5, 50.0), (4.0, 45.0)]
    front = Front("letter", tuple(Point(c, {"loss": x, "ms": y}) for c, (x, y) in zip("abcd", rows, strict=True)))
    assert [pick(front, how).candidate for how in ("best", "knee", 0, 3)] == ["a", "b", "a", "d"]
    assert pick(Front("letter", front.points[:1]), "knee").candidate == "a"
    for wrong in ("worst", 4, -1):
        with pytest.raises(ConfigError, match="from 0 to 3"):
            pick(front, wrong)  # type: ignore[arg-type]


def test_settings_that_cannot_be_are_all_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"population 6.*multiple of 4.*keep 0"):
        Settings(population=6, keep=0)


def test_the_best_schedule_is_found_among_orders_and_shares() -> None:
    space = ScheduleSpace((8, 16, 32), ("magnitude", "none"), (False, True))
    ideal = Schedule(("heads", "blocks", "mlp"), (31, 60, 9), 16, "none", True)

    def loss(schedule: Schedule) -> float:
        apart = sum((a - b) ** 2 for a, b in zip(schedule.shares, ideal.shares, strict=True)) / 100
        out_of_order = sum(a != b for a, b in zip(schedule.order, ideal.order, strict=True))
        rest = sum(getattr(schedule, n) != getattr(ideal, n) for n in ("channel_group", "importance", "compensation"))
        return apart + 3 * out_of_order + 5 * rest

    losses: dict[str, float] = {}
    for name, search in (("evolution", evolve), ("random", random_search)):
        result = search(
            space, lambda schedules, fidelity: [loss(s) for s in schedules], settings=Settings(generations=25, seed=3)
        )
        losses[name] = pick(result.front, "best").values["loss"]
    assert losses["evolution"] == 0.0 < losses["random"]


def test_two_measured_values_make_two_objectives(tmp_path: Path) -> None:
    """A schedule's costs are known only after its plan was found, so the evaluation may return both."""
    space = ScheduleSpace((8,))

    def evaluate(schedules: Sequence[Schedule], fidelity: int) -> list[tuple[float, float]]:
        return [(float(s.share("blocks")), float(s.share("mlp"))) for s in schedules]

    memo = Memo(tmp_path / "memo.jsonl", "toy")
    result = evolve(space, evaluate, measured=("loss", "ms"), memo=memo, settings=Settings(generations=25))
    assert {"loss": 0.0, "ms": 0.0} in [dict(point.values) for point in result.front.points]
    with pytest.raises(ValueError, match="measured"):
        evolve(space, evaluate)
    with pytest.raises(ValueError, match="values for"):
        evolve(space, lambda schedules, fidelity: [1.0])
