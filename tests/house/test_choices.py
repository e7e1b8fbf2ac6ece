"""What is chosen by name comes from tables: every row leads to its code, and a new one is known everywhere."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

import pytest

from multipruner.commands.main import main
from multipruner.config.choices import EXPORTS, IMPORTANCES, METHODS, TEXTS, Importance, Text, loaded
from multipruner.config.recipe import CalibrationSpec, Recipe
from multipruner.core.errors import CalibrationError, ConfigError
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.jobs.tune.text import tuning_text
from multipruner.sources.calibration import load_calibration
from multipruner.sources.rows import Rows, Wanted, of_texts
from tests.support.tiny import tiny_model, tiny_tokenizer

DOCS = Path(__file__).parents[2] / "docs"


def test_every_row_leads_to_its_code() -> None:
    rows = [row for table in (IMPORTANCES, METHODS, EXPORTS) for row in table.values()]
    assert all(callable(loaded(row.by)) for row in rows)
    texts = [where for row in TEXTS.values() for where in (row.by, row.takes) if where is not None]
    assert texts and all(callable(loaded(where)) for where in texts)
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


def proverbs(source: str, wanted: Wanted, *, times: int) -> Rows:
    """Rows of a throw-away source."""
    return of_texts(source, (f"a stitch in time saves nine or {number} more" for number in range(times)))


def test_a_new_text_is_one_row(capsys, tmp_path: Path) -> None:
    row = Text("tests.house.test_choices:proverbs", "proverbs (said often)", "proverbs", options={"times": 90})
    with patch.dict(TEXTS, {"proverbs": row}), patch.object(sys, "path", [str(DOCS), *sys.path]):
        for command in (["--help-all"], ["--help"], ["tune", "--help"]):
            with pytest.raises(SystemExit):
                main(command)
            assert "proverbs" in capsys.readouterr().out
        generated = import_module("generated")
        listed = generated.keys()
        assert "proverbs (said often)" in listed
        spec = CalibrationSpec(source="proverbs", sequences=3, length=8)
        assert Recipe.build({"model": "m", "calibration": {"source": "proverbs"}}).calibration.source == "proverbs"
        found = load_calibration(spec, tiny_tokenizer())
        assert (found.ids.shape, found.name) == ((3, 8), "proverbs")
        mixed = load_calibration(
            spec.model_copy(update={"source": "proverbs+self"}), tiny_tokenizer(), tiny_model("llama")
        )
        assert (len(mixed.ids), mixed.name) == (3, "proverbs+self")
        trained = tuning_text("proverbs", tiny_tokenizer(), {}, tmp_path, sequences=2, length=8, seed=0)
        assert trained.train.shape == (2, 8)
        with pytest.raises(CalibrationError, match=r"no calibration text 'proverb' \(did you mean 'proverbs'\?\)"):
            load_calibration(spec.model_copy(update={"source": "proverb"}), tiny_tokenizer())
    with pytest.raises(CalibrationError, match="no calibration text 'proverbs'"):
        load_calibration(spec, tiny_tokenizer())
