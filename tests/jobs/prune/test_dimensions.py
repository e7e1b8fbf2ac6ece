"""``--dimensions`` in commands: only what is named leaves; refusals say the range and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from multipruner.commands.main import main
from multipruner.core.plan import PruningPlan
from tests.support.caches import cache_at
from tests.support.commands import arguments, assert_range_is_named, paper_arguments
from tests.support.layers import cut_dimensions

SEARCH = ("--population", "4", "--generations", "1", "--seeds", "none", "--moments-sequences", "8")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_at(monkeypatch, tmp_path / "cache")


def left(path: Path) -> set[str]:
    plan = PruningPlan.from_json(path.read_text())
    return cut_dimensions(plan.anatomy, plan.structure)


@pytest.mark.parametrize(
    ("named", "more"),
    [("blocks", ()), ("mlp", ()), ("mlp,heads", ("--query-head-step", "1")), ("heads,mlp", ("--layout", "uniform")),
     ("blocks", ("--tables", "energies")), ("mlp", ("--tables", "energies"))],
)  # fmt: skip
def test_only_what_is_named_leaves(named: str, more: tuple[str, ...], dense: Path, tmp_path: Path) -> None:
    assert main([*arguments(dense, tmp_path / "run"), "--ratio", "0.2", "--dimensions", named, *more]) == 0
    gone = left(tmp_path / "run" / "plan.json")
    assert gone and gone <= {*named.split(",")}


@pytest.mark.parametrize("named", ["blocks", "mlp,heads"])
def test_a_search_keeps_to_it(named: str, dense: Path, tmp_path: Path) -> None:
    assert main(["search", *arguments(dense, tmp_path / "run"), "--dimensions", named, *SEARCH]) == 0
    assert left(tmp_path / "run" / "plan.json") <= {*named.split(",")}


def test_a_budget_out_of_reach_names_the_range(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = arguments(dense, tmp_path / "run", "--dimensions", "heads")
    assert_range_is_named(asked, "--dimensions heads", capsys)


def test_a_plan_and_a_greedy_path_that_cut_more_are_refused(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(dense, tmp_path / "run", "--dimensions", "blocks", "--rounds", "0")) == 0
    plan = str(tmp_path / "run" / "plan.json")
    capsys.readouterr()
    assert main(arguments(dense, tmp_path / "again", "--plan", plan, "--dimensions", "mlp,heads")) == 2
    assert "which --dimensions mlp,heads keeps whole; drop either" in capsys.readouterr().err
    assert main(paper_arguments(dense, tmp_path / "greedy", "--dimensions", "mlp")) == 2
    assert "with 0 for what stays" in capsys.readouterr().err
