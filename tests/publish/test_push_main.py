"""``--push`` of a long command: what would stop it shows before the work, what is finished is pushed after it."""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download

import multipruner
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.commands.base import Parser
from multipruner.commands.main import main
from multipruner.commands.push import PushLater
from multipruner.core.errors import ConfigError
from multipruner.publish.errors import PublishError
from tests.support import tiny
from tests.support.commands import paper_arguments
from tests.support.fake_hub import FakeHub, Fault, fake_hub

TOKEN, READER = "hf_" + "Writer" * 6, "hf_" + "Reader" * 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny.tiny_model("llama")
    plan = tiny.random_plan(model, 1)
    report = {"format": "multipruner-report", "version": 1, "ratio": 0.3}
    folder = tmp_path_factory.mktemp("runs") / "run"
    return save(folder, apply_plan(model, plan), None, plan=plan, report=report, card="")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    with fake_hub({TOKEN: ("me", "write"), READER: ("me", "read")}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@pytest.fixture
def token(tmp_path: Path) -> Path:
    file = tmp_path / "the token"
    file.write_text(TOKEN + "\n")
    return file


def typed(*words: str) -> dict[str, Any]:
    parser = Parser(argument_default=argparse.SUPPRESS)
    parser.add_argument("--ratio", type=float)
    PushLater.flags(parser.add_argument_group("sharing"))
    return vars(parser.parse_args(words))


def later(*words: str) -> PushLater:
    found = PushLater.take(typed(*words))
    assert found is not None
    return found


def test_the_flags_are_taken_out_of_what_was_typed() -> None:
    values = typed("--ratio", "0.3", "--push", "me/small", "--public", "--yes", "--token-file", "f")
    assert PushLater.take(values) == PushLater("me/small", public=True, yes=True, token_file=Path("f"))
    assert values == {"ratio": 0.3}
    assert PushLater.take(values) is None and later("--push", "me/small") == PushLater("me/small")
    for flag in (["--public"], ["--yes"], ["--token-file", "f"]):
        with pytest.raises(ConfigError, match=rf"{flag[0]} is about --push USER/NAME, which is not there"):
            PushLater.take(typed(*flag))


def test_the_record_of_a_run_does_not_say_where_it_was_pushed_or_where_the_token_lies() -> None:
    made = ["--model", "llama", "--ratio", "0.2", "--output", "a b"]
    pushed = ["--model", "llama", "--push", "me/x", "--ratio", "0.2", "--yes", "--token-file=/home/me/t", "--public"]
    assert PushLater.without([*pushed, "--output", "a b"]) == made
    assert PushLater.without(["--model", "llama", "--push=me/x", "--token", "t", "--output", "a b"]) == [
        "--model", "llama", "--output", "a b",
    ]  # fmt: skip
    assert PushLater.without(made) == made


def test_what_would_stop_the_push_shows_before_the_work(
    hub: FakeHub, token: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(*words: str) -> str:
        with pytest.raises(PublishError) as caught:
            later(*words).check()
        return str(caught.value)

    assert "no Hub token: give --token-file FILE" in refusal("--push", "me/small")
    assert "cannot be read" in refusal("--push", "me/small", "--token-file", str(tmp_path / "nothing"))
    with_token = ("--token-file", str(token))
    assert "give user/name" in refusal("--push", "small", *with_token)
    assert not hub.requests, "nothing was asked so far"
    reader = tmp_path / "reader"
    reader.write_text(READER)
    assert "may only read" in refusal("--push", "me/small", "--token-file", str(reader))
    hub.faults.append(Fault("GET /api/whoami", 401, times=1))
    assert "does not know this token" in refusal("--push", "me/small", *with_token)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert "add --yes" in refusal("--push", "me/small", "--public", *with_token)
    later("--push", "me/small", "--public", "--yes", *with_token).check()
    later("--push", "me/small", *with_token).check()
    assert not hub.repos and not hub.sent("POST|PUT"), "a check changes nothing"


def test_what_is_finished_is_pushed_without_asking_again(
    hub: FakeHub, token: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "notes.txt").write_text("mine")
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # nobody there any more
    done = later("--push", "me/small", "--public", "--token-file", str(token)).run(run)
    assert done is not None and done.public and not hub.repos["me/small"].private
    assert "notes.txt" not in done.sent and "left out, not part of the run: notes.txt" in capsys.readouterr().out
    assert later("--push", "me/small-too", "--token-file", str(token)).run(run) is not None
    assert hub.repos["me/small-too"].private


def test_a_push_that_fails_at_the_end_names_the_command_for_later(hub: FakeHub, token: Path, finished: Path) -> None:
    hub.faults.append(Fault("POST .*/commit/", 500, times=1))
    with pytest.raises(PublishError) as caught:
        later("--push", "me/small", "--token-file", str(token)).run(finished)
    text = str(caught.value)
    command = f"python -m multipruner push {finished} me/small --token-file '{token}'"
    assert text.endswith(f"the run is finished; to push it: {command}") and "\n" not in text and "(500)" in text
    words = ["push", str(finished), "me/small", "--token-file", str(token)]
    assert main(words) == 0, "the command that was named does it"
    assert hub.repos["me/small"].tags == {"v1": hub.repos["me/small"].head}


def test_the_main_command_prunes_and_pushes(hub: FakeHub, token: Path, dense: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "pruned"
    wrong = tmp_path / "wrong"
    wrong.write_text("hf_" + "Nobody" * 6)
    assert main(paper_arguments(dense, output, "--push", "me/small", "--token-file", str(wrong))) == 2
    assert "does not know this token" in capsys.readouterr().err
    assert not output.exists() and not output.with_name("pruned.partial").exists(), "it stopped before the work"
    assert main(paper_arguments(dense, output, "--push", "me/small", "--token-file", str(token))) == 0
    said = capsys.readouterr()
    assert f"private: {hub.url}/me/small" in said.out and TOKEN not in said.out + said.err
    files = hub.repos["me/small"].files
    assert files["model.safetensors"].content == (output / "model.safetensors").read_bytes()
    assert not any(word in blob.content for blob in files.values() for word in (TOKEN.encode(), str(token).encode()))
    copy = snapshot_download("me/small", endpoint=hub.url, token=TOKEN, cache_dir=tmp_path / "cache")
    ids = tiny.random_ids()
    with torch.no_grad():
        here, there = (multipruner.load(folder)(ids).logits for folder in (output, copy))
    assert torch.equal(here, there)
