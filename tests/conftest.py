"""Before transformers is imported: no network, and a module cache of its own for code that travels with a model."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Workers of ``-n auto``: four at most, each needs memory; none for slow tests, which use every core themselves."""
    chosen = config.getoption("markexpr") or ""
    slow = "slow" in chosen and "not slow" not in chosen
    return 0 if slow else min(os.cpu_count() or 1, 4)
