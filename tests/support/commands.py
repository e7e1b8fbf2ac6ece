"""Command lines of small runs, on the model of the fixture ``dense``."""

from __future__ import annotations

from pathlib import Path


def arguments(dense: Path, output: Path, *more: str) -> list[str]:
    """A run by the default method."""
    return [
        "--model", str(dense), "--ratio", "0.3", "--calibration", str(dense / "text.txt"), "--sequences", "4",
        "--length", "16", "--moments-sequences", "12", "--channel-group", "8",
        "--eval-text", str(dense / "text.txt"), "--output", str(output), *more,
    ]  # fmt: skip


def paper_arguments(dense: Path, output: Path, *more: str) -> list[str]:
    """A run by the published method."""
    return [
        "--method", "paper", "--model", str(dense), "--ratio", "0.3",
        "--calibration", str(dense / "text.txt"), "--sequences", "4",
        "--width-sequences", "2", "--length", "16", "--channel-group", "8", "--eval-text", str(dense / "text.txt"),
        "--output", str(output), *more,
    ]  # fmt: skip
