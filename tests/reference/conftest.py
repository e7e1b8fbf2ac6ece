"""The longest tests begin first, so that no worker is left alone with them."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything else follows in its order."""
    items.sort(key=lambda item: not item.path.is_relative_to(HERE))
