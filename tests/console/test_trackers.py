"""A tracker hears what a run does: numbers, parameters, no secrets; and no run ends because a tracker does."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from multipruner.commands.main import main
from multipruner.console.events import EventLog, screen, tell
from multipruner.console.trackers import TRACKERS, Kind, Tracker, numbers_of, parameters_of
from multipruner.core.errors import ConfigError
from multipruner.jobs.finish import Run
from tests.support.commands import arguments, paper_arguments


class Notebook(GeneralTracker):
    """Keeps what it is told, as accelerate's own trackers are told it."""

    name = "notebook"
    requires_logging_directory = False
    tracker = None
    fails_at = -1
    made: list[Notebook]

    def __init__(self, project: str, run_name: str) -> None:
        super().__init__()
        self.project, self.run_name = project, run_name
        self.parameters: dict[str, Any] = {}
        self.logged: list[tuple[dict[str, float], int | None]] = []
        self.finished = 0
        self.made.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert PartialState._shared_state, "accelerate's own ask it"
        if self.fails_at == 0:
            raise OSError("no route\nto host")
        self.parameters |= values

    def log(self, values: dict[str, float], step: int | None = None, **more: Any) -> None:
        assert PartialState._shared_state and PartialState().num_processes == 1
        self.logged.append((values, step))
        if len(self.logged) == self.fails_at:
            raise ConnectionError("the server\nhas gone")

    def finish(self) -> None:
        self.finished += 1

    def series(self, name: str) -> list[float]:
        return [values[name] for values, _ in self.logged if name in values]

    def names(self) -> set[str]:
        return {name for values, _ in self.logged for name in values}


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    """A tracker by this name."""
    monkeypatch.setitem(TRACKERS, "notebook", Kind(("json",), "nothing", "look at it", lambda name: {"run_name": name}))
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "made", [], raising=False)
    return Notebook


