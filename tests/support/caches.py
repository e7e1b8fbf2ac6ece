"""Cache folders of a test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from multipruner.storage.cache import ENVIRONMENT, cache_folder


def cache_at(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Give a test a cache of its own, but for the kinds of models that a new process has opened.

    Opening takes that process seconds, and says the same of a kind in every test: those are remembered together.
    """
    opened, here = cache_folder() / "rehearsals", folder / "rehearsals"
    opened.mkdir(exist_ok=True)
    if not here.exists():
        folder.mkdir(parents=True, exist_ok=True)
        here.symlink_to(opened)
    patch.setenv(ENVIRONMENT, str(folder))
