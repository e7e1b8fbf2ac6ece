"""A Hub that takes the connection and then says nothing: the push ends with one line, and the next one goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, get_session

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.publish import push as publish
from multipruner.publish.errors import PublishError
from multipruner.publish.package import prepare
from multipruner.publish.push import check_push
from multipruner.publish.upload import push_to_hub
from tests.support import tiny
from tests.support.fake_hub import FakeHub, Fault, fake_hub

TOKEN = "hf_" + "Silent" * 6
SILENCE = 0.2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dense = tiny.tiny_model("llama")
    plan = tiny.random_plan(dense, 1)
    report = {"format": "multipruner-report", "version": 1, "ratio": 0.3}
    folder = tmp_path_factory.mktemp("runs") / "run"
    return save(folder, apply_plan(dense, plan), None, plan=plan, report=report, card="")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    with fake_hub({TOKEN: ("me", "write")}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the library's own attempts
        yield hub


def _push(run: Path) -> Any:
    return push_to_hub(prepare(run, "me/small", license="mit"), token=TOKEN, silence=SILENCE)


@pytest.mark.parametrize("late", [False, True], ids=["undone", "done"])
@pytest.mark.parametrize(
    "call",
    ["GET /api/whoami", "GET .*/me/small$", "POST .*/create", "PUT /storage", "POST .*/commit/", "POST .*/tag/"],
)
def test_a_silent_hub_does_not_hold_a_push_for_ever(call: str, late: bool, hub: FakeHub, run: Path) -> None:
    before = get_session().timeout
    hub.faults.append(Fault(call, silent=True, late=late))
    began = time.monotonic()
    with pytest.raises(PublishError, match="is connected, but silent; try again later: the same command goes on") as e:
        _push(run)
    assert time.monotonic() - began < 6 * SILENCE + 3, "the library tries six times to send a file"
    assert (hub.storage if "PUT" in call else hub.url).removesuffix("/storage") in str(e.value)
    assert get_session().timeout == before, "the rest of the process keeps its own patience"
    hub.faults.clear()
    _push(run)
    repo = hub.repos["me/small"]
    assert repo.files["model.safetensors"].content == (run / "model.safetensors").read_bytes()
    assert len(repo.commits) == 2 and repo.tags == {"v1": repo.head}
    if "commit" in call:
        assert len(hub.sent("PUT /storage")) == 1, "no object travels twice"


def test_a_hub_that_is_slow_once_is_waited_for(hub: FakeHub, run: Path) -> None:
    hub.faults.append(Fault("PUT /storage", silent=True, times=2))
    assert _push(run).tag == "v1"


def test_the_check_before_a_long_run_ends_too(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(publish, "SILENCE", SILENCE)
    for call in ("GET /api/whoami", "GET .*/me/small$"):
        hub.faults.append(Fault(call, silent=True, times=1))
        with pytest.raises(PublishError, match="silent"):
            check_push("me/small")
