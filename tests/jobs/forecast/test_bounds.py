"""A run keeps to the memory that it is allowed, or says before it begins what it would need."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from multipruner.commands.main import main
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, MemoryShortError
from multipruner.engine.prunable import Prunable
from multipruner.jobs.forecast.bounds import Allowed, Fitting
from tests.support.commands import arguments
from tests.support.tiny import tiny_model


def asked(**settings: Any) -> Recipe:
    text = {"source": "text.txt", "moments_sequences": 128}
    given = {"model": "x", "device": "cpu", "effort": "balanced", "calibration": text, "evaluation": {"text": "t"}}
    return Recipe.build({**given, **settings})


def bound(size: int, **settings: Any) -> Recipe:
    return asked(max_host_memory=size / 2**30, **settings)


@pytest.fixture(scope="module")
def fitting() -> Fitting:
    return Fitting(Prunable.of(tiny_model("llama", layers=6)), torch.float32)


def test_a_run_is_made_smaller_step_by_step(fitting: Fitting) -> None:
    whole, moved = (fitting.peak(asked(moments=where), False) for where in ("memory", "disk"))
    walked = fitting.peak(asked(), True)
    assert walked < moved < whole
    said: list[str] = []
    recipe, layers = fitting.fit(bound(whole), (), said.append)
    assert (recipe.moments, len(layers), said) == ("memory", 0, [])
    recipe, layers = fitting.fit(bound(whole - 1), (), said.append)
    assert (recipe.moments, len(layers)) == ("disk", 0) and said.pop().startswith("moments go to disk")
    recipe, layers = fitting.fit(bound(moved - 1), (), said.append)
    assert len(layers) == 6 and said == ["decoder layers go to disk, so that --max-host-memory is kept"]


def test_what_does_not_fit_says_what_would_lower_it(fitting: Fitting) -> None:
    whole = fitting.peak(asked(), False)
    with pytest.raises(MemoryShortError) as caught:
        fitting.fit(bound(fitting.peak(asked(), True) - 1), (), print)
    said = str(caught.value)
    assert "--max-host-memory allows" in said and "what lowers that: " in said
    told = re.findall(r"(--[\w-]+ \w+) \(([\d.]+) MiB\)", said)
    assert {"--offload disk", "--moments disk", "--moments-sequences 64"} <= {flag for flag, _ in told}
    assert all(float(size) < whole / 2**20 for _, size in told)
    assert [size for _, size in told] == sorted((size for _, size in told), key=float)


def test_what_was_typed_stays(fitting: Fitting) -> None:
    small = fitting.peak(asked(moments="disk"), False)
    with pytest.raises(MemoryShortError, match=r"what lowers that: .*--moments disk"):
        fitting.fit(bound(small, moments="memory", offload="none"), (), print)
    with pytest.raises(MemoryShortError, match="--offload disk"):
        fitting.fit(bound(small - 1, offload="none"), (), print)


def test_a_processor_has_no_device_memory(fitting: Fitting) -> None:
    with pytest.raises(ConfigError, match="give --max-host-memory"):
        fitting.fit(asked(max_device_memory=1), (), print)
    assert Allowed.of(asked(max_host_memory=2)) == Allowed(2 << 30, "--max-host-memory")
    assert Allowed.of(asked()) is None


@pytest.mark.parametrize("more", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_nothing_is_begun_where_memory_does_not_suffice(
    more: tuple[str, ...], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked_for = arguments(dense, tmp_path / "out", "--max-host-memory", "0.01", "--offload", "none", *more)
    assert main(asked_for) == 2
    said = capsys.readouterr().err
    assert "of memory are foretold, and --max-host-memory allows 10.2 MiB" in said
    assert not (tmp_path / "out").exists()


def test_the_report_has_what_was_said_allowed_and_taken(dense: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(arguments(dense, tmp_path / "out", "--max-host-memory", "64")) == 0
    memory = json.loads((tmp_path / "out" / "report.json").read_text())["forecast"]["memory"]
    assert memory["allowed_bytes"] == 64 << 30
    assert 0 < memory["peak_bytes"] < memory["allowed_bytes"] and memory["predicted_bytes"] > 0
    assert "the run took" not in capsys.readouterr().out
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "memory that was allowed" in next((tmp_path / "out").glob("*.html")).read_text()


def test_other_jobs_keep_to_it_too(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep, a search, and a plan that is given; nothing is left behind."""
    assert main(arguments(dense, tmp_path / "run", "--max-host-memory", "64")) == 0
    plan = ("--plan", str(tmp_path / "run" / "plan.json"))
    common = arguments(dense, tmp_path / "out", "--max-host-memory", "0.01")
    without = [word for word in common if word not in ("--ratio", "0.3")]
    for words in ([*without, "--sweep", "0.9,0.8"], ["search", *common, "--population", "4"], [*common, *plan]):
        capsys.readouterr()
        assert main(words) == 2
        assert "--max-host-memory allows 10.2 MiB" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_job_that_makes_no_model_leaves_no_room_for_one(fitting: Fitting) -> None:
    whole, searching = fitting.peak(asked(), False), replace(fitting, stages=("text", "moments", "search"))
    recipe = asked(moments="disk", effort="fast")  # where what is made takes the most
    assert searching.peak(recipe, False) < fitting.peak(recipe, False) <= whole
