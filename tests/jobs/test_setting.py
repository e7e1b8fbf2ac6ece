"""What follows from a recipe and a model is computed once, and anew for another recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from multipruner.config.recipe import Recipe
from multipruner.core.latency_table import Entry, LatencyTable, Workload, WorkloadTable
from multipruner.core.structure import GONE
from multipruner.jobs.prepare import prepare
from multipruner.jobs.setting import Setting
from multipruner.latency.bench import shapes_of


@pytest.fixture
def setting(dense: Path, tmp_path: Path) -> Setting:
    """With a budget in milliseconds, by a table of made-up times that is gone from the disk by now."""
    gone, narrow, wide = (Entry(milliseconds, 0.0, 1) for milliseconds in (1.0, 2.0, 3.0))
    blocks = {"attention": {GONE: gone, (1, 2): narrow, (2, 2): wide}, "mlp": {GONE: gone, (40,): wide}}
    row = WorkloadTable(Workload("prefill", 1, 16), blocks, gone)
    shapes = shapes_of(AutoModelForCausalLM.from_pretrained(dense))
    table, text = tmp_path / "t.json", str(dense / "text.txt")
    table.write_text(LatencyTable(shapes, {}, "2026-01-01", {row.workload.name: row}).to_json())
    recipe = Recipe.build({
        "model": str(dense), "budgets": {"latency": "0.9x"}, "latency_table": str(table), "channel_group": 8,
        "calibration": {"source": text, "sequences": 2, "length": 16, "moments_sequences": 4},
        "evaluation": {"text": text},
    })  # fmt: skip
    made = prepare(recipe, Console(quiet=True), {})
    assert made.latency is not None
    table.unlink()
    return made


def test_everything_is_computed_once_and_the_table_read_once(setting: Setting) -> None:
    assert setting.task is setting.task and setting.identity is setting.identity
    assert setting.task.grid == setting.grid
    (limit,) = setting.task.limits
    assert (limit.name, limit.cost(setting.prunable.dense)) == ("latency", 1.0 + 4 * (3.0 + 3.0))


def test_another_recipe_has_its_own(setting: Setting) -> None:
    recipe = setting.recipe.model_copy(update={"channel_group": 4, "budgets": {}, "latency_table": None, "ratio": 0.25})
    other = replace(setting, recipe=recipe)
    assert [limit.name for limit in other.task.limits] == ["parameters"]
    assert (other.grid.steps["channels"], other.latency, other.problem.ratio) == (4, None, 0.25)
    assert other.identity["channel_group"] == 4 != setting.identity["channel_group"]
    assert [limit.name for limit in setting.task.limits] == ["latency"]
