"""Runs against each other: who beats whom, what is not compared, and what is told apart."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from multipruner.commands.main import main as command_line
from multipruner.report.compare.figure import _joined, pareto_figure
from multipruner.report.compare.section import _apart
from multipruner.report.compare.standing import BITS, Point, Ranking, rankings
from multipruner.report.figures.runs import curves, perplexity_figure
from multipruner.report.figures.structure import structures_figure
from multipruner.report.inputs import read_folders
from tests.support.tiny import tiny_model, tiny_tokenizer

DENSE = {"parameters": 1000, "weight_bytes": 2000}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real run of a tiny model; the others are copies with other numbers."""
    base = tmp_path_factory.mktemp("compare")
    dense = base / "tiny"
    tiny_model("llama", layers=2).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    text = dense / "text.txt"
    text.write_text(" ".join(f"w{4 + (n * n + n // 7) % 93}" for n in range(1500)))
    flags = ["--method", "paper", "--model", str(dense), "--ratio", "0.2", "--calibration", str(text), "--sequences",
             "2", "--length", "16", "--channel-group", "8", "--eval-text", str(text), "--shares", "0:100:0",
             "--output", str(base / "made")]  # fmt: skip
    assert command_line(flags) == 0
    return base / "made"


def contrast(dense: float, pruned: float, examples: int = 8) -> dict[str, Any]:
    return {"dense": dense, "dense_stderr": None, "pruned": pruned, "pruned_stderr": None,
            "difference": pruned - dense, "difference_stderr": None, "examples": examples}  # fmt: skip


class Folders:
    """Makes folders of runs whose numbers are given."""

    def __init__(self, made: Path, base: Path) -> None:
        self.made, self.base = made, base

    def __call__(self, name: str, pruned: float, kept: int, *, dense: float = 10.0, **values: Any) -> Path:
        folder = self.base / name
        folder.mkdir()
        for file in ("report.json", "plan.json", "tokenizer.json"):
            shutil.copy(self.made / file, folder)
        costs = {"weight_bytes": {"before": DENSE["weight_bytes"], "after": 2 * kept}}
        report = json.loads((folder / "report.json").read_text())
        report |= {"parameters": {"before": DENSE["parameters"], "after": kept}, "costs": costs,
                   "perplexity": {"text": contrast(dense, pruned)}, **values}  # fmt: skip
        (folder / "report.json").write_text(json.dumps(report))
        return folder


@pytest.fixture
def folders(made: Path, tmp_path: Path) -> Folders:
    return Folders(made, tmp_path)


def ranked(*folders: Path) -> tuple[list[set[str]], set[str]]:
    """The groups that are ranked, and who is in none."""
    found, alone = rankings(read_folders(folders)[0])
    return [{entry.run.label for entry in ranking.entries} for ranking in found], {run.label for run in alone}


def ranking_of(*folders: Path) -> Ranking:
    """The only one of some runs."""
    (ranking,), alone = rankings(read_folders(folders)[0])
    assert not alone
    return ranking


def beaten(ranking: Ranking, saving: str, *, tasks: bool = False) -> dict[str, str | None]:
    """Who beats whom in a panel."""
    return {point.entry.run.label: point.beaten_by for point in points(ranking, saving, tasks=tasks)}


def points(ranking: Ranking, saving: str, *, tasks: bool = False) -> tuple[Point, ...]:
    """What a panel shows; nothing where there is no such panel."""
    return next((p.points for p in ranking.panels if (p.saving, p.tasks) == (saving, tasks)), ())


def timed(dense: float, measured: float) -> dict[str, Any]:
    return {"phases": {"decode": {"dense_ms": dense, "measured_ms": measured, "predicted_ms": measured}}}


def test_the_page_shows_who_is_beaten(folders: Folders) -> None:
    runs = [
        folders("light", 11.0, 900, latency=timed(10, 9)),
        folders("worse", 13.0, 900, latency=timed(10, 5)),
        folders("heavy", 15.0, 600),
        folders("bad", 16.0, 700),
        folders("elsewhere", 12.0, 700, dense=9.0),
    ]
    output = folders.base / "page"
    assert command_line(["report", "--compare", *map(str, runs), "--output", str(output)]) == 0
    table = list(csv.DictReader(io.StringIO((output / "report_files" / "runs-pareto.csv").read_text())))
    better = {"light": "", "worse": "light", "heavy": "", "bad": "heavy"}
    for saving in ("parameters", "weights"):
        rows = {row["run"]: row for row in table if row["saving"] == saving}
        assert {name: (row["beaten_by"], row["unbeaten"]) for name, row in rows.items()} == {
            name: (by, str(int(not by))) for name, by in better.items()
        }
        assert [float(row["value"]) for row in rows.values()] == [1.1, 1.3, 1.5, 1.6]
        assert [round(float(row["saved"]), 9) for row in rows.values()] == [0.1, 0.1, 0.4, 0.3]
    faster = {row["run"]: (float(row["saved"]), row["beaten_by"]) for row in table if row["saving"].startswith("speed")}
    assert faster == {"light": (10 / 9, ""), "worse": (2.0, "")}
    text = (output / "report.html").read_text()
    assert "beaten by heavy" in text
    assert "at speed-up, decode" in text, "what is beaten at one saving may be best at another"
    assert "A perplexity counts per token" in text
    assert "With no other: elsewhere (pruned)" in text
    order = [text.index(f'>{run.name}</a></td><td class="text">pruned') for run in runs[:4]]
    assert order == sorted(order), "by rising loss"
    with Image.open(output / "report_files" / "runs-pareto.png") as picture:
        assert picture.width == 1350
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10


