"""``--freeze`` in commands: what is named stays whole in the plan, whatever the method; refusals say the range."""

from __future__ import annotations

from pathlib import Path

import pytest

from multipruner.commands.main import main
from multipruner.core.plan import PruningPlan
from tests.support.caches import cache_at
from tests.support.commands import arguments, assert_range_is_named, paper_arguments

FREEZE = ("--freeze", "1,attention:0,mlp:3")
SEARCH = ("--population", "4", "--generations", "1", "--seeds", "none", "--moments-sequences", "8")
SCHEDULE = ("--genome", "schedule", "--population", "4", "--generations", "1")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_at(monkeypatch, tmp_path / "cache")


def check(path: Path) -> None:
    """The named blocks are whole, and others are not."""
    plan = PruningPlan.from_json(path.read_text())
    rows = list(zip(plan.anatomy, plan.structure, strict=True))
    whole = [size == place.dense for place, size in rows if place.layer == 1 or (place.kind, place.layer) in
             (("attention", 0), ("mlp", 3))]  # fmt: skip
    assert whole == [True] * 4 and any(size != place.dense for place, size in rows)


@pytest.mark.parametrize("kind", ["program", "greedy", "structures", "schedules"])
def test_what_is_frozen_stays_whole(kind: str, dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    asked = {
        "program": arguments(dense, output, "--query-head-step", "1"),
        "greedy": paper_arguments(dense, output),
        "structures": ["search", *arguments(dense, output), *SEARCH],
        "schedules": ["search", *paper_arguments(dense, output)[2:], *SCHEDULE],
    }[kind]
    assert main([*asked, *FREEZE]) == 0
    check(output / "plan.json")


def test_every_point_of_a_sweep_keeps_it(dense: Path, tmp_path: Path) -> None:
    asked = arguments(dense, tmp_path / "sweep", "--sweep", "0.8,0.7", *FREEZE)
    assert main([word for word in asked if word not in ("--ratio", "0.3")]) == 0
    plans = sorted((tmp_path / "sweep" / "plans").glob("*.json"))
    assert len(plans) == 2
    for plan in plans:
        check(plan)


@pytest.mark.parametrize("method", ["program", "greedy"])
def test_a_budget_out_of_reach_names_the_range(
    method: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = arguments(dense, tmp_path / "run", "--freeze", "0-2", "--method", method)
    assert_range_is_named(asked, "--freeze 0-2", capsys)


def test_a_plan_that_cuts_what_is_frozen_is_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dense, tmp_path / "run", "--rounds", "0")) == 0
    asked = arguments(
        dense, tmp_path / "again", "--plan", str(tmp_path / "run" / "plan.json"), "--freeze", "0-2,attention:3"
    )
    assert main(asked) == 2
    assert "keeps whole; drop either" in capsys.readouterr().err
