"""What the table of qualities says: rows that change what they name, sizes, averages; and two objectives agree."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from importlib import import_module
from importlib.metadata import version
from math import sqrt
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from multipruner.core.errors import ConfigError
from tests.support.caches import cache_at

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def _module(name: str) -> Any:
    with patch.object(sys, "path", [str(BENCHMARKS), *sys.path]):
        return import_module(name)


def _bench(folder: Path, *settings: str, calibration: str = "self", **flags: Any) -> Any:
    (folder / "alpaca.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(8)))
    (folder / "wiki.raw").write_text("A text .\n")
    given = {"model": "llama", "work": folder, "alpaca": folder / "alpaca.jsonl", "wikitext": folder / "wiki.raw",
             "set": list(settings), "seeds": "0,1", "ratios": "0.1,0.2", "calibration": calibration,
             "size_ratio": 0.2, **flags}  # fmt: skip
    return _module("quality_cells").Bench(argparse.Namespace(**given))


@pytest.mark.parametrize("calibration", ["self", "alpaca"])
def test_every_ablation_changes_what_it_names_and_nothing_else(calibration: str, tmp_path: Path) -> None:
    bench = _bench(tmp_path, "rounds=3", "calibration.batch_size=4", calibration=calibration)
    rows = bench.ablations()
    default = bench.recipe({"method": "program"}, 0.2, 0)
    assert (default.rounds, default.calibration.batch_size, default.calibration.seed) == (3, 4, 0)
    short = bench.recipe(rows["256-token sequences"], 0.2, 0).calibration
    whole = default.calibration
    twice = (256, 2 * whole.sequences, 2 * whole.moments_sequences)
    assert (short.length, short.sequences, short.moments_sequences) == twice, "as many tokens"
    sources = {bench.recipe(settings, 0.2, 0).calibration.source for settings in rows.values()}
    assert sources == {"self", str(bench.train), f"{bench.train}+self"}
    assert "own text" in " ".join(rows) and len(rows) == 10


def test_a_row_that_is_no_ablation_under_the_settings_given_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"magnitude order.*importance.*nothing"):
        _bench(tmp_path, "importance=magnitude").ablations()
    with pytest.raises(ConfigError, match="importence"):
        _bench(tmp_path, "importence=magnitude").ablations()


def test_sizes_change_the_moments_and_scoring_only_downwards(tmp_path: Path) -> None:
    bench = _bench(tmp_path, "effort=balanced")
    cells = [bench.sizes(tokens) for tokens in (100, 4096, 32768, 131072, 262144)]
    names = ["100 tokens", "4096 tokens", "32768 tokens", "131072 tokens", "262144 tokens"]
    assert [name for name, _ in cells] == names
    texts = [bench.recipe(settings, 0.2, 0).calibration for _, settings in cells]
    assert [text.moments_sequences for text in texts] == [1, 8, 64, 256, 512]
    assert [text.sequences for text in texts] == [1, 1, 6, 8, 8]
    assert {text.length for text in texts} == {512}


@pytest.mark.parametrize("calibration", ["self", "alpaca"])
def test_the_published_procedure_sees_the_text_it_was_published_with(calibration: str, tmp_path: Path) -> None:
    bench = _bench(tmp_path, calibration=calibration)
    recipes = {name: bench.recipe(settings, 0.2, 1) for name, settings in _module("quality_cells").METHODS.items()}
    alpaca = str(bench.train)
    sources = {name: recipe.calibration.source for name, recipe in recipes.items()}
    assert sources.pop("program") == ("self" if calibration == "self" else alpaca)
    assert sources == {"paper": alpaca, "blocks only": alpaca}
    assert {recipe.calibration.seed for recipe in recipes.values()} == {1}


def test_only_the_published_procedure_has_a_folder_for_every_ratio(tmp_path: Path) -> None:
    bench, methods = _bench(tmp_path), _module("quality_cells").METHODS
    folders = {
        name: {bench.folder(name, settings, ratio, 0) for ratio in (0.1, 0.2)} for name, settings in methods.items()
    }
    assert {name: len(found) for name, found in folders.items()} == {"program": 1, "paper": 2, "blocks only": 1}
    other = bench.folder("last norm as it was", {"final_norm": "keep"}, 0.2, 0)
    assert folders["program"] == {other}, "the same losses"
    assert bench.folder("no repair", {"repair": "none"}, 0.2, 0) not in folders["program"]
    assert len(set().union(*folders.values())) == 4


def test_a_cell_serves_what_asks_for_the_same_recipe_and_no_other_tasks() -> None:
    of = _module("quality_cells")._of
    recipe, tasks = {"ratio": 0.2}, [["piqa"], 200]
    judged = {"asked": {"recipe": recipe, "tasks": tasks}}
    assert of(judged, {"recipe": recipe, "tasks": tasks}) and of(judged, {"recipe": recipe, "tasks": []})
    assert not of(judged, {"recipe": recipe, "tasks": [["piqa"], 100]})
    assert not of(judged, {"recipe": {"ratio": 0.1}, "tasks": []})
    assert not of({"asked": {"recipe": recipe, "tasks": []}}, {"recipe": recipe, "tasks": tasks})
    assert not of({}, {"recipe": recipe, "tasks": []}), "nobody knows what it is of"


@pytest.mark.parametrize("changed", ["model", "alpaca", "wikitext"])
def test_cells_are_of_one_model_and_its_texts(changed: str, tmp_path: Path) -> None:
    first = _bench(tmp_path).common
    assert _bench(tmp_path).common == first
    if changed == "model":
        assert _bench(tmp_path, model="other").common != first
    else:
        (tmp_path / "other").write_text('{"text": "another row"}\n')
        other: dict[str, Any] = {changed: tmp_path / "other"}
        assert _bench(tmp_path, **other).common != first


def _cell(**scores: float) -> dict[str, Any]:
    texts = {name: {"value": 10.0} for name in ("wikitext2", "alpaca")}
    tasks = {name: {"metrics": {"acc": {"value": score, "stderr": 0.03}}} for name, score in scores.items()}
    return {**texts, "tasks": tasks, "ratio": 0.2, "parameters": 1e8, "target": 0.2}


def test_the_average_of_the_tasks_has_the_error_of_independent_tasks() -> None:
    report = _module("quality_report")
    scores = [report.accuracy(task) for task in _cell(a=0.5, b=0.3)["tasks"].values()]
    value, error = report.average(scores)
    assert (value, error) == (pytest.approx(0.4), pytest.approx(sqrt(2) * 0.03 / 2))
    assert "40.0 ±2.1" in report.row("x", _cell(a=0.6, b=0.6), [_cell(a=0.5, b=0.3)])
    missing = report.row("x", _cell(a=0.6, b=0.6, c=0.6), [_cell(a=0.5, b=0.3)])
    assert "40.0" not in missing and missing.count("|") == report.heading(_cell(a=0.6, b=0.6, c=0.6))[0].count("|")


def test_a_ratio_that_was_missed_says_what_was_asked(tmp_path: Path) -> None:
    report = _module("quality_report")
    assert report.removed([{"ratio": 0.2015, "target": 0.2}]) == "20.15%"
    assert report.removed([{"ratio": 0.17, "target": 0.2}]) == "17.00% (asked: 20.0%)"
    tables = report.Tables(tmp_path / "table.md", _cell())
    tables.add("Methods", "blocks only", "0.2", {"impossible": "no", "target": 0.2})
    tables.add("Methods", "program", "0.2", _cell())
    written = (tmp_path / "table.md").read_text()
    assert "20% is out of reach" in written and written.count("| program | 20.00% | 100.00M | 10.0 (1.00x)") == 1
    assert len({line.count("|") for line in written.splitlines() if line.startswith("|")}) == 1


def test_both_objectives_take_the_same_first_step(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "objective.json"
    given = ["objective.py", "--model", str(dense), "--sequences", "2", "--length", "8", "--record", str(path)]
    with patch.object(sys, "argv", given):
        _module("objective").main()
    assert "same choice: True" in capsys.readouterr().out
    found = _module("results").read(path)
    (row,) = found["rows"]
    assert row[:2] == ["one greedy step, 8 candidates", 8] and row[3] > row[5] > 0, "token-layers: plain, ours"
    shown = _module("results").markdown(found["columns"], found["rows"]).splitlines()[0]
    assert shown == (BENCHMARKS / "../docs/performance.md").read_text().partition("-->\n\n")[2].splitlines()[0]


def test_passes_records_what_it_prints(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "passes.json"
    given = [
        "passes.py",
        "--model",
        str(dense),
        "--sequences",
        "2",
        "--length",
        "8",
        "--threads",
        "1",
        "--repeats",
        "1",
    ]
    with patch.object(sys, "argv", [*given, "--record", str(path)]):
        assert _module("passes").main() == 0
    found = _module("results").read(path)
    assert _module("results").markdown(found["columns"], found["rows"]) in capsys.readouterr().out
    assert [row[0] for row in found["rows"]][::3] == ["an attention block", "all moments"]
    assert found["setting"]["model"] == str(dense)


def test_latency_records_the_errors_of_every_workload(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    given = ["latency.py", "--model", str(dense), "--workload", "prefill-b1-t128", "--structures", "2", "--rounds", "2",
             "--width-step", "8", "--results", str(tmp_path / "timed.jsonl"), "--record", str(path)]  # fmt: skip
    for _ in range(2):
        with patch.object(sys, "argv", given):
            assert _module("latency").main() == 0
    assert len((tmp_path / "timed.jsonl").read_text().splitlines()) == 2, "nothing is timed twice"
    (row,) = _module("results").read(path)["rows"]
    assert row[:2] == ["prefill-b1-t128", 2]
    assert all(0 <= middle <= worst for middle, worst in row[2:])


def test_the_program_benchmark_records_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "program.json"
    given = ["benchmarks/program.py", "--layers", "2", "--options", "3", "--record", str(path)]
    with patch.object(sys, "argv", given):
        assert _module("program").main() == 0
    results = _module("results")
    found = results.read(path)
    assert results.markdown(found["columns"], found["rows"]) in capsys.readouterr().out
    assert found["command"] == shlex.join(["python", *given])
    assert len(found["rows"]) == 24 and found["setting"] == {"layers": 2, "options": 3}
    assert found["machine"]["threads"] >= 1 and found["machine"]["processor"]
    assert found["versions"]["torch"] == version("torch")
    assert [file.name for file in path.parent.iterdir()] == ["program.json"]


def test_the_commit_of_a_result_says_whether_files_were_changed(tmp_path: Path) -> None:
    results = _module("results")
    with patch.object(results, "ROOT", tmp_path):
        assert results.commit() == results.UNKNOWN, "outside of a checkout"
        git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c")
        (tmp_path / "file").write_text("one")
        for command in (("init", "-q"), ("add", "file"), ("commit", "-qm", "first")):
            subprocess.run([*git, *command], check=True)
        clean = results.commit()
        (tmp_path / "file").write_text("two")
        assert len(clean) == 40 and results.commit() == clean + "+"


def test_cells_of_a_result_are_numbers_text_or_nothing() -> None:
    shown = _module("results").shown
    assert (shown([1.5, 0.25], "{:.1f} ± {:.2f}"), shown(0.1234, "{:.1%}")) == ("1.5 ± 0.25", "12.3%")
    assert (shown("as it is", "{:.1f}"), shown(None, "{:.1f}"), shown(0, "{:.1f}")) == ("as it is", "", "0.0")


def test_another_file_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json is no result.*--record"):
        _module("results").read(tmp_path / "other.json")


def test_rows_of_plans_fit_their_columns() -> None:
    results, schedules, search, strategies = map(_module, ("results", "schedules", "search", "strategies"))
    row = {"order": ["blocks", "mlp"], "shares": [44, 52, 4], "name": "exact", "ratio": 0.2, "seconds": 90.0,
           "losses": {"calibration": 0.5, "held_out": 0.625}, "evaluations": [9, 4], "token_layers": 2.5e6}  # fmt: skip
    assert results.line(schedules.COLUMNS, schedules.cells(row)) == (
        "| blocks → mlp | 44:52:4 | 20.00% | 0.5000 | 0.6250 |  | 1.5 |"
    )
    row["wikitext2"] = {"value": 41.5}
    assert results.line(search.COLUMNS, search.cells(row)) == (
        "| exact | 20.00% | 0.5000 | 0.6250 | 41.50 | 9 + 4 | 1.5 | 2.50 |"
    )
    impossible = schedules.cells({"order": ["mlp"], "shares": [0, 100, 0], "impossible": "no"})
    assert "out of reach" in results.line(schedules.COLUMNS, impossible)
    cell = {"budget": "ratio=0.2", "method": "program", "ratio": 0.2, "plain": {"calibration": 0.5, "held_out": 0.75},
            "search": {"measured": 1234, "seconds": 5.4, "token_layers": 67890.0}}  # fmt: skip
    assert results.line(strategies.columns_of(cell), strategies.row_of(cell)) == (
        "| ratio=0.2 | program | 20.00% | 0.5000 | 0.7500 |  |  | 1,234 | 5 | 67,890 |"
    )
    timed = {**cell, "latency_ms": 80.0, "dense_ms": 100.0}
    timed["plain"] = timed["repaired"] = {**cell["plain"], "wikitext2": {"value": 38.25}}
    assert results.line(strategies.columns_of(timed), strategies.row_of(timed)) == (
        "| ratio=0.2 | program | 20.00% | 0.800x | 0.5000 | 0.7500 | 0.5000 | 0.7500 | 38.25 | 38.25 | 1,234 | 5 "
        "| 67,890 |"
    )


def test_rows_of_the_quality_tables_fit_their_heading(tmp_path: Path) -> None:
    report = _module("quality_report")
    tables = report.Tables(tmp_path / "table.md", _cell(a=0.6))
    tables.add("Methods", "program", "0.2", {**_cell(a=0.5), "asked": {}})
    assert [(cell["row"], cell["wikitext2"]["value"]) for cell in tables.cells()] == [
        ("dense", 10.0),
        ("program", 10.0),
    ]
    assert "asked" not in tables.cells()[1]
    names = report.heading(_cell(a=0.6))[0][1:-1].split("|")
    assert [len(row) for row in tables.rows()] == [len(names) + 1] * 2
    assert tables.rows()[1][:3] == ["Methods", "program", "20.00%"]


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_stay_small_and_share_one_writer_of_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300, "one file, one thing"
    if '"--record"' in text:
        assert path.stem == "results", "results.flag and results.record are for all"


def test_machines_sets_what_was_foretold_beside_what_came(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_at(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    rows = tmp_path / "alpaca.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"w{4 + n % 90} w{5 + n % 80} w{6 + n % 70}"}) + "\n" for n in range(900))
    )
    small = ["calibration.length=16", "calibration.moments_sequences=12", "channel_group=8",
             f"calibration.source={dense / 'text.txt'}"]  # fmt: skip
    sets = [word for one in small for word in ("--set", one)]
    given = ["--work", str(tmp_path / "work"), "--model", str(dense), "--ratio", "0.3", "--efforts", "fast",
             "--wikitext", str(dense / "text.txt"), "--alpaca", str(rows),
             "--record", str(tmp_path / "found.json"), *sets]  # fmt: skip
    machines = _module("machines")
    for _ in range(2):  # what is there stays
        assert machines.main(given) == 0
    said = capsys.readouterr().out
    assert "ATEN_CPU_CAPABILITY=avx2" in said and said.count("| fast | text |") == 2
    found = _module("results").read(tmp_path / "found.json")
    report = json.loads((tmp_path / "work" / "fast" / "report.json").read_text())
    assert report["recipe"]["effort"] == "fast" and report["recipe"]["rounds"] == 0
    assert [row[1] for row in found["rows"]] == [*report["forecast"]["stages"], machines.OTHER]
    (row,) = found["sums"]
    judged = [report["perplexity"]["text.txt"], *report["evaluations"][0]["perplexity"].values()]
    assert row[-2:] == [one["pruned"] / one["dense"] for one in judged] and row[5] > 0
    assert len(report["evaluations"]) == 1 and found["isa"] == {"ATEN_CPU_CAPABILITY": "avx2"}


def test_both_ways_to_train_are_set_side_by_side(
    run: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    cache_at(monkeypatch, tmp_path / "cache")
    rows, path = tmp_path / "rows.jsonl", tmp_path / "distillation.json"
    rows.write_text("".join(json.dumps({"text": f"w{n % 90 + 4} w{n % 71 + 4} w9"}) + "\n" for n in range(120)))
    given = [
        "distillation.py", str(run.folder), "--wikitext", str(dense / "text.txt"), "--alpaca", str(rows),
        "--steps", "2", "--batch", "2", "--length", "16", "--eval-length", "16", "--eval-tokens", "64",
        "--record", str(path), "--work", str(tmp_path / "work"),
    ]  # fmt: skip
    with patch.object(sys, "argv", given):
        _module("distillation").main()
    found = _module("results").read(path)
    assert [row[0] for row in found["rows"]] == ["dense", "pruned", "tuned: text", "tuned: distilled"]
    assert [row[2] for row in found["rows"]] == [None, None, 64, 64], "equal tokens"
    assert [found["rows"][0][place] for place in (5, 7)] == [1.0, 1.0]
    path.unlink()
    with patch.object(sys, "argv", [*given, "--tuned", str(tmp_path / "work/distilled")]):
        _module("distillation").main()
    again = _module("results").read(path)
    assert again["rows"][:2] == found["rows"][:2]
    assert again["rows"][2] == ["tuned: lora", *found["rows"][3][1:]], "what was trained before is judged as it was"
