"""An effort is a row of defaults: single keys win over it, wherever they stand, and one of them is the default."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from multipruner.commands.main import main
from multipruner.commands.recipe_flags import recipe_of
from multipruner.config.choices import METHODS
from multipruner.config.effort import EFFORTS, effort_of
from multipruner.config.fields import keys_of
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError

PUBLISHED = {"sequences": 8, "width_sequences": 4, "length": 128}
"""What the published method measures on."""
MEASURED = ("sequences", "width_sequences", "moments_sequences", "length")


def _measured(recipe: Recipe) -> dict[str, Any]:
    return {"rounds": recipe.rounds, **{key: getattr(recipe.calibration, key) for key in MEASURED}}


@pytest.mark.parametrize("method", METHODS)
def test_no_effort_is_the_default_one(method: str) -> None:
    found = Recipe.build({"model": "m", "method": method})
    assert found.effort == effort_of(method) and found.effort in EFFORTS
    assert found == Recipe.build({"model": "m", "method": method, "effort": found.effort})


def test_the_published_method_is_as_published_where_nothing_else_is_said() -> None:
    found = Recipe.build({"model": "m", "method": "paper"})
    assert {key: getattr(found.calibration, key) for key in PUBLISHED} == PUBLISHED


def test_every_row_names_keys_of_a_recipe_and_measures_more_than_the_one_before() -> None:
    for row in EFFORTS.values():
        assert set(row.by_method) == set(METHODS) and row.costs
        for values in row.by_method.values():
            flat = {f"calibration.{key}" for key in values["calibration"]} | set(values) - {"calibration"}
            assert flat <= set(keys_of(Recipe))
    for method in METHODS:
        rows = [list(_measured(Recipe.build({"model": "m", "method": method, "effort": name})).values())
                for name in EFFORTS]  # fmt: skip
        for less, more in pairwise(rows):
            assert less != more or method == "paper"
            assert all(a <= b for a, b in zip(less, more, strict=True))


def test_what_is_said_wins_in_this_order(tmp_path: Path) -> None:
    """Typed > the file > the effort > the method > the field's own default."""
    (tmp_path / "mine.yaml").write_text("model: a/b\neffort: fast\ncalibration: {sequences: 5}\n")
    (tmp_path / "published.yaml").write_text("model: a/b\nmethod: paper\ncalibration: {length: 2048}\n")

    def built(name: str, **typed: Any) -> Recipe:
        return recipe_of({"recipe": tmp_path / name, **typed})

    fast = EFFORTS["fast"].by_method["program"]
    found = built("mine.yaml")
    assert (found.effort, found.rounds, found.calibration.sequences) == ("fast", fast["rounds"], 5)
    assert found.calibration.moments_sequences == fast["calibration"]["moments_sequences"]
    assert found.calibration.source == "self", "what the method sets and the effort leaves alone"
    found = built("mine.yaml", **{"calibration.sequences": 6, "rounds": 3, "effort": "balanced"})
    assert (found.effort, found.rounds, found.calibration.sequences) == ("balanced", 3, 6)
    found = built("published.yaml", effort="fast")
    assert found.calibration.length == 2048, "an effort that is typed sets defaults, too"
    assert found.calibration.sequences == EFFORTS["fast"].by_method["paper"]["calibration"]["sequences"]


def test_an_effort_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'thorough'"):
        Recipe.build({"model": "m", "effort": "thorugh"})


def test_the_help_says_what_each_costs(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            main([flag])
        said = " ".join(capsys.readouterr().out.split())
        assert all(f"{name}: {row.costs}" in said for name, row in EFFORTS.items())
