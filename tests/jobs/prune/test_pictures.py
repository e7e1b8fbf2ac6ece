"""An image classifier from folder to folder: stock classes open it, accuracy is in the report, a plan does it again."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import multipruner
from multipruner.commands.main import main
from multipruner.core.plan import PruningPlan
from tests.support.pictures import pixels, write_classifier, write_pictures

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_classifier(folder / "vit")
    write_pictures(folder / "train", 12)
    write_pictures(folder / "flat", 30, ())
    return folder


def _run(work: Path, output: Path, *more: str, source: str = "train") -> int:
    given = ["--model", str(work / "vit"), "--ratio", "0.3", "--calibration", str(work / source), "--sequences", "1",
             "--channel-group", "8", "--output", str(output)]  # fmt: skip
    return main([*given, *more])


@pytest.mark.parametrize("layout", ["blocks-free", "uniform"])
def test_a_classifier_is_pruned_from_folder_to_folder(layout: str, work: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert _run(work, output, "--layout", layout) == 0
    report = json.loads((output / "report.json").read_text())
    model: Any = multipruner.load(output)
    theirs = AutoModelForImageClassification.from_pretrained(output, trust_remote_code=layout != "uniform")
    assert type(model).__name__.removeprefix("Pruned") == "ViTForImageClassification"
    if layout == "uniform":
        assert not type(model).__name__.startswith("Pruned")
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels()).logits, theirs(pixel_values=pixels()).logits)
    assert sum(weight.numel() for weight in model.parameters()) == report["parameters"]["after"]
    assert report["ratio"] >= 0.3 and report["calibration"]["pictures"] == 16
    ((name, found),) = report["tasks"].items()
    assert name == "pictures of train" and set(found) == {"acc"} and report["perplexity"] == {}
    assert found["acc"]["examples"] == report["calibration"]["held_out_pictures"] > 0
    card = (output / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "AutoModelForImageClassification" in card
    assert "AutoTokenizer" not in card and "AutoModelForCausalLM" not in card
    assert AutoImageProcessor.from_pretrained(output) is not None


@pytest.mark.parametrize("family", ["dinov2", "dinov2-gated", "siglip"])
def test_classifiers_with_other_heads_are_pruned_from_folder_to_folder(family: str, work: Path, tmp_path: Path) -> None:
    dense, output = write_classifier(tmp_path / family, family), tmp_path / "out"
    given = ["--ratio", "0.25", "--calibration", str(work / "train"), "--sequences", "1", "--channel-group", "8"]
    assert main(["--model", str(dense), *given, "--output", str(output)]) == 0
    report = json.loads((output / "report.json").read_text())
    model: Any = multipruner.load(output)
    theirs = AutoModelForImageClassification.from_pretrained(output, trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(model(pixel_values=pixels()).logits, theirs(pixel_values=pixels()).logits)
    assert sum(weight.numel() for weight in model.parameters()) == report["parameters"]["after"]
    assert report["ratio"] >= 0.25 and next(iter(report["tasks"].values()))["acc"]["examples"] > 0
    assert main(["eval", str(output), "--eval-text", str(work / "train"), "--limit", "8"]) == 0
    assert main(["report", str(output)]) == 0


def test_a_plan_gives_the_same_model_and_pages_are_made(work: Path, tmp_path: Path) -> None:
    assert _run(work, tmp_path / "out", source="flat") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (found,) = report["tasks"].values()
    assert set(found) == {"same class as dense"} and next(iter(found.values()))["dense"] == 1.0
    assert _run(work, tmp_path / "again", "--plan", str(tmp_path / "out" / "plan.json"), source="flat") == 0
    plans = [PruningPlan.from_json((tmp_path / name / "plan.json").read_text()) for name in ("out", "again")]
    assert plans[0].structure == plans[1].structure
    weights = [multipruner.load(tmp_path / name).state_dict() for name in ("out", "again")]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
    assert main(["eval", str(tmp_path / "out"), "--eval-text", str(work / "train"), "--limit", "40"]) == 0
    (later,) = json.loads((tmp_path / "out" / "report.json").read_text())["evaluations"]
    assert later["tasks"]["pictures of train"]["acc"]["examples"] == 40
    assert main(["report", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "AutoModelForImageClassification" in page and "AutoTokenizer" not in page


@pytest.mark.parametrize("more", [("--method", "greedy"), ("--effort", "balanced"), ("--repair", "none")])
def test_other_ways_reach_the_ratio(more: tuple[str, ...], work: Path, tmp_path: Path) -> None:
    assert _run(work, tmp_path / "out", *more) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["ratio"] == pytest.approx(0.3, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "{vit}", "--calibration", "self"], "no folder of pictures: give --calibration FOLDER"),
        (["--model", "{vit}"], "no folder of pictures: give --calibration FOLDER"),
        (["search", "--model", "{vit}", "--calibration", "{train}"], "the rest is for language models"),
        (["latency", "--model", "{vit}", "--runtime", "openvino"], "the rest is for language models"),
        (["--model", "{vit}", "--dry-run"], "the rest is for language models"),
        (["--model", "{vit}", "--calibration", "{train}", "--max-kv-bytes", "0.7x"], "--max-kv-bytes 0.7x: the dense"),
        (["export", "{vit}", "--format", "gguf"], "export --format gguf is for language models alone"),
        (["--model", "{bare}", "--calibration", "{train}"], "has no image processor (preprocessor_config.json)"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], said: str, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "bare"
    write_classifier(bare)
    (bare / "preprocessor_config.json").unlink()
    places = {"vit": work / "vit", "train": work / "train", "bare": bare}
    given = [word.format(**places) for word in arguments]
    more = ["--channel-group", "8"] if given[0] in ("--model", "search") else []
    assert main([*given, *more, "--output", str(tmp_path / "out")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert said in told and "Traceback" not in told and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_digits_are_still_read(tmp_path: Path) -> None:
    """A DeiT that is trained here on real pictures: how many it reads at 20 to 50 %, with and without repair."""
    with patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        vision = import_module("vision")
    vision.write_digits(tmp_path)
    vision.train(tmp_path / "dense", tmp_path / "train", 20)
    rows = {str(row[0]): row for row in vision.table(tmp_path, [0.2, 0.35, 0.5], [])}
    right, divergence = ({name: row[place] for name, row in rows.items()} for place in (4, 3))
    assert right["dense"][0] > 92
    for ratio in ("20%", "35%", "50%"):
        assert right[f"{ratio}, repaired"][0] > right["dense"][0] - 2.5
        assert divergence[f"{ratio}, repaired"] < divergence[f"{ratio}, cut alone"] / 2
