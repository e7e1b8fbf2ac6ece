"""The report page: its numbers are the run's, nothing is fetched, nothing hostile gets through, and it looks right."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multipruner.commands.main import main as command_line
from multipruner.commands.report import run as report_command
from multipruner.core.errors import ConfigError, OutputError
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Structure
from multipruner.report.figures.path import removals
from multipruner.report.figures.runs import curves
from multipruner.report.inputs import read_folders
from multipruner.report.write import write_report
from tests.support.browser import Browser, missing
from tests.support.layers import layers_of, plan_of_version_1
from tests.support.tiny import tiny_model, tiny_tokenizer

FIGURES = {"structure", "trajectory", "order", "costs", "perplexity"}
HOSTILE = '<script>alert(1)</script>"><img src=http://evil.example/x.png onerror=alert(2)> $\\frac{ & <b>'


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two real runs of a tiny model: all three stages, and widths alone."""
    base = tmp_path_factory.mktemp("report")
    dense = base / "tiny"
    tiny_model("llama", layers=6).save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    text = dense / "text.txt"
    text.write_text(" ".join(f"w{4 + (n * n + n // 7) % 93}" for n in range(4000)))
    folders = []
    for name, shares in (("all-stages", "40:40:20"), ("widths", "0:80:20")):
        flags = ["--method", "paper", "--model", str(dense), "--ratio", "0.3", "--calibration", str(text),
                 "--sequences", "4", "--width-sequences", "2", "--length", "16", "--channel-group", "8",
                 "--eval-text", str(text), "--shares", shares, "--output", str(base / name)]  # fmt: skip
        assert command_line(flags) == 0
        folders.append(base / name)
    return folders


def test_a_run_of_the_exact_program_shows_its_rounds(runs: list[Path]) -> None:
    base = runs[0].parent
    dense, text = base / "tiny", base / "tiny" / "text.txt"
    flags = ["--model", str(dense), "--ratio", "0.3", "--calibration", str(text), "--sequences", "4", "--length", "16",
             "--moments-sequences", "8", "--channel-group", "8", "--eval-text", str(text),
             "--output", str(base / "program")]  # fmt: skip
    assert command_line(flags) == 0
    page = write_report([base / "program"])
    written = {path.stem for path in (base / "program" / "report_files").iterdir()}
    assert "rounds" in page.read_text() and any("rounds" in name for name in written)
    assert not any("trajectory" in name for name in written)


def copy_of(run: Path, folder: Path) -> Path:
    """What a report reads of a run."""
    folder.mkdir()
    for name in ("report.json", "plan.json", "trajectory.jsonl", "tokenizer.json"):
        shutil.copy(run / name, folder)
    return folder


@pytest.fixture
def run(runs: list[Path], tmp_path: Path) -> Path:
    """A copy of the first run, to change."""
    return copy_of(runs[0], tmp_path / "run")


@pytest.fixture(scope="module")
def plain(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of one run."""
    folder = copy_of(runs[0], tmp_path_factory.mktemp("plain") / "run")
    assert report_command([str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def everything(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of three runs, the third with every section and with hostile names."""
    base = tmp_path_factory.mktemp("everything")
    third = copy_of(runs[0], base / "third")
    full(third)
    return write_report([*runs, third], base / "out")


@pytest.fixture
def search(tmp_path: Path) -> Path:
    """What a search leaves: a front and no run."""
    folder = tmp_path / "search"
    folder.mkdir()
    values = [{"loss": 3.0, "parameters": 9e6}, {"loss": 4.0, "parameters": 5e6}, {"loss": float("inf")}]
    points = [{"structure": {"blocks": [[2, 2], [40]]}, "values": each} for each in values]
    (folder / "front.json").write_text(json.dumps({"points": points}))
    return folder


def change(folder: Path, **values: Any) -> None:
    report = json.loads((folder / "report.json").read_text()) | values
    (folder / "report.json").write_text(json.dumps(report))


def full(folder: Path) -> None:
    """Add what other kinds of run write (latency, rounds of an integer program, tasks, a front), badly named."""
    score = {"dense": 0.6, "dense_stderr": 0.03, "pruned": 0.5, "pruned_stderr": 0.04, "difference": -0.1,
             "difference_stderr": 0.02, "examples": 100}  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    rounds = [{"round": n, "predicted": 4.0 + n, "loss": 4.5 + n, "seconds": 2.0} for n in (1, 2)]
    change(
        folder,
        model=dict.fromkeys(("name", "description", "revision", "fingerprint"), HOSTILE),
        command=HOSTILE + "x" * 400,
        platform=HOSTILE,
        versions={HOSTILE: HOSTILE},
        seconds={HOSTILE: 1.0},
        calibration={"name": HOSTILE, "hash": HOSTILE},
        costs={HOSTILE: {"before": 2, "after": 1}},
        perplexity={HOSTILE: next(iter(report["perplexity"].values()))},
        tasks={HOSTILE: {HOSTILE: score}},
        search=report["search"] | {"rounds": rounds},
        latency={"phases": {HOSTILE: {"predicted_ms": 8.5, "measured_ms": 10.0, "dense_ms": 20.0}}},
    )
    points = [{"loss": 3.0, "latency_ms": 9.0}, {"loss": 4.0, "latency_ms": 5.0}, {"loss": 4.5, "latency_ms": 7.0}]
    (folder / "front.json").write_text(json.dumps({"points": points}))


def rows(page: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((page.parent / f"{page.stem}_files" / f"{name}.csv").read_text())))


