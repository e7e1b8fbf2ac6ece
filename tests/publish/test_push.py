"""Sharing a run: what arrives on a Hub loads from there with the same logits, nothing else goes, no token shows.

The Hub is tests/support/fake_hub.py: every test that sends something does so over real HTTP.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file

from multipruner.checkpoint import save as checkpoint
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.core.errors import MultiprunerError
from multipruner.publish.errors import PublishError
from multipruner.publish.package import prepare
from multipruner.publish.push import check_push, push
from multipruner.publish.upload import push_to_hub
from multipruner.report.card import model_card
from tests.support import tiny
from tests.support.fake_hub import FakeHub, Fault, fake_hub

TOKEN, READER, UNKNOWN = "hf_" + "Writer" * 6, "hf_" + "Reader" * 6, "hf_" + "Nobody" * 6
CONTRAST = {"dense": 10.0, "dense_stderr": 1.0, "pruned": 12.5, "pruned_stderr": 1.5, "difference": 2.5,
            "difference_stderr": 0.5, "examples": 7}  # fmt: skip
REPORT = {
    "format": "multipruner-report", "version": 1, "ratio": 0.31, "command": "python -m multipruner --model tiny",
    "recipe": {"ratio": 0.3, "calibration": {"seed": 5}, "evaluation": {"tasks": ["ppl"], "limit": None}},
    "calibration": {"name": "my words", "hash": "abc123", "tokens": 64}, "versions": {"torch": "2.13"},
    "perplexity": {"my text": CONTRAST}, "tasks": {}, "average": None,
    "evaluations": [{"settings": {"tasks": ["piqa"], "limit": 20}, "perplexity": {},
                     "tasks": {"piqa": {"acc": {**CONTRAST, "pruned": 0.5}}}, "average": None}],
}  # fmt: skip
COMMAND = """
import sys
from multipruner.commands.main import main
from multipruner.commands import COMMANDS

COMMANDS.setdefault("push", "")
sys.exit(main(["push", *sys.argv[1:]]))
"""
LOAD = """
import json, sys, torch
from pathlib import Path
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer
import multipruner