def _names(figure: Figure) -> set[str]:
    """The names of runs in a figure, each of which ends within it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = set()
    for text in figure.findobj(Text):
        if isinstance(text, Text) and text.get_text().startswith("a-mod"):
            box = text.get_window_extent(canvas.get_renderer())
            assert box.x0 >= 0 and box.x1 <= figure.bbox.width, text.get_text()
            found.add(text.get_text())
    return found


def test_names_stay_within_the_picture_on_a_phone(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that differ at their ends are told apart, too."""
    seen: list[set[str]] = []
    monkeypatch.setattr("multipruner.report.figures.drawing._png", lambda wide, title: b"")
    monkeypatch.setattr("multipruner.report.figures.drawing._svg", lambda each, *rest: seen.append(_names(each)) or "")
    made = [folders(f"a-model-of-a-long-name-{n}-{end}", 12.0 + n, 900 - 200 * n)
            for n, end in enumerate(("program", "greedy"))]  # fmt: skip
    runs = read_folders(made)[0]
    pareto_figure(rankings(runs)[0][0], "runs-pareto")
    structures_figure(runs, "runs-structures")
    assert [len(names) for names in seen] == [2, 2, 2, 2], "wide and narrow, of either figure"
    assert seen[1] == {"a-model-…program", "a-model-…-greedy"}


def test_savings_that_look_the_same_share_a_panel(folders: Folders) -> None:
    other = {"weight_bytes": {"before": 2000, "after": 100}}
    same = ranking_of(folders("one", 11.0, 900), folders("two", 12.0, 700))
    apart = ranking_of(folders("three", 11.0, 900), folders("four", 12.0, 700, costs=other))
    assert [panel.saving for panel in _joined(same.panels)] == ["parameters, weights"]
    assert [panel.saving for panel in _joined(apart.panels)] == ["parameters", "weights"]
    told = {row["saving"] for row in csv.DictReader(io.StringIO(pareto_figure(same, "x").csv))}
    assert told == {"parameters", "weights"}, "the numbers are all there"


def test_a_run_without_any_perplexity_is_told_how_it_gets_one(folders: Folders) -> None:
    runs = [folders("one", 11.0, 900), folders("two", 12.0, 700), folders("new", 0, 600, perplexity={})]
    text = " ".join(map(str, _apart(*rankings(read_folders(runs)[0]))))
    assert "Never set beside the dense model since the folder was written: new (pruned)" in text
    assert f"multipruner eval {runs[2]}<" in text and "With no other" not in text


def test_runs_that_are_the_same_beat_neither(folders: Folders) -> None:
    found = ranking_of(folders("one", 15.0, 600), folders("two", 15.0, 600))
    assert beaten(found, "parameters") == {"one": None, "two": None}


def test_tuned_runs_are_ranked_apart(folders: Folders) -> None:
    evaluation = {"settings": {}, "perplexity": {"text": contrast(10.0, 10.5)}, "tasks": {}, "average": None}
    values: dict[str, Any] = {"tuned": {"steps": 3}, "perplexity": {}, "evaluations": [evaluation]}
    found = ranking_of(
        folders("pruned", 15.0, 700), folders("tuned", 0, 600, **values), folders("better", 0, 500, **values)
    )
    assert beaten(found, "parameters") == {"tuned": "better", "better": None, "pruned": None}
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(pareto_figure(found, "runs-pareto").csv))}
    assert {name: row["kind"] for name, row in rows.items()} == {
        "pruned": "pruned", "tuned": "tuned", "better": "tuned",
    }  # fmt: skip


