"""What is chosen by name comes from tables: every row leads to its code, and a new one is known everywhere."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest

from multipruner.commands.main import main
from multipruner.config.choices import EXPORTS, IMPORTANCES, METHODS, Importance, loaded
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from tests.support.tiny import tiny_model

DOCS = Path(__file__).parents[2] / "docs"


def test_every_row_leads_to_its_code() -> None:
    rows = [row for table in (IMPORTANCES, METHODS, EXPORTS) for row in table.values()]
    assert all(callable(loaded(row.by)) for row in rows)
    for name in METHODS:
        assert Recipe.build({"model": "m", "method": name}).method == name


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("importance", "magnitud", r"did you mean 'magnitude'.*second-order"),
        ("method", "papers", r"did you mean 'paper'.*program, greedy"),
    ],
)
def test_what_is_not_in_a_table_is_said_with_what_is(key: str, value: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Recipe.build({"model": "m", key: value})


def test_a_new_importance_is_one_row(capsys) -> None:
    row = Importance("multipruner.importance.orders:as_it_is")
    with patch.dict(IMPORTANCES, {"backwards": row}), patch.object(sys, "path", [str(DOCS), *sys.path]):
        assert Recipe.build({"model": "m", "importance": "backwards"}).importance == "backwards"
        prunable = Prunable.of(tiny_model("llama"))
        assert rank("backwards", prunable) == rank("none", prunable)
        with pytest.raises(SystemExit):
            main(["--help-all"])
        assert "second-order,none,backwards}" in capsys.readouterr().out.replace("\n", "").replace(" ", "")
        generated = import_module("generated")
        assert "| `backwards` | no |" in generated.importances()
        listed = generated.keys()
        assert "`none`, `backwards`" in listed