class Elements(HTMLParser):
    """The elements of a page: (name, attributes), and the visible text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_figure_is_a_picture_and_a_table(plain: Path) -> None:
    files = plain.parent / "report_files"
    assert {path.name for path in files.iterdir()} == {f"{name}.{end}" for name in FIGURES for end in ("png", "csv")}
    for name in FIGURES:
        with Image.open(files / f"{name}.png") as picture:
            assert picture.width == 1350
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10
    pictures = [attributes for tag, attributes in Elements(plain).found if tag == "svg"]
    assert len(pictures) == 2 * len(FIGURES), "wide and narrow"
    assert all(picture["role"] == "img" and picture["aria-label"] for picture in pictures)


def test_the_tables_hold_the_numbers_of_the_run(plain: Path) -> None:
    folder = plain.parent
    report = json.loads((folder / "report.json").read_text())
    plan = PruningPlan.from_json((folder / "plan.json").read_text())
    steps = [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()[1:-1]]
    structure = rows(plain, "structure")
    layers = layers_of(plan.structure)
    assert plan.structure.to_json() == report["structure"]
    for key, of in (("query_heads", "query_heads"), ("kv_groups", "kv_heads"), ("mlp_channels", "channels")):
        assert [int(r[key]) for r in structure] == [getattr(layer, of) for layer in layers], key
        dense = [getattr(layer, of) for layer in layers_of(plan.dense)]
        assert [int(r[f"dense_{key}"]) for r in structure] == dense, key
    kept = [plan.blocks[n].axes or ((), ()) for n in plan.anatomy.of_kind("attention")]
    assert [r["kept_attention_indices"] for r in structure] == [
        " ".join(str(2 * group + head) for group, heads in zip(*axes, strict=True) for head in heads)  # pyright: ignore
        for axes in kept
    ]
    trajectory = rows(plain, "trajectory")
    assert [float(r["loss_nats"]) for r in trajectory] == [step["loss"] for step in steps]
    assert [float(r["ratio"]) for r in trajectory] == [step["ratio"] for step in steps]
    assert [(r["stage"], r["kind"], int(r["layer"])) for r in trajectory] == [
        (step["stage"], step["kind"], step["layer"]) for step in steps
    ]
    costs = {r["cost"]: (float(r["before"]), float(r["after"])) for r in rows(plain, "costs")}
    assert costs["parameters"] == (report["parameters"]["before"], report["parameters"]["after"])
    assert costs["flops_per_token"] == tuple(report["costs"]["flops_per_token"].values())
    (perplexity,) = rows(plain, "perplexity")
    contrast = report["perplexity"][perplexity["name"]]
    assert float(perplexity["pruned"]) == contrast["pruned"]
    assert float(perplexity["difference_stderr"]) == contrast["difference_stderr"]
    assert f"{report['ratio']:.1%}" in Elements(plain).text


def test_a_run_of_version_1_has_the_same_tables(plain: Path, run: Path) -> None:
    """It spoke of layers: in its plan, in its steps, and in the structure of its report."""
    plan = PruningPlan.from_json((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan_of_version_1(plan)))
    change(run, structure=[list(layer) for layer in layers_of(plan.structure)])
    header, *steps, last = (run / "trajectory.jsonl").read_text().splitlines()
    here, lines = plan.dense, []
    for step in map(json.loads, steps):
        here = here.replace(plan.anatomy.at(step["layer"], step["kind"]), tuple(step.pop("kept")))
        lines.append(json.dumps({**step, "size": list(layers_of(here)[step["layer"]])}))
    (run / "trajectory.jsonl").write_text("\n".join((header, *lines, last, "")))
    page = write_report([run])
    for name in FIGURES:
        assert rows(page, name) == rows(plain, name), name


def test_losses_on_different_text_are_not_subtracted(run: Path) -> None:
    ((found,), _) = read_folders([run])
    path = removals(found)
    first_width = next(n for n, removal in enumerate(path) if removal.step.stage != "blocks")
    assert 0 < first_width < len(path)
    for number, removal in enumerate(path):
        if number in (0, first_width):  # widths are judged on fewer sequences than blocks
            assert removal.increase is None
        else:
            assert removal.increase == removal.step.loss - path[number - 1].step.loss
    recipe = json.loads((run / "report.json").read_text())["recipe"]
    recipe["calibration"]["width_sequences"] = recipe["calibration"]["sequences"]
    change(run, recipe=recipe)
    ((found,), _) = read_folders([run])
    assert removals(found)[first_width].increase is not None


def test_the_order_map_adds_up_to_the_path(plain: Path) -> None:
    trajectory, order = rows(plain, "trajectory"), rows(plain, "order")
    assert sum(int(row["steps"]) for row in order) == len(trajectory)
    for row in order:
        steps = [t for t in trajectory if (t["part"], t["layer"]) == (row["part"], row["layer"])]
        assert int(row["first_step"]) == min(int(t["step"]) for t in steps)
        known = [float(t["increase_nats"]) for t in steps if t["increase_nats"]]
        assert float(row["increase_nats"] or 0) == pytest.approx(sum(known))


def test_sections_appear_with_their_data_and_only_then(plain: Path, everything: Path, run: Path) -> None:
    titles = ("Latency", "Pareto front", "Tasks", "every round")
    text, long = Elements(plain).text, Elements(everything).text
    assert [title for title in titles if title in text] == []
    assert [title for title in titles if title in long] == list(titles)
    (latency,) = rows(everything, "run-3-third-latency")
    assert [latency[f"{kind}_ms"] for kind in ("dense", "predicted", "measured")] == ["20.0", "8.5", "10.0"]
    assert "−15.0%" in long, "the error of the prediction"
    assert [row["on_front"] for row in rows(everything, "front")] == ["1", "1", "0"]
    assert [float(row["error_nats"]) for row in rows(everything, "run-3-third-rounds")] == [-0.5, -0.5]
    (task,) = rows(everything, "run-3-third-tasks")
    assert (float(task["pruned"]), float(task["pruned_stderr"]), int(task["n"])) == (0.5, 0.04, 100)
    (run / "trajectory.jsonl").unlink()
    text = Elements(write_report([run])).text
    assert "What each step removed" not in text
    assert "What is left" in text


def test_several_runs_side_by_side(runs: list[Path], everything: Path) -> None:
    reports = [json.loads((folder / "report.json").read_text()) for folder in runs]
    curve = {row["run"]: row for row in reversed(rows(everything, "runs-perplexity"))}
    (text,) = reports[0]["perplexity"]
    assert float(curve["dense"]["perplexity"]) == pytest.approx(reports[0]["perplexity"][text]["dense"], rel=1e-5)
    for folder, report in zip(runs, reports, strict=True):
        assert float(curve[folder.name]["ratio"]) == report["ratio"]
        assert float(curve[folder.name]["perplexity"]) == report["perplexity"][text]["pruned"]
    strips = rows(everything, "runs-structures")
    heads = [[int(row["query_heads"]) for row in strips if row["run"] == folder.name] for folder in runs]
    structures = [layers_of(Structure.from_json(report["structure"])) for report in reports]
    assert heads == [[layer.query_heads for layer in layers] for layers in structures]
    ids = [attributes["id"] for _, attributes in Elements(everything).found if "id" in attributes]
    assert len(ids) == len(set(ids)), "no two figures share an id"


def test_perplexities_of_different_texts_are_not_joined(runs: list[Path], run: Path) -> None:
    assert [len(curve.points) for curve in curves(read_folders([runs[1], run])[0])] == [2]
    report = json.loads((run / "report.json").read_text())
    for contrast in report["perplexity"].values():
        contrast["dense"] += 1.0  # the same name, another text
    change(run, perplexity=report["perplexity"])
    assert [len(curve.points) for curve in curves(read_folders([runs[1], run])[0])] == [1, 1]


def test_nothing_is_loaded_from_elsewhere(everything: Path) -> None:
    elements = Elements(everything).found
    assert not {tag for tag, _ in elements} & {"script", "img", "link", "iframe", "object", "base"}
    inside = re.compile(r"#|report_files/[\w.-]+$|data:image/png;base64,")
    for tag, attributes in elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "data", "action", "poster"):
                assert inside.match(value or ""), f"<{tag} {name}={value!r}>"
    assert not re.search(r"url\((?!#)|@import", everything.read_text())
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'; img-src data:") in [
        (tag, attributes.get("content")) for tag, attributes in elements
    ]


def test_hostile_names_are_text(everything: Path) -> None:
    elements = Elements(everything)
    assert not {tag for tag, _ in elements.found} & {"script", "img"}
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert elements.text.count(HOSTILE) >= 10, "shown as what it is"


def test_the_shown_path_ends_at_the_run_of_a_nested_ratio(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    assert len(read_folders([run])[0][0].steps) == report["search"]["steps"] > 2
    change(run, search=report["search"] | {"steps": 2, "searched_to": 0.5})
    assert len(read_folders([run])[0][0].steps) == 2


def test_a_torn_last_line_is_left_alone(run: Path) -> None:
    path = run / "trajectory.jsonl"
    torn = path.read_bytes() + b'{"stage": "mlp", "la'
    path.write_bytes(torn)
    assert len(read_folders([run])[0][0].steps) == len(torn.splitlines()) - 3
    assert path.read_bytes() == torn


TRAJECTORY = '{"format": "multipruner-trajectory", "version": 1, "identity": {}, "ratio": 0.2}\n{"stage": "x"}\n'
HEADER = '{"format": "multipruner-trajectory", "version": 1, "identity": {}, "ratio": 0.3}\n'
BROKEN = {
    "no folder": ("", None, "is not a folder"),
    "no report": ("report.json", None, "report.json is missing"),
    "no plan": ("plan.json", None, "plan.json is missing"),
    "no JSON": ("report.json", "{", "report.json is not JSON"),
    "a list": ("report.json", "[]", "report.json holds no mapping"),
    "another format": ("report.json", '{"format": "x"}', "report.json is not a report"),
    "no number": ("report.json", {"ratio": "<b>much</b>"}, "report.json is damaged: ratio"),
    "a bad contrast": ("report.json", {"perplexity": {"text": {}}}, "report.json is broken: perplexity.text.dense"),
    "another run": ("report.json", {"structure": {"blocks": [[2, 2], [40]] * 6}}, "different structures"),
    "another run of version 1": ("report.json", {"structure": [[4, 2, 40]] * 6}, "different structures"),
    "no structure": ("report.json", {"structure": {"blocks": [["x"]]}}, "report.json is broken: structure"),
    "a broken plan": ("plan.json", "{}", "plan.json: plan format"),
    "a broken step": ("trajectory.jsonl", HEADER + '{"stage": "x"}\n', "line 2"),
    "a step without its size": (
        "trajectory.jsonl", HEADER + '{"kind": "mlp"}\n', "line 2",
    ),
    "a layer too many": ("trajectory.jsonl", None, "no layer 77"),
    "a step without a loss": ("trajectory.jsonl", None, "line 2: no step of a trajectory (NaN"),
    "a calibration loss that is none": ("report.json", {"search": {"loss": float("nan")}}, "search.loss is nan"),
    "a loss that is a text": ("report.json", {"search": {"loss": "inf"}}, "report.json is broken: search.loss"),
    "a round without a loss": (
        "report.json",
        {"search": {"rounds": [{"round": 0, "predicted": 1.0, "loss": float("nan")}]}},
        "search.rounds.0.loss is nan",
    ),
    "more removed than there is": ("report.json", {"ratio": 1.5}, "ratio is 1.5, not a number from 0 to 1"),
    "a broken front": ("front.json", '{"points": [{"loss": "low"}]}', "front.json is broken: points.0.loss"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_missing_or_broken_file_is_named(case: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, expected = BROKEN[case]
    path = run / name
    if case == "no folder":
        shutil.rmtree(run)
    elif case in (changes := {"a layer too many": {"layer": 77}, "a step without a loss": {"loss": float("nan")}}):
        header, step, *_ = path.read_text().splitlines()
        path.write_text(f"{header}\n{json.dumps(json.loads(step) | changes[case])}\n")
    elif content is None:
        path.unlink()
    elif isinstance(content, dict):
        change(run, **content)
    else:
        path.write_text(content)
    with pytest.raises((ConfigError, OutputError), match=re.escape(expected)) as caught:
        report_command([str(run)])
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()
    assert capsys.readouterr().out == ""


def test_what_overflowed_in_a_run_is_no_damage(run: Path) -> None:
    text = {"dense": 9.0, "pruned": float("inf"), "difference": float("inf"), "dense_stderr": None,
            "pruned_stderr": float("nan"), "difference_stderr": None, "examples": 3}  # fmt: skip
    change(run, perplexity={"text": text}, search={"rounds": [{"round": 0, "predicted": 1.0, "loss": float("inf")}]})
    assert read_folders([run])[0][0].report.perplexity["text"].pruned == float("inf")


def test_a_search_folder_alone_is_enough_and_gives_the_same_page_twice(search: Path) -> None:
    first = write_report([search], search / "page.html").read_bytes()
    assert "Pareto front" in Elements(search / "page.html").text
    picture = (search / "page_files" / "front.png").read_bytes()
    assert len(picture) > 1000
    assert write_report([search], search / "page.html").read_bytes() == first
    assert (search / "page_files" / "front.png").read_bytes() == picture
    assert {path.name for path in search.iterdir()} == {"front.json", "page.html", "page_files"}
    found = [(float(row["loss_nats"]), float(row["parameters"])) for row in rows(search / "page.html", "front")]
    assert found == [(3.0, 9e6), (4.0, 5e6)]


def test_a_search_without_a_second_objective_has_no_front(search: Path, run: Path) -> None:
    (search / "front.json").write_text('{"points": [{"values": {"loss": 3.0}}]}')
    with pytest.raises(ConfigError, match=r"front\.json holds no point"):
        read_folders([search])
    shutil.copy(search / "front.json", run)
    assert [len(found) for found in read_folders([run])] == [1, 0], "the run is shown all the same"


def test_what_others_put_there_is_not_replaced(search: Path) -> None:
    (search / "report_files").mkdir()
    (search / "report_files" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        write_report([search])
    (search / "page.html").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_report([search], search / "page.html")
    (search / "file").write_text("mine")
    with pytest.raises(OutputError, match="file"):
        write_report([search], search / "file")
    assert {path.name for path in search.iterdir()} == {"front.json", "report_files", "page.html", "file"}


def test_the_same_folder_twice_is_an_error(run: Path) -> None:
    with pytest.raises(ConfigError, match="twice"):
        write_report([run, run / ".." / run.name])


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_it_looks_right_in_a_browser(everything: Path) -> None:
    figures = len(list((everything.parent / "report_files").glob("*.png")))
    with Browser() as browser:
        for width, dark in ((1280, False), (390, False), (1280, True), (390, True)):
            browser.open(everything, width, dark=dark)
            assert browser.ask("return performance.getEntriesByType('resource').length") == 0
            assert browser.ask("return innerWidth") == width
            assert browser.ask("return document.documentElement.scrollWidth") <= width, "nothing overflows"
            boxes = browser.ask(
                "return [...document.querySelectorAll('svg')].map(e => e.getBoundingClientRect())"
                ".filter(b => b.width > 0).map(b => [b.left, b.right, b.height])"
            )
            assert len(boxes) == figures, "each figure once: the wide or the narrow form"
            assert all(left >= 0 and right <= width and height > 80 for left, right, height in boxes)
            with Image.open(io.BytesIO(browser.screenshot())) as picture:
                _check_not_blank(picture.convert("L"), width, dark)
        assert browser.pdf().startswith(b"%PDF-")


def _check_not_blank(picture: Image.Image, width: int, dark: bool) -> None:
    """Every screenful has ink on it, and the paper has the tone of the scheme."""
    assert picture.width == width
    assert picture.height > 3000
    for top in range(0, picture.height - 900, 900):
        low, high = picture.crop((0, top, width, top + 900)).getextrema()
        assert isinstance(low, (int, float)) and isinstance(high, (int, float))
        assert high - low > 120, f"a blank screen at {top}"
    histogram = picture.histogram()
    most = max(range(256), key=histogram.__getitem__)
    assert most < 64 if dark else most > 192