def test_tensorboard_shows_what_the_report_says(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    monkeypatch.chdir(tmp_path)
    assert main(arguments(dense, tmp_path / "out", "--track", "tensorboard", "--track-project", "my models")) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (folder,) = (tmp_path / "tensorboard-runs" / "my_models").iterdir()
    assert folder.name.startswith("out-2")
    read = reader.EventAccumulator(str(folder))
    read.Reload()
    shown = {tag: [one.value for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert shown["result/perplexity/text.txt/pruned"] == pytest.approx([report["perplexity"]["text.txt"]["pruned"]])
    assert shown["calibration/loss"] == pytest.approx([report["search"]["loss"]])
    assert shown["round/loss"] == pytest.approx([one["loss"] for one in report["search"]["rounds"]])
    assert [one.step for one in read.Scalars("round/loss")] == list(range(len(report["search"]["rounds"])))
    assert {tag.partition("/")[2] for tag in shown if tag.startswith("seconds/")} == set(report["seconds"])
    assert shown["forecast/memory/predicted_bytes"] and shown["failed"] == [0]
    (inner,) = folder.glob("*/events.*")
    read = reader.EventAccumulator(str(inner))
    read.Reload()
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    asked = hparams.HParamsPluginData.FromString(content).session_start_info.hparams
    assert asked["ratio"].number_value == 0.3 and asked["calibration.length"].number_value == 16
    assert asked["command"].string_value == "prune" and asked["output"].string_value == str(tmp_path / "out")


def test_the_published_method_has_a_series_of_steps(notebook: Any, dense: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    given = ["--track", "notebook", "--log-json", str(log), "--log-level", "error"]
    assert main(paper_arguments(dense, tmp_path / "out", *given)) == 0
    (one,) = notebook.made
    events = [json.loads(line) for line in log.read_text().splitlines()]
    steps = [event for event in events if event["event"] == "decision"]
    assert one.series("step/loss") == [event["loss"] for event in steps] != []
    assert [step for values, step in one.logged if "step/loss" in values] == list(range(len(steps)))
    assert (one.project, one.finished, one.series("failed")) == ("multipruner", 1, [0.0])
    assert one.run_name.startswith("out-") and one.parameters["method"] == "paper"
    assert any(name.startswith("progress/search/") for name in one.names())
    assert not PartialState._shared_state, "nothing of it stays"


def test_a_folder_of_its_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nobodys_tracker").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(TRACKERS, "mine", Kind(("nobodys_tracker",), "mine", "", lambda name: {}))
    with pytest.raises(ConfigError, match="--track mine: mine is not installed; pip install mine"):
        Tracker("mine")


def test_one_that_is_not_installed_is_said_before_any_work(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("multipruner.console.trackers.find_spec", lambda name: None)
    monkeypatch.setattr("multipruner.commands.prune._prune", lambda *given: pytest.fail("work"))
    for name, kind in TRACKERS.items():
        assert main(arguments(dense, tmp_path / "out", "--track", name, "--log-json", str(tmp_path / "log"))) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"multipruner: --track {name}: {name} is not installed; pip install {kind.install}"
    assert not any(path.exists() for path in (tmp_path / "out", tmp_path / "log"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--track", "tensorbord"], r"did you mean 'tensorboard'.*mlflow, wandb"),
        (["--track", ","], "names no tracker"),
        (["--track-project", "mine"], "names no tracker"),
    ],
)
def test_what_cannot_be_meant_is_refused(flags: list[str], expected: str, dense: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(dense, tmp_path / "out", *flags)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(expected, line), line


def test_a_tracker_that_does_not_begin_ends_the_run_before_any_work(
    notebook: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notebook, "fails_at", 0)
    monkeypatch.setattr("multipruner.jobs.prune.run.prune_recipe", lambda *given, **more: pytest.fail("work"))
    assert main(arguments(dense, tmp_path / "out", "--track", "notebook")) == 2
    said = capsys.readouterr()
    expected = "--track notebook cannot begin (OSError: no route to host): look at it"
    assert said.err == f"multipruner: {expected}\n" and "warning" not in said.out


def test_a_tracker_that_fails_within_a_run_is_one_line(
    notebook: Any, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(notebook, "fails_at", 5)
    log = tmp_path / "log"
    assert main(arguments(dense, tmp_path / "out", "--track", "notebook", "--log-json", str(log))) == 0
    said = capsys.readouterr()
    (line,) = (line for line in (said.out + said.err).splitlines() if "notebook" in line)
    assert "warning: notebook takes no events any more (ConnectionError: the server has gone)" in line
    assert len(notebook.made[0].logged) == 5 and (tmp_path / "out" / "report.json").is_file()
    events = [json.loads(one) for one in log.read_text().splitlines()]
    assert sum(event.get("text") == line for event in events) == 1 and events[-1]["outcome"] == "done"


def test_two_that_fail_at_once_are_a_line_each() -> None:
    class Broken:
        def __init__(self, name: str) -> None:
            self.name = name

        def hear(self, event: Any, /) -> None:
            raise OSError("gone")

        def close(self) -> None:
            pytest.fail("it was left out")

    said: list[str] = []
    log = EventLog(None, listeners=(Broken("one"), Broken("two")), warn=said.append)
    for _ in range(3):
        log.add("message", text="")
    log.close()
    assert sorted(line.split()[1] for line in said) == ["one", "two"]


def test_no_secret_gets_to_a_tracker(notebook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abc")
    monkeypatch.setenv("MY_TOKEN", "123456")
    tracker = Tracker("notebook")
    with screen("prune", listeners=[tracker]) as console:
        recipe = {"model": "https://me:pass@host/x", "ridge": 123456.5, "calibration": {"source": "0123456789abc.txt"}}
        tell(console, "settings", output="runs/0123456789abc", recipe=recipe, options={"hf_" + "Ab1" * 8: 1})
        tell(console, "loss", what="0123456789abc", loss=123456.5)
    (one,) = notebook.made
    told = repr([one.run_name, one.parameters, one.logged])
    for secret in ("0123456789abc", "pass", "hf_Ab1"):
        assert secret not in told
    assert one.parameters["calibration.source"] == "***.txt" and one.parameters["ridge"] == 123456.5


def test_only_the_first_process_of_a_job_tells_any(notebook: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with screen("search", listeners=[Tracker("notebook")]) as console:
            tell(console, "settings", output="out")  # would wait for the other process, if it were looked for
            tell(console, "loss", what="calibration", loss=1.5)
            assert os.environ["WORLD_SIZE"] == "2" and not PartialState._shared_state
        assert len(notebook.made) == (rank == "0")
    assert notebook.made[0].series("calibration/loss") == [1.5] and notebook.made[0].finished == 1


def test_variables_of_a_tracker_are_set_where_nobody_has_set_them(
    notebook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTEBOOK_CALLS_HOME", raising=False)
    monkeypatch.setenv("NOTEBOOK_SENDS", "yes")  # as somebody set it
    wanted = (("NOTEBOOK_CALLS_HOME", "no"), ("NOTEBOOK_SENDS", "no"))
    kind = Kind(("json",), "", "", lambda name: {"run_name": name}, wanted)
    monkeypatch.setitem(TRACKERS, "notebook", kind)
    with screen("prune", listeners=[Tracker("notebook")]) as console:
        tell(console, "settings", output="out")
    assert (os.environ.pop("NOTEBOOK_CALLS_HOME"), os.environ["NOTEBOOK_SENDS"]) == ("no", "yes")


def test_a_trainers_state_is_left_alone(notebook: Any) -> None:
    PartialState(cpu=True)
    try:
        with screen("tune", listeners=[Tracker("notebook")]) as console:
            tell(console, "settings", output="out")
        assert PartialState._shared_state
    finally:
        PartialState._reset_state()


def test_a_run_that_failed_is_marked_so(notebook: Any) -> None:
    with pytest.raises(ConfigError), screen("prune", listeners=[Tracker("notebook")]) as console:
        tell(console, "settings", output="out")
        raise ConfigError("no")
    assert notebook.made[0].series("failed") == [1.0] and notebook.made[0].finished == 1


def test_one_that_counts_for_all_series_together_is_told_no_step(
    notebook: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = Kind(("json",), "", "", lambda name: {"run_name": name}, steps=False)
    monkeypatch.setitem(TRACKERS, "notebook", kind)
    with screen("tune", listeners=[Tracker("notebook")]) as console:
        tell(console, "settings", output="out")
        tell(console, "loss", what="training", step=7, loss=0.5)
        tell(console, "loss", what="calibration", loss=0.25)
    logged = notebook.made[0].logged
    assert logged[0] == ({"training/loss": 0.5, "training/step": 7}, None)
    assert logged[1] == ({"calibration/loss": 0.25}, None)


def test_numbers_and_names_are_what_every_tracker_takes() -> None:
    event = {"time": "", "event": "result", "folder": "x", "perplexity": {"held-out a/b:1+c": {"dense": 2, "sure": True,
             "pruned": "nan", "all": [1.0]}}}  # fmt: skip
    assert numbers_of(event) == {"result/perplexity/held-out_a_b_1_c/dense": 2}
    progress = {"event": "progress", "stage": "search", "what": "../x", "done": 3, "total": 4, "detail": ""}
    assert numbers_of(progress) == {"progress/search/x": 0.75}
    assert numbers_of(progress | {"done": 5}) == {"progress/search/x": 1}, "a search that estimated too little"
    assert numbers_of(progress | {"stage": None, "total": 0}) == {}
    assert numbers_of({"event": "message", "text": "1"}) == {}
    forecast = {"event": "forecast", "disk_bytes": {"/some/folder": 7}, "memory": {"predicted_bytes": 8}}
    assert numbers_of(forecast) == {"forecast/memory/predicted_bytes": 8}
    recipe = {"ratio": 0.2, "stages": ["mlp"], "calibration": {"seed": 1}}
    asked = {"event": "settings", "output": "o", "recipe": recipe, "options": {"search": {"pick": None}}}
    assert parameters_of(asked) == {"output": "o", "ratio": 0.2, "stages": '["mlp"]', "calibration.seed": 1,
                                    "search.pick": None}  # fmt: skip


def test_progress_is_thinned_for_trackers(notebook: Any) -> None:
    log = EventLog(None, 0.0, [Tracker("notebook")])
    log.add("run began", command="prune", version="1")
    log.add("settings", output="out")
    for done in range(101):
        log.progress("moments", done, 100)
    log.close()
    shown = notebook.made[0].series("progress/moments")
    assert (shown[0], shown[-1]) == (0, 1) and len(shown) < 10


def test_a_search_and_a_sweep_have_series_of_their_own(notebook: Any, dense: Path, tmp_path: Path) -> None:
    told = ["--track", "notebook", "--track-project", "mine", "--log-level", "error"]
    small = ["--population", "4", "--generations", "2", "--seeds", "none"]
    assert main(["search", *arguments(dense, tmp_path / "found", *small, *told)]) == 0
    assert main(arguments(dense, tmp_path / "swept", "--sweep", "ratio=0.2,0.3", *told)) == 0
    found, swept = notebook.made
    assert found.parameters["search.population"] == 4 and swept.parameters["sweep"] == "ratio=0.2,0.3"
    best = found.series("evolution/best/loss")
    assert len(best) == 3 and best == sorted(best, reverse=True)
    record = json.loads((tmp_path / "swept" / "sweep.json").read_text())
    losses = [point["loss"] for point in record["points"] if point["method"] == "program"]
    assert swept.series("program_point/loss") == losses and len(losses) == 2
    assert swept.series("result/points/0.3/loss") == losses[1:]


def test_a_training_has_its_losses(notebook: Any, run: Run, dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    text, told = str(dense / "text.txt"), ["--track", "notebook", "--log-level", "error"]
    given = ["--data", text, "--no-distill", "--steps", "3", "--batch", "2", "--length", "16", "--eval-text", text]
    output = ["--output", str(tmp_path / "tuned"), "--eval-length", "32", "--device", "cpu"]
    assert main(["tune", str(run.folder), *given, *output, *told]) == 0
    (one,) = notebook.made
    report = json.loads((tmp_path / "tuned" / "report.json").read_text())
    training = [(step, values["training/loss"]) for values, step in one.logged if "training/loss" in values]
    assert training == [(step, loss) for step, loss in report["tuned"]["losses"]] and len(training) == 3
    assert one.series("result/perplexity/text.txt/after") == [report["tuned"]["perplexity"]["text.txt"]["after"]]
    assert one.parameters["tune.steps"] == 3 and one.parameters["folder"] == str(run.folder)
