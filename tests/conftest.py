"""Before transformers is imported: no network, and a module cache of its own for code that travels with a model.

And the fixtures that several packages use; they import only what a test that asks for them needs.
"""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from multipruner import Run

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.modules.setdefault("openvino_telemetry", None)  # pyright: ignore[reportArgumentType] (nobody is told of tests)
if "HF_MODULES_CACHE" not in os.environ:
    os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="multipruner-modules-")
    atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
settings.register_profile("steady", deadline=None)  # a busy machine is no failure
settings.load_profile("steady")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start jobs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """One thread for tiny models: more only wait for each other when the machine has other work."""
    if "torch" in sys.modules:
        every = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
        sys.modules["torch"].set_num_threads(every if item.get_closest_marker("slow") else 1)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """What a file of tests leaves in memory is not searched for garbage again and again by those after it."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of ``-n auto``: four at most, each needs memory; none for slow tests, which use every core themselves."""
    chosen = config.getoption("markexpr") or ""
    slow = "slow" in chosen and "not slow" not in chosen
    return 0 if slow else min(os.cpu_count() or 1, 4)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files stay on one worker as long as no other is idle, so that what a file's tests share is made once."""
    if config.getoption("dist") != "load":  # somebody asked for another
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama, with a tokenizer, a text and a file of token ids."""
    from safetensors.torch import save_file

    from tests.support.tiny import random_ids, tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama", layers=4).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    text = " ".join(f"w{4 + (n * n + n // 7) % 93}" for n in range(4000))
    (folder / "text.txt").write_text(text)
    save_file({"input_ids": random_ids(6, 16)}, folder / "tokens.safetensors")
    return folder


@pytest.fixture(scope="module")
def run(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A real small run."""
    import multipruner

    text = str(dense / "text.txt")
    return multipruner.prune(
        str(dense),
        output=tmp_path_factory.mktemp("notebook") / "small",
        ratio=0.3,
        channel_group=8,
        calibration={"source": text, "sequences": 4, "length": 16, "moments_sequences": 12},
        evaluation={"text": text},
    )