def test_perplexities_of_tuned_runs_are_a_line_of_their_own(folders: Folders) -> None:
    evaluation = {"settings": {}, "perplexity": {"text": contrast(10.0, 10.5)}, "tasks": {}, "average": None}
    pruned = folders("pruned", 15.0, 700)
    tuned = folders("tuned", 0, 600, tuned={"steps": 3}, perplexity={}, evaluations=[evaluation])
    (curve,) = curves(read_folders([pruned, tuned])[0])
    assert [[point.run for point in curve.of(kind).points] for kind in (False, True)] == [["pruned"], ["tuned"]]
    drawn = perplexity_figure([curve], "runs-perplexity")
    rows = list(csv.DictReader(io.StringIO(drawn.csv)))
    assert [(row["run"], row["tuned"]) for row in rows] == [("dense", "0"), ("pruned", "0"), ("tuned", "1")]
    assert "text, tuned" in drawn.wide


def test_perplexities_of_other_texts_models_and_tokenizers_are_not_compared(folders: Folders) -> None:
    first, second = folders("first", 11.0, 800), folders("second", 12.0, 700)
    other_text = folders("other-text", 12.0, 700, dense=9.0)
    other_model = folders("other-model", 12.0, 700, model={"name": "other", "fingerprint": "x"})
    other_words = folders("other-words", 12.0, 700)
    content = json.loads((other_words / "tokenizer.json").read_text())
    content["model"]["vocab"].pop(next(reversed(content["model"]["vocab"])))
    (other_words / "tokenizer.json").write_text(json.dumps(content))
    others = [other_text, other_model, other_words]
    assert ranked(first, second, *others) == ([{"first", "second"}], {path.name for path in others})
    assert {len(curve.points) for curve in curves(read_folders([first, other_words])[0])} == {1}


def suite(bits: float, dense: float = 1.0, text: str | None = "prose.txt") -> dict[str, Any]:
    measures = {"text": {BITS: contrast(dense, bits)}}
    return {"settings": {"text": text}, "suite": "quick", "perplexity": {}, "tasks": {}, "average": None,
            "measures": measures}  # fmt: skip


def test_bits_per_byte_compare_models_with_other_tokenizers(folders: Folders) -> None:
    other = {"name": "other", "fingerprint": "x"}
    first = folders("first", 11.0, 800, evaluations=[suite(1.1)], latency=timed(10, 5))
    second = folders("second", 12.0, 900, evaluations=[suite(1.3, 0.9)], model=other, latency=timed(10, 2))
    found = ranking_of(first, second)
    assert (found.measure, [entry.loss for entry in found.entries]) == (BITS, [1.1, 1.3])
    assert beaten(found, "parameters") == {"first": None, "second": "first"}
    assert not points(found, "speed-up, decode"), "factors of different dense models"
    assert points(ranking_of(first, folders("same", 11.0, 700, latency=timed(10, 2))), "speed-up, decode")
    assert ranked(first, folders("third", 12.0, 900, evaluations=[suite(1.3, 0.9, "other.txt")], model=other)) == (
        [],
        {"first", "third"},
    )
    own = [suite(1.2, text=None) | {"perplexity": {"held-out self": contrast(9.0, 9.9)}}]
    fourth = folders("fourth", 12.0, 900, evaluations=own)
    assert ranked(fourth, folders("fifth", 12.0, 900, evaluations=own, model=other))[0] == [], "each wrote its own text"


def test_bits_per_byte_of_the_same_model_need_the_same_text(folders: Folders) -> None:
    other = {"name": "other", "fingerprint": "x"}
    runs = [folders("first", 11.0, 800, evaluations=[suite(1.1)], model=other),
            folders("second", 12.0, 900, dense=9.0, evaluations=[suite(1.3, 1.2)], model=other)]  # fmt: skip
    assert ranked(*runs) == ([], {"first", "second"})


def test_accuracy_is_that_of_the_tasks_that_all_share(folders: Folders) -> None:
    def tasks(**scores: tuple[float, int]) -> dict[str, Any]:
        return {name: {"acc": contrast(0.5, value, n)} for name, (value, n) in scores.items()}

    runs = [folders("a", 11.0, 800, tasks=tasks(x=(0.4, 50), y=(0.1, 50), z=(0.5, 50))),
            folders("b", 12.0, 700, tasks=tasks(x=(0.5, 50), y=(0.5, 20))), folders("c", 13.0, 600)]  # fmt: skip
    found = ranking_of(*runs)
    assert found.tasks == ("x",)
    assert {p.entry.run.label: p.value for p in points(found, "parameters", tasks=True)} == {"a": 0.8, "b": 1.0}
    assert beaten(found, "parameters", tasks=True) == {"a": "b", "b": None}
    assert "accuracy kept,parameters,a,pruned" in pareto_figure(found, "runs-pareto").csv


def test_a_comparison_needs_two_runs(folders: Folders, capsys: pytest.CaptureFixture[str]) -> None:
    first = folders("first", 11.0, 800)
    assert command_line(["report", "--compare", str(first)]) == 2
    assert "at least two runs" in capsys.readouterr().err
    assert not (first / "report.html").exists()
