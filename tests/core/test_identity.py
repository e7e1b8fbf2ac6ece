"""What is found by a hash is found by the same hash in every version."""

from __future__ import annotations

from pathlib import Path

import pytest

from multipruner.core.identity import digest


def test_a_digest_does_not_change() -> None:
    known = "e4dfc0a85121cff6b90ec64f865953db567e1c0100b8fa8610ef850f5fd319bd"
    assert digest({"b": [1, 2.5, None], "a": {"y": "\u00e9", "x": True}}) == known
    assert digest({"a": {"x": True, "y": "\u00e9"}, "b": [1, 2.5, None]}) == known
    assert digest({"path": Path("x")}, default=str) == digest({"path": "x"})
    with pytest.raises(TypeError):
        digest({"path": Path("x")})
