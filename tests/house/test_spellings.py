"""Names of earlier versions still work, with one line that says what they are called now."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multipruner.commands.main import main
from multipruner.commands.recipe_flags import recipe_of
from multipruner.config.choices import METHODS
from multipruner.config.fields import flags_of
from multipruner.config.recipe import CalibrationSpec, Recipe
from multipruner.config.spellings import SPELLINGS, OldSpelling, respelled, value_now
from multipruner.core.errors import ConfigError
from multipruner.jobs.finish import Run
from multipruner.jobs.record import recorded_recipe
from multipruner.jobs.workspace import Workspace
from multipruner.recipes import read_file
from multipruner.report.card import model_card
from multipruner.report.inputs import read_folders
from multipruner.sources.ready_ids import ready_ids
from tests.support.commands import arguments
from tests.support.tiny import tiny_tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
OLD = """\
model: a/b
method: global
strategy: sequential
compensation: bias
compensate: final
order: [mlp, heads, blocks]
calibration:
  statistics_sequences: 7
"""


def built(**said: object) -> Recipe:
    """The recipe of a model, with a warning expected."""
    with pytest.warns(OldSpelling):
        return Recipe.build({"model": "m", **said})


def test_a_recipe_file_of_an_earlier_version_means_the_same(tmp_path: Path) -> None:
    (tmp_path / "old.yaml").write_text(OLD)
    with pytest.warns(OldSpelling) as told:
        recipe = Recipe.build(read_file(tmp_path / "old.yaml"))
    new = {"model": "a/b", "method": "greedy", "repair": "bias", "repair_stage": "final",
           "stages": ("mlp", "heads", "blocks"), "calibration": {"moments_sequences": 7}}  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert recipe == Recipe.build(new)
    (line,) = [str(one.message) for one in told]
    assert "\n" not in line and "compensation is repair" in line and "strategy sequential is method greedy" in line
    assert "calibration.statistics_sequences is calibration.moments_sequences" in line


def test_the_preset_of_the_paper_stays_where_only_the_finder_was_changed() -> None:
    recipe = built(method="paper", strategy="milp", budgets={"weight_bytes": "0.7x"})
    assert (recipe.method, recipe.objective, recipe.repair) == ("program", "nll", "none")
    assert built(method="paper", strategy="sequential").method == "paper", "that is what it does anyway"
    assert built(strategy="milp") == Recipe.build({"model": "m", "method": "program"})
    with pytest.raises(ConfigError, match="method = 'annealing': no method"), pytest.warns(OldSpelling):
        Recipe.build({"model": "m", "strategy": "annealing"})


def test_what_is_said_in_both_spellings_is_refused() -> None:
    with pytest.raises(ConfigError, match="compensation is an old name of repair: both are given; say repair alone"):
        Recipe.build({"model": "m", "compensation": "none", "repair": "lstsq"})


def test_flags_and_set_take_old_names(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        word.replace("--moments-sequences", "--statistics-sequences") for word in arguments(dense, tmp_path / "o")
    ]
    more = ["--method", "global", "--compensation", "none", "--set", "compensate=final", "--rounds", "0"]
    assert main([*command, *more]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "old spelling" in line]
    assert len(said) == 2 and all(line.startswith("multipruner: old spelling") for line in said), said
    assert "method global is method program" not in said[0] and "method global is program" in said[0]
    assert "compensation is repair" in said[1] and "compensate is repair_stage" in said[1]
    recipe = json.loads((tmp_path / "o" / "report.json").read_text())["recipe"]
    assert (recipe["method"], recipe["repair"], recipe["repair_stage"]) == ("program", "none", "final")
    assert recipe["calibration"]["moments_sequences"] == 12 and "compensation" not in recipe


def test_old_flags_are_in_no_help(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["search"]):
        with pytest.raises(SystemExit):
            main([*command, "--help-all"])
        told = capsys.readouterr().out
        for word in ("compensat", "strategy", "--order ", "--sweep-sequential", "--statistics", "milp", "sequential"):
            assert word not in told, f"{word} in the help of {command}"


def test_flags_of_a_search_and_a_sweep_take_old_names() -> None:
    from multipruner.commands.search import options_of
    from multipruner.commands.sweep_flags import take

    with pytest.warns(OldSpelling, match=r"compensations is repairs; seeds milp,sequential is program,greedy now"):
        options = options_of({"genome": "schedule", "compensations": "none,lstsq", "seeds": "milp,sequential"})
    assert (options.repairs, options.seeds) == (("none", "lstsq"), ("program", "greedy"))
    assert options.to_json()["seeds"] == "milp,sequential", "what an interrupted search is found by has not changed"
    with pytest.warns(OldSpelling, match="sweep_sequential is sweep_greedy"):
        assert take({"sweep": "0.9", "sweep_sequential": True}).greedy


def test_reports_of_earlier_versions_are_read(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    path = tmp_path / "run" / "report.json"
    report = json.loads(path.read_text())
    new = Recipe.model_validate(report["recipe"])
    recipe = report["recipe"]
    recipe["strategy"], recipe["method"] = ("sequential" if new.greedy else "milp"), "global"
    recipe["compensation"], recipe["compensate"] = recipe.pop("repair"), recipe.pop("repair_stage")
    recipe["order"] = recipe.pop("stages")
    recipe["calibration"]["statistics_sequences"] = recipe["calibration"].pop("moments_sequences")
    report["calibration"]["statistics_tokens"] = report["calibration"].pop("moments_tokens")
    report["search"]["statistics_tokens"] = report["search"].pop("moments_tokens")
    report["search"]["strategy"] = report["search"].pop("method")
    path.write_text(json.dumps(report))
    with pytest.warns(OldSpelling, match=r"report\.json: old spelling"):
        ((read,), _) = read_folders([tmp_path / "run"])
    assert read.report.recipe.keys() == Recipe.model_fields.keys() and read.report.recipe["repair"] == new.repair
    assert read.report.calibration.moments_tokens == report["calibration"]["statistics_tokens"]
    with pytest.warns(OldSpelling):
        found = recorded_recipe(report, tmp_path / "run")
    assert found.model_dump(exclude={"model", "method"}) == new.model_dump(exclude={"model", "method"})
    assert METHODS[found.method].by == METHODS[new.method].by


def test_messages_about_earlier_runs_speak_todays_words(tmp_path: Path) -> None:
    (tmp_path / "run.partial").mkdir()
    shutil.copy(FIXTURES / "v1" / "measurements.jsonl", tmp_path / "run.partial")
    header = json.loads((FIXTURES / "v1" / "measurements.jsonl").read_text().splitlines()[0])
    changed = header["identity"] | {"compensation": "bias", "strategy": "sequential"}
    with Workspace(tmp_path / "run") as workspace, pytest.raises(Exception, match=r"repair: .* -> bias") as caught:
        workspace.open_measurements(changed, overwrite=False)
    assert "method: program -> greedy" in str(caught.value) and "compensation" not in str(caught.value)


def test_ready_ids_may_be_named_as_before(tmp_path: Path) -> None:
    ids = torch.arange(12).reshape(3, 4)
    save_file({"input_ids": ids, "statistics_ids": ids + 1}, tmp_path / "ids.safetensors")
    with pytest.warns(OldSpelling, match=r"ids\.safetensors: .*statistics_ids is moments_ids"):
        found = ready_ids(tmp_path / "ids.safetensors", "moments", tiny_tokenizer(), None)
    assert found is not None and torch.equal(found, ids + 1)


def test_the_table_leads_to_what_there_is() -> None:
    keys = {flag.key for flag in flags_of(Recipe)}
    for row in SPELLINGS:
        if row.where == "recipe":
            assert row.new in keys and (row.old not in keys or row.old == row.new)
            assert set(row.values.values()) <= set(METHODS)
    assert value_now("recipe", "method", "paper") == "paper"
    given = {"calibration": {"statistics_sequences": 3}}
    with pytest.warns(OldSpelling):
        assert respelled("recipe", given)["calibration"] == {"moments_sequences": 3}
    assert given == {"calibration": {"statistics_sequences": 3}}, "it stays as it was"
    assert CalibrationSpec.model_fields.keys() >= {"moments_sequences"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe_of({"model": "llama", "method": "greedy", "repair": "none"})


@pytest.mark.parametrize("how", ["none", "lstsq"])
def test_the_card_of_an_earlier_run_says_what_was_repaired(how: str, run: Run) -> None:
    recipe = {"model": "m", "strategy": "sequential", "method": "global", "compensation": how}
    with pytest.warns(OldSpelling):
        card = model_card({"recipe": recipe}, run.plan)
    assert ("these weights again, bit for bit" in card) == (how == "none")
    assert f"repair: {how}" in card and "method: greedy" in card and "found by" not in card
