"""Tables of image classifiers: timed by batches of pictures, and a budget in milliseconds that is kept to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from multipruner.checkpoint.cut import apply_plan
from multipruner.commands.main import main
from multipruner.core.errors import ConfigError
from multipruner.core.families import anatomy_of
from multipruner.core.latency_table import LatencyTable, Workload
from multipruner.core.structure import GONE
from multipruner.latency.asked import on_pictures
from multipruner.latency.bench import Effort, measure_table, shapes_of
from multipruner.latency.timing import time_side_by_side
from tests.support import pictures
from tests.support.tiny import plan_for, random_structure

LITTLE = Effort(probes=2, placements=2, repeats=2, warmup=1, tries=1)


@pytest.mark.parametrize("family", pictures.VARIANTS)
def test_every_option_of_a_classifier_is_measured(family: str) -> None:
    model = pictures.tiny_classifier(family)
    anatomy = anatomy_of(model.config)
    workloads = on_pictures("m", model.config, pictures.processor(), [3, 1, 3])
    assert workloads == [Workload("pictures", 3, 8), Workload("pictures", 1, 8)]
    table = measure_table(model, workloads, channel_step=16, effort=LITTLE)
    assert table.workloads == ("pictures-b3-p8", "pictures-b1-p8")
    assert LatencyTable.from_json(table.to_json()).rows == table.rows
    assert table.shapes == shapes_of(model) and table.shapes["num_labels"] == pictures.CLASSES
    for name in table.workloads:
        blocks = table.row(name).blocks
        assert list(blocks["attention"]) == [GONE, *((heads, 1) for heads in range(1, 5))]
        assert {GONE, (16,), anatomy[1].dense} <= set(blocks["mlp"])
        for seed in range(3):
            structure = random_structure(anatomy, seed, partial=True)
            assert table.milliseconds(structure, anatomy, name) > table.constant(name) >= 0
    with pytest.raises(ConfigError, match="num_labels: 5 -> 7"):
        table.check_shapes(shapes_of(pictures.tiny_classifier(family, num_labels=7)))


def test_more_pictures_take_longer_and_fewer_layers_less() -> None:
    model = pictures.tiny_classifier("vit", num_hidden_layers=12)
    anatomy = anatomy_of(model.config)
    low = anatomy.dense
    for number, place in enumerate(anatomy):
        low = low.replace(number, place.dense if place.layer < 2 else GONE)
    models = {"dense": model, "low": apply_plan(model, plan_for(model, low))}
    one, many = (time_side_by_side(models, Workload("pictures", batch, 8), rounds=9) for batch in (1, 256))
    assert many["dense"].best_ms > 2 * one["dense"].best_ms
    assert one["low"].best_ms < one["dense"].best_ms


def test_pictures_that_are_not_square_are_refused() -> None:
    config = pictures.tiny_classifier("vit", image_size=(8, 12)).config
    with pytest.raises(ConfigError, match="8 x 12 pixels: only square ones"):
        on_pictures("m", config, pictures.processor(), [1])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timed")
    pictures.write_classifier(folder / "deit", "deit", num_hidden_layers=6)
    pictures.write_pictures(folder / "train", 8)
    return folder


def test_a_budget_of_milliseconds_is_kept_to(work: Path, tmp_path: Path) -> None:
    table, output = work / "table.json", tmp_path / "out"
    timed = ["latency", "--model", str(work / "deit"), "--output", str(table), "--channel-step", "20"]
    assert main([*timed, "--batch", "1", "--batch", "4"]) == 0
    assert LatencyTable.read(table).workloads == ("pictures-b1-p8", "pictures-b4-p8")
    given = ["--model", str(work / "deit"), "--calibration", str(work / "train"), "--sequences", "1", "--rounds", "0",
             "--channel-group", "20", "--latency-table", str(table), "--workload", "pictures-b4-p8"]  # fmt: skip
    assert main([*given, "--max-latency", "0.7x", "--output", str(output)]) == 0
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    (name, row), *others = report["latency"]["phases"].items()
    assert name == "pictures-b4-p8" and not others
    assert row["predicted_ms"] <= 0.7 * row["predicted_dense_ms"] + 1e-9
    assert row["measured_ms"] < row["dense_ms"]
    card = (output / "README.md").read_text()
    assert "pictures-b4-p8" in card or "ms" in card


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "8"], "timed by batches of pictures: give no --prompt"),
        (["--phase", "decode"], "timed by batches of pictures: give no --phase"),
        (["--batch", "2", "--batch", "0"], "--batch 0: give 1 to"),
    ],
)
def test_flags_of_texts_are_refused(
    flags: list[str], said: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = work / "none.json"
    assert main(["latency", "--model", str(work / "deit"), "--output", str(output), *flags]) == 2
    assert said in " ".join(capsys.readouterr().err.split()) and not output.exists()