ids, logits = torch.load(sys.argv[1])
stock = AutoModelForCausalLM.from_pretrained("me/small", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(multipruner.load("me/small")(ids).logits, logits), "multipruner.load"
    assert torch.equal(stock(ids).logits, logits), "transformers"
assert AutoTokenizer.from_pretrained("me/small", trust_remote_code=True)("w7 w9").input_ids == [7, 9]
folder = Path(snapshot_download("me/small", revision="v1"))
print(json.dumps(sorted(path.name for path in folder.iterdir())))
"""


@pytest.fixture(scope="module")
def model() -> Any:
    dense = tiny.tiny_model("llama")
    plan = tiny.random_plan(dense, 1, drop=0.4)
    return apply_plan(dense, plan), plan


@pytest.fixture(scope="module")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pruned, plan = model
    folder, steps = tmp_path_factory.mktemp("runs") / "run", tmp_path_factory.mktemp("steps") / "trajectory.jsonl"
    steps.write_text("{}\n")
    card = model_card(REPORT, plan)
    return save(folder, pruned, tiny.tiny_tokenizer(), plan=plan, report=REPORT, trajectory=steps, card=card)


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A Hub of its own for a test, and this process pointed at it with a token that may write."""
    with fake_hub({TOKEN: ("me", "write"), READER: ("me", "read")}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


def failure(folder: Path, repo: str = "me/small", **options: Any) -> str:
    """The one line of a push that fails; its traceback shows no token either."""
    with pytest.raises(MultiprunerError) as caught:
        push(folder, repo, **options)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    whole = "".join(traceback.format_exception(caught.value))
    assert not any(token in whole + repr(caught.value) for token in (TOKEN, READER, UNKNOWN))
    return text


def command(folder: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    everything = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **environment}
    line = [sys.executable, "-c", COMMAND, str(folder), *more]
    return subprocess.run(line, env=everything, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_what_was_pushed_loads_from_the_hub_with_equal_logits(hub: FakeHub, run: Path, model: Any, tmp_path) -> None:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = command(run, "me/small", "--token-file", str(token_file), HF_TOKEN="", **home)
    assert done.returncode == 0, done.stderr
    assert f"private: {hub.url}/me/small" in done.stdout and "0 unchanged; tag v1" in done.stdout
    ids = tiny.random_ids()
    with torch.no_grad():
        torch.save((ids, model[0](ids).logits), tmp_path / "logits.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", **home}
    line = [sys.executable, "-c", LOAD, str(tmp_path / "logits.pt")]
    loaded = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert json.loads(loaded.stdout) == sorted([".gitattributes", *(path.name for path in run.iterdir())])
    token_file.unlink()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 20 and not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in done.stdout + done.stderr + loaded.stderr
    assert not any(TOKEN.encode() in blob.content for blob in hub.repos["me/small"].files.values())


def test_every_byte_arrives_and_the_card_names_the_repository(hub: FakeHub, run: Path) -> None:
    done = push(run, "me/small", tag="first", message="here it is")
    repo = hub.repos["me/small"]
    assert done is not None and done.commit == repo.head == repo.tags["first"] and repo.commits[-1][1] == "here it is"
    assert set(done.sent) == {path.name for path in run.iterdir()} == set(repo.files) - {".gitattributes"}
    for name in set(done.sent) - {"README.md"}:
        assert repo.files[name].content == (run / name).read_bytes()
    card = repo.files["README.md"].content.decode()
    assert 'from_pretrained("me/small", trust_remote_code=True)' in card and 'multipruner.load("me/small")' in card
    assert "path/to" not in card and str(run) not in card
    for text in ("python -m multipruner --model tiny", "torch 2.13", "Seed: 5", "abc123", "## Limits"):
        assert text in card
    data: Any = ModelCard(card).data
    results = {(r.dataset_name, r.metric_type): r for r in data.eval_results}
    assert results["my text", "perplexity"].metric_value == 12.5
    assert results["piqa", "acc"].metric_value == 0.5 and results["piqa", "acc"].dataset_args == {"limit": 20}
    assert results["piqa", "acc"].metric_args == {"stderr": 1.5, "dense": 10.0, "examples": 7}


def test_only_what_changed_is_sent(hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = len(list(run.iterdir()))
    push(run, "me/small")
    hub.requests.clear()
    again = push(run, "me/small")
    assert again is not None and not again.sent and again.tag == "v1" and len(hub.repos["me/small"].commits) == 2
    assert f"0 files sent, {count} unchanged" in capsys.readouterr().out
    assert not hub.sent("storage|commit|/tag/")
    report = {**REPORT, "tasks_markdown": "| new |"}
    (run / "report.json").write_text(json.dumps(report))
    third = push(run, "me/small")
    assert third is not None and sorted(third.sent) == ["README.md", "report.json"] and third.tag == "v2"
    assert not hub.sent("storage") and list(hub.repos["me/small"].tags) == ["v1", "v2"]
    assert f"2 files sent, {count - 2} unchanged; tag v2" in capsys.readouterr().out


def test_changed_weights_of_the_same_size_are_sent_and_stale_shards_go(hub: FakeHub, run: Path, model: Any) -> None:
    push(run, "me/small")
    weights = load_file(run / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, run / "model.safetensors", {"format": "pt"})
    done = push(run, "me/small")
    assert done is not None and done.sent == ("model.safetensors",)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_SIZE", "50KB")
        save(run, model[0], None, plan=model[1], report=REPORT, card="", replace=True)
    done = push(run, "me/small")
    assert done is not None and done.removed == ("model.safetensors",)
    files = hub.repos["me/small"].files
    assert "model.safetensors" not in files and "model.safetensors.index.json" in files


def test_a_push_that_was_cut_goes_on_where_it_was(hub: FakeHub, run: Path, model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_SIZE", "50KB")
    save(run, model[0], None, plan=model[1], report=REPORT, card="", replace=True)
    shards = sorted(run.glob("model-*.safetensors"))
    hub.faults.append(Fault("POST .*/commit/", times=1))
    assert "was cut" in failure(run)
    assert len(hub.sent("PUT /storage")) == len(shards) > 1 and len(hub.repos["me/small"].commits) == 1
    assert push(run, "me/small") is not None
    assert len(hub.sent("PUT /storage")) == len(shards), "no object travels twice"
    assert len(hub.repos["me/small"].commits) == 2


def test_a_hiccup_of_the_storage_is_survived(hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.faults += [Fault("PUT /storage", times=1), Fault("PUT /storage", status=503, times=1)]
    assert push(run, "me/small") is not None
    assert hub.repos["me/small"].files["model.safetensors"].content == (run / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (Fault("GET /api/whoami", 401), "does not know this token (401); make one that may write at"),
        (Fault("POST /api/repos/create", 403, '{"error": "no room"}'), "may not write to me/small (403: no room)"),
        (Fault("POST .*/commit/", 409), "changed by somebody else meanwhile (409)"),
        (Fault("POST .*/commit/", 412), "changed by somebody else meanwhile (412)"),
        (Fault("POST .*/tag/", 409), None),
        (Fault("POST /api/repos/create", 500), "has a fault of its own (500); try again later"),
        (Fault("POST .*/preupload/", 503), "has a fault of its own (503); try again later"),
        (Fault("POST .*/commit/", 502, "<html>"), "has a fault of its own (502"),
        (Fault("PUT /storage", 500), "has a fault of its own (500); try again later"),
        (Fault("GET /api/models/me/small/tree", 404), "has no me/small for this token (404"),
        (Fault("POST .*/commit/", 429), "wait some minutes"),
        (Fault("POST .*/commit/", 413, '{"error": "too big"}'), "refuses the push to me/small (413: too big)"),
        (Fault("POST .*/validate-yaml", 502, "<html>"), "does not answer as a Hub does"),
        (Fault("GET /api/whoami", 200, "<html>"), "does not answer as a Hub does; check HF_ENDPOINT"),
        (Fault("GET /api/whoami"), "was cut"),
        (Fault("POST .*/preupload/"), "was cut"),
        (Fault("PUT /storage"), "was cut"),
        (Fault("POST .*/commit/"), "the same command goes on"),
    ],
    ids=lambda value: f"{value.pattern} {value.status or 'cut'}" if isinstance(value, Fault) else "",
)
def test_every_failure_is_one_line_with_its_mend(
    fault: Fault, seen: str | None, hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's own attempts
    hub.faults.append(fault)
    if seen is None:
        assert push(run, "me/small") is not None
        return
    assert seen in failure(run)
    hub.faults.clear()
    assert push(run, "me/small") is not None, "nothing stands in the way of another attempt"


def test_no_network_and_offline_mode_are_told_apart(hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert "no connection to http://127.0.0.1:" in failure(run, endpoint=f"http://127.0.0.1:{port}")
    assert "no connection to http://nowhere.invalid" in failure(run, endpoint="http://nowhere.invalid")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert failure(run) == "HF_HUB_OFFLINE is set, so nothing can be pushed; unset it"


def test_tokens_that_cannot_do_it(hub: FakeHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"

    def with_token(text: str, repo: str = "me/small") -> str:
        file.write_bytes(text.encode("latin-1"))
        return failure(run, repo, token_file=file)

    assert "does not know this token (401)" in with_token(UNKNOWN)
    assert "may only read" in with_token(READER)
    assert "may not write to you/small (403" in with_token(TOKEN, "you/small")
    for odd in ("", f"{TOKEN}\n{TOKEN}", f"token {TOKEN}", f"{TOKEN}\xe9", f"{TOKEN}\0"):
        assert "does not hold a token" in with_token(odd)
    assert "cannot be read: No such file" in failure(run, token_file=tmp_path / "nothing")
    monkeypatch.delenv("HF_TOKEN")
    assert "no Hub token: give --token-file FILE" in failure(run)
    assert not hub.repos


def test_a_token_shows_nowhere_even_where_the_server_repeats_it(
    hub: FakeHub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults.append(Fault("GET /api/whoami", 500, '{"error": "{authorization}"}', {"X-Echo": "1"}))
    assert "(500: Bearer ***)" in failure(run)
    for flags in ([], ["--debug"]):
        done = command(run, "me/small", *flags, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path / "home"))
        assert done.returncode and "fault of its own (500: Bearer ***)" in done.stderr
        assert TOKEN not in done.stdout + done.stderr and ("Traceback" in done.stderr) == bool(flags)
    hub.faults.clear()
    for name, text in (("README.md", f"my notes: {TOKEN}"), ("chat_template.jinja", "hf_" + "x" * 34)):
        (run / name).write_text(text)
        assert f"{name} holds what looks like a Hub token" in failure(run)
        (run / name).write_text("")
    short = "secret-of-a-private-hub"
    hub.users[short] = ("me", "write")
    monkeypatch.setenv("HF_TOKEN", short)
    (run / "chat_template.jinja").write_text(short)
    assert "holds the token itself" in failure(run)
    assert not hub.repos and not [p for p in (tmp_path / "home").rglob("*") if p.is_file() and TOKEN in p.read_text()]


def test_a_dry_run_lists_the_files_and_needs_neither_token_nor_network(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(socket, "socket", None)
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert push(run, "me/small", dry_run=True) is None
    out = capsys.readouterr().out
    assert all(f"  {path.name}" in out for path in run.iterdir()) and "nothing was sent" in out
    size = (run / "model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB  model.safetensors" in out
    assert before == {path: path.read_bytes() for path in run.iterdir()}


def test_only_finished_runs_are_pushed(saved: Path, hub: FakeHub, tmp_path: Path) -> None:
    assert "there is no folder" in failure(tmp_path / "nothing")
    (tmp_path / "half.partial").mkdir()
    assert "goes on from" in failure(tmp_path / "half")
    (tmp_path / "thesis").mkdir()
    assert "it has no config.json and no plan.json and no report.json" in failure(tmp_path / "thesis")

    def broken(name: str, change: Any) -> str:
        folder = Path(shutil.copytree(saved, tmp_path / "broken", dirs_exist_ok=True))
        change(folder / name)
        return failure(folder)

    assert "the weights are not all there" in broken("model.safetensors", Path.unlink)
    cut = broken("model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-1]))
    assert "the tensors are cut short" in cut
    assert "no whole safetensors file" in broken("model.safetensors", lambda path: path.write_bytes(b"x" * 20))
    assert "plan format None" in broken("plan.json", lambda path: path.write_text("{}"))
    assert "not the report" in broken("report.json", lambda path: path.write_text("{}"))
    assert "cannot be read" in broken("config.json", lambda path: path.write_text("{"))
    assert not hub.requests


def test_what_is_not_part_of_the_run_stays_here(hub: FakeHub, run: Path, tmp_path: Path, capsys: Any) -> None:
    strange = ["notes.txt", "train.py", ".env", "adapter_model.safetensors", "deep/config.json", "optimizer.pt"]
    for name in strange:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    (run / "report_files").mkdir()
    (run / "report_files" / "structure.png").write_bytes(b"\x89PNG")
    text = failure(run)
    assert "not part of the run" in text and "and 1 more; move it, or add --skip-foreign" in text
    assert not hub.requests
    done = push(run, "me/small", skip_foreign=True)
    assert done is not None and not set(strange) & set(done.sent) and "report_files/structure.png" in done.sent
    assert "left out, not part of the run: train.py" in capsys.readouterr().out
    card = hub.repos["me/small"].files["README.md"].content.decode()
    assert "](report_files/structure.png)" in card
    (tmp_path / "secret").write_text("mine")
    (run / "vocab.txt").symlink_to(tmp_path / "secret")
    assert "is a link out of the folder" in failure(run, skip_foreign=True)


def test_code_that_a_checkpoint_needs_is_part_of_it(hub: FakeHub, tmp_path: Path) -> None:
    dense = tiny.tiny_model("baichuan")
    plan = tiny.random_plan(dense, 1)
    run = save(tmp_path / "run", apply_plan(dense, plan), None, plan=plan, report=REPORT, card="")
    code = {path.name for path in run.glob("*.py")}
    done = push(run, "me/small")
    assert done is not None and len(code) > 1 and code < set(done.sent)


def test_private_is_the_default_and_public_asks(
    hub: FakeHub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    push(run, "me/small")
    assert hub.repos["me/small"].private
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert "no terminal to ask on; add --yes" in failure(run, public=True)
    monkeypatch.setattr(sys, "stdin", Terminal("\n"))
    assert failure(run, public=True) == "nothing was sent"
    assert hub.repos["me/small"].private
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    push(run, "me/small", public=True)
    assert not hub.repos["me/small"].private and f"public: {hub.url}/me/small" in capsys.readouterr().out
    assert "me/small is public: everybody would see it; say --public" in failure(run)
    push(run, "me/other", public=True, yes=True)
    assert not hub.repos["me/other"].private


def test_a_repository_is_public_only_when_everything_is_there(hub: FakeHub, run: Path) -> None:
    hub.faults.append(Fault("POST .*/commit/", 500))
    failure(run, public=True, yes=True)
    assert hub.repos["me/small"].private


def test_names_and_tags_that_cannot_be(hub: FakeHub, run: Path) -> None:
    for name in ("small", "me/small/deep", "me/sm all", "me/..", ""):
        assert "give user/name" in failure(run, name)
    for tag in ("main", "a b", "-x", "a/b"):
        assert "cannot be a tag" in failure(run, tag=tag)
    assert not hub.requests
    push(run, "me/small", tag="v1")
    (run / "trajectory.jsonl").write_text("{}\n{}\n")
    assert "has a tag 'v1' already" in failure(run, tag="v1")
    assert len(hub.repos["me/small"].commits) == 2
    push(run, "me/small", tag="v1.1")
    assert list(hub.repos["me/small"].tags) == ["v1", "v1.1"]


def test_a_repository_with_another_model_is_left_alone(hub: FakeHub, run: Path) -> None:
    push(run, "me/small")
    files = hub.repos["me/small"].files
    del files["plan.json"]
    assert "me/small holds something else" in failure(run)
    with pytest.raises(PublishError, match="holds something else"):
        check_push("me/small")


def test_words_of_ones_own_in_the_card_stay(hub: FakeHub, run: Path) -> None:
    text = (run / "README.md").read_text().replace("tags:\n", "license: mit\ntags:\n- mine\n") + "\nMy own words.\n"
    (run / "README.md").write_text(text)
    push(run, "me/small")
    card = hub.repos["me/small"].files["README.md"].content.decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert "My own words." in card and 'multipruner.load("me/small")' in card and "path/to" not in card
    assert metadata["license"] == "mit" and "mine" in metadata["tags"] and metadata["model-index"]
    (run / "README.md").write_text("---\n: [\n---\n# x\n")
    assert "README.md: its metadata is not YAML" in failure(run)


def test_the_licence_comes_from_the_dense_models_card(hub: FakeHub, run: Path, capsys: Any) -> None:
    def metadata(repo: str, **options: Any) -> dict[str, Any]:
        push(run, repo, **options)
        return yaml.safe_load(hub.repos[repo].files["README.md"].content.decode().split("---\n")[1])

    assert "license" not in metadata("me/unknown")
    assert "licence of tiny is not known; name it with --license" in capsys.readouterr().out
    assert metadata("me/typed", license="mit")["license"] == "mit"
    push(run, "me/base")
    base = hub.repos["me/base"].files
    front = "license: other\nlicense_name: theirs\nlicense_link: LICENSE\nlanguage: en\n"
    base["README.md"] = type(base["README.md"])(f"---\n{front}---\n# Base\n".encode(), False)
    plan = json.loads((run / "plan.json").read_text())
    plan["base_model"]["name"] = "me/base"
    (run / "plan.json").write_text(json.dumps(plan))
    known = metadata("me/small")
    assert (known["base_model"], known["base_model_relation"]) == ("me/base", "finetune")
    assert (known["license"], known["license_name"], known["language"]) == ("other", "theirs", ["en"])
    assert known["license_link"] == f"{hub.url}/me/base/blob/main/LICENSE"


def test_without_xet_storage_the_files_go_through_lfs(hub: FakeHub, run: Path, monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert push(run, "me/small") is not None
    assert hub.sent("GET .*/xet-write-token/") and "through LFS" in capsys.readouterr().out
    assert hub.repos["me/small"].files["model.safetensors"].content == (run / "model.safetensors").read_bytes()


def test_a_long_run_can_ask_first(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    check_push("me/small")
    assert not hub.repos and {line for line, _ in hub.requests} == {"GET /api/whoami-v2", "GET /api/models/me/small"}
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with pytest.raises(PublishError, match="add --yes"):
        check_push("me/small", public=True)
    monkeypatch.setenv("HF_TOKEN", UNKNOWN)
    with pytest.raises(PublishError, match="401"):
        check_push("me/small")


def test_the_card_of_a_stock_checkpoint_and_of_odd_numbers(model: Any) -> None:
    plan = model[1]
    odd = {"odd": {**CONTRAST, "pruned": float("inf")}, "fine": {**CONTRAST, "dense": float("nan")}}
    card = model_card({**REPORT, "perplexity": odd, "evaluations": []}, plan, name="me/small", stock=True)
    metadata = yaml.safe_load(card.split("---\n")[1])
    (result,) = metadata["model-index"][0]["results"]
    assert result["dataset"]["name"] == "fine" and "dense" not in result["metrics"][0]["args"]
    assert 'AutoModelForCausalLM.from_pretrained("me/small")' in card and "trust_remote_code" not in card
    somewhere = replace(plan, model="/home/somebody/models/their-llama")
    card = model_card({}, somewhere)
    assert "their-llama" in card and "/home/" not in card and "has not been evaluated" in card


def test_somebody_elses_commit_in_between_is_not_overwritten(hub: FakeHub, run: Path) -> None:
    push(run, "me/small")
    (run / "trajectory.jsonl").write_text("{}\n{}\n")
    repo = hub.repos["me/small"]

    def meddle(text: str) -> None:
        if text.startswith("sending"):
            repo.add("theirs", dict(repo.files))

    with pytest.raises(PublishError, match="changed by somebody else meanwhile"):
        push_to_hub(prepare(run, "me/small", license="mit"), token=TOKEN, say=meddle)
    assert repo.commits[-1][1] == "theirs"
