"""A kind of budget is one row of a table: flag, recipe, limit, report, sweep, figures and pages follow from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest

from multipruner.commands.main import main
from multipruner.config.recipe import Recipe
from multipruner.core.costs import COSTS, Cost
from multipruner.core.errors import ConfigError
from multipruner.core.structure import Structure
from multipruner.report.figures.runs import front_figure
from multipruner.report.inputs import read_folders
from multipruner.search.objectives import check_objectives
from tests.support.commands import arguments
from tests.support.layers import layers_of

HEADS = Cost(
    name="heads_left", word="heads", label="query heads", help="query heads of all layers", metavar="N", unit="count",
    typed={"": 1, "dozen": 12}, axis=(12.0, "dozens"),
    of=lambda measures, structure: measures.costs.anatomy.total(structure, "queries"),
)  # fmt: skip
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module", autouse=True)
def another_kind() -> Iterator[None]:
    with patch.dict(COSTS, {HEADS.name: HEADS}):
        yield


def _without_ratio(command: list[str]) -> list[str]:
    place = command.index("--ratio")
    return command[:place] + command[place + 2 :]


def test_it_is_a_flag_a_limit_and_a_cost_of_the_report(dense: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["--help-all"])
    assert "--max-heads N" in capsys.readouterr().out
    command = _without_ratio(arguments(dense, tmp_path / "run", "--max-heads", "1dozen"))
    assert main(command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["recipe"]["budgets"] == {"heads_left": "1dozen"}
    cost = report["costs"]["heads_left"]
    kept = sum(layer.query_heads for layer in layers_of(Structure.from_json(report["structure"])))
    assert cost["after"] == kept <= 12 < cost["before"]
    assert main(["report", str(tmp_path / "run")]) == 0
    assert "query heads" in (tmp_path / "run" / "report.html").read_text()
    rows = (tmp_path / "run" / "report_files" / "costs.csv").read_text().splitlines()
    assert any(row.startswith("heads_left,") for row in rows)


def test_a_sweep_takes_it_and_draws_it(dense: Path, tmp_path: Path) -> None:
    command = _without_ratio(arguments(dense, tmp_path / "sweep", "--rounds", "0", "--sweep", "heads=0.8x,0.6x"))
    assert main(command) == 0
    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert record["budget"] == "heads_left"
    full, *points = (point["costs"]["heads_left"] for point in record["points"])
    assert [amount <= share * full for amount, share in zip(points, (0.8, 0.6), strict=True)] == [True, True]
    assert "heads_left_share" in (tmp_path / "sweep" / "sweep.csv").read_text().splitlines()[0]


def test_a_search_minimises_it_and_its_front_is_drawn(tmp_path: Path) -> None:
    assert check_objectives(["loss", "heads"]) == ("loss", "heads_left")
    points = [{"loss": 3.0, "heads_left": 24}, {"loss": 4.0, "heads_left": 12}]
    (tmp_path / "front.json").write_text(json.dumps({"points": points}))
    _, (front,) = read_folders([tmp_path])
    assert front.cost == "heads_left"
    assert "query heads (dozens)" in front_figure(front, "front").caption


def test_the_pages_list_it() -> None:
    with patch("sys.path", [str(DOCS), *sys.path]):
        generated = import_module("generated")
    assert "| `--max-heads` | `heads_left` | query heads of all layers | `dozen` |" in generated.budgets()


def test_an_unknown_kind_is_named(dense: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'heads_left'.*kv_bytes"):
        Recipe.build({"model": "m", "budgets": {"heads_lef": "0.5x"}})


def test_no_budget_can_be_said_and_is_no_way_to_prune(dense: Path, tmp_path: Path, capsys) -> None:
    recipe = Recipe.build({"model": "m", "ratio": None})
    assert (recipe.ratio, recipe.budgets) == (None, {})
    command = _without_ratio(arguments(dense, tmp_path / "run", "--set", "ratio=null"))
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "how much goes?" in said and "--max-heads" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()
