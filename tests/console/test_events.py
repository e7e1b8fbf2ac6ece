"""What a run does as JSON lines: every line is whole, in order, of the report's stages, and without secrets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from multipruner.commands.main import main
from multipruner.console.events import EventLog, screen
from multipruner.console.progress import counting_display
from multipruner.console.say import teller
from multipruner.core.errors import ConfigError, OutputError
from tests.support.commands import arguments, paper_arguments


def _events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _named(events: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [one for one in events if one["event"] == name]


def test_a_run_is_told_from_beginning_to_end(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = tmp_path / "run.jsonl", tmp_path / "out"
    assert main(arguments(dense, out, "--log-json", str(log), "--log-level", "debug")) == 0
    events, report = _events(log), json.loads((out / "report.json").read_text())
    times = [datetime.fromisoformat(one["time"]) for one in events]
    assert times == sorted(times)
    assert events[0]["event"] == "run began" and events[-1] | {"outcome": "done"} == events[-1]
    began, ended = ([one["stage"] for one in _named(events, f"stage {what}")] for what in ("began", "ended"))
    assert began == ended == list(report["seconds"]), "the stages of the report, in their order, one after another"
    for one in _named(events, "stage ended"):
        assert one["whole"] and one["seconds"] >= 0
    open_: list[str] = []
    for one in events:
        if one["event"] == "stage began":
            open_.append(one["stage"])
        elif one["event"] == "stage ended":
            open_.remove(one["stage"])
        elif one["event"] == "progress" and one["stage"] is not None:
            assert one["stage"] == open_[-1] and 0 <= one["done"] <= max(one["total"], one["done"])
    assert {one["what"] for one in _named(events, "progress")} >= {"moments", "first tables", "repair"}
    rounds = [one["loss"] for one in _named(events, "decision")]
    assert rounds == [one["loss"] for one in report["search"]["rounds"]]
    assert _named(events, "loss")[0]["loss"] == report["search"]["loss"]
    assert set(_named(events, "forecast")[0]["stages"]) == set(report["forecast"]["stages"])
    (result,) = _named(events, "result")
    assert result["folder"] == str(out) and result["ratio"] == report["ratio"]
    assert result["perplexity"]["text.txt"]["pruned"] == report["perplexity"]["text.txt"]["pruned"]
    said = capsys.readouterr().out
    assert all(one["text"].splitlines()[0] in said for one in _named(events, "message"))


def test_a_log_is_appended_to(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "run.jsonl"
    given = paper_arguments(dense, tmp_path / "out", "--log-json", str(log), "--log-level", "error")
    assert main(given) == 0
    assert capsys.readouterr().out == "", "nothing but errors"
    before = log.read_bytes()
    log.write_bytes(before + b'{"time": "torn')
    assert main([*given, "--ratio", "0.9999"]) == 2
    after = log.read_bytes()
    assert after.startswith(before + b'{"time": "torn\n')
    more = [json.loads(line) for line in after[len(before) :].splitlines()[1:]]
    assert more[0]["event"] == "run began" and more[-1]["outcome"] == "failed"
    assert more[-1]["error"] in capsys.readouterr().err
    steps = _named(_events_of(before), "decision")
    assert steps and all(one["what"] == "step" and one["loss"] > 0 for one in steps)


def _events_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


@pytest.mark.parametrize("content", ["weights\n", '{"format": "multipruner-plan"}\n', "[1]\n", "\x00\xff"])
def test_what_is_no_log_is_left_alone(content: str, dense: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "precious"
    path.write_text(content)
    assert main(arguments(dense, tmp_path / "out", "--log-json", str(path))) == 2
    assert "holds no events of a run" in capsys.readouterr().err
    assert path.read_text() == content and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["", "no/such/folder/x.jsonl"])
def test_a_log_that_cannot_be_written_is_said_before_anything(name: str, dense: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(dense, tmp_path / "out", "--log-json", str(tmp_path / name))) == 2
    assert "choose another --log-json" in capsys.readouterr().err


def test_no_secret_is_in_a_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, key = tmp_path / "log", "hf_" + "Ab1" * 8
    monkeypatch.setenv("HF_TOKEN", 'quote"and-more-secret')
    monkeypatch.setenv("MY_API_KEY", "0123456789")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with pytest.raises(ConfigError), screen("prune", path=path) as console:
        teller(console)(f'asked with quote"and-more-secret and {key}, 0123456789, at ftp://me:pass@host/x; false')
        raise ConfigError(f"{key} is refused")
    said = path.read_text()
    for secret in ("and-more-secret", key, "0123456789", "pass"):
        assert secret not in said
    assert "ftp://***@host/x; false" in said and "*** is refused" in said


def test_progress_is_thinned_and_its_end_told(tmp_path: Path) -> None:
    for level, expected in (("info", 2), ("debug", 101)):
        path = tmp_path / level
        with screen("prune", level, path) as console, counting_display(console, "text") as tell:
            for done in range(101):
                tell("text", done, 100)
        found = _named(_events(path), "progress")
        assert len(found) == expected and (found[0]["done"], found[-1]["done"]) == (0, 100)


def test_numbers_that_are_none_are_text(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log")
    log.add("loss", loss=float("nan"), others=(1.5, float("inf")), where=tmp_path)
    log.close()
    (found,) = _events(tmp_path / "log")
    assert (found["loss"], found["others"], found["where"]) == ("nan", [1.5, "inf"], str(tmp_path))


def test_another_process_of_a_job_writes_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with screen("search", path=tmp_path / "log") as console:
        assert console.events is None
    assert not (tmp_path / "log").exists()


def test_lines_survive_a_kill(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom multipruner.console.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]), 0.0)\nlog.began('text')\nlog.progress('text', 1, 9)\ntime.sleep(100)\n"
    )
    path = tmp_path / "log"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)])
    end = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < 2:
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [one["event"] for one in _events(path)] == ["stage began", "progress"]


def test_other_commands_have_a_log_too(dense: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert main(arguments(dense, tmp_path / "out")) == 0
    text = str(dense / "text.txt")
    assert main(["eval", str(tmp_path / "out"), "--eval-text", text, "--log-json", str(log)]) == 0
    given = ["latency", "--model", str(dense), "--output", str(tmp_path / "t.json"), "--phase", "prefill"]
    assert main([*given, "--prompt", "8", "--channel-step", "20", "--log-json", str(log)]) == 0
    assert main(["export", str(tmp_path / "out"), "--log-json", str(log), "--format", "gguf"]) in (0, 2)
    events = _events(log)
    assert [one["command"] for one in _named(events, "run began")] == ["eval", "latency", "export"]
    assert _named(events, "progress") and len(_named(events, "run ended")) == 3


def test_a_log_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        EventLog(tmp_path / "none" / "log")
