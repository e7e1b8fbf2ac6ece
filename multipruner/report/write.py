"""A report for people: one HTML page about one or several runs, with every figure as PNG and its numbers as CSV.

Reads what runs write; no model is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from multipruner.core.errors import ConfigError, OutputError
from multipruner.storage.files import whole_file, whole_folder

from .inputs import read_folders
from .page import page

_ENDINGS = {".png", ".csv"}


def write_report(folders: Sequence[Path], output: Path | None = None, *, compare: bool = False) -> Path:
    """Write ``report.html`` and, beside it, ``report_files/`` with a PNG and a CSV per figure.

    Args:
        folders: of finished runs (``report.json``, ``plan.json``, maybe ``trajectory.jsonl``) or of searches
            (``front.json``).
        output: a folder, or the page itself when the name ends in ``.html``. Default: the run's folder when there is
            one, the current folder when there are several.
        compare: whether runs are to be set side by side, as several always are; fewer than two are an error then.

    Returns:
        Where the page is.

    Raises:
        ConfigError: when a file of a run is missing or broken; it is named. When there is nothing to compare.
        OutputError: when the page cannot be written, or its folder holds files that no report wrote.
    """
    if not folders:
        raise ConfigError("no folder given; name the folders that runs wrote")
    runs, fronts = read_folders(folders)
    if compare and len(runs) < 2:
        found = ", ".join(run.label for run in runs) or "none"
        raise ConfigError(f"--compare takes at least two runs; here is {found}: name further folders of finished runs")
    if output is None:
        output = folders[0] if len(folders) == 1 else Path()
    target = output if output.suffix.lower() == ".html" else output / "report.html"
    files = target.with_name(f"{target.stem}_files")
    _check_free(target, files)
    text, drawings = page(runs, fronts, files.name)
    contents: dict[str, bytes] = {}
    for drawing in drawings:
        contents[f"{drawing.name}.png"] = drawing.png
        contents[f"{drawing.name}.csv"] = drawing.csv.encode()
    with whole_file(target) as page_aside:  # written before the figures take their place
        page_aside.write_text(text, encoding="utf-8")
        with whole_folder(files) as aside:
            for name, content in contents.items():
                (aside / name).write_bytes(content)
    return target


def _check_free(target: Path, files: Path) -> None:
    """Refuse to replace anything but an earlier report."""
    if target.is_dir():
        raise OutputError(f"{target} is a folder; name another --output")
    if files.exists():
        others = [path.name for path in files.iterdir() if path.suffix not in _ENDINGS] if files.is_dir() else ["?"]
        if others:
            raise OutputError(f"{files} holds {others[0]}, which no report wrote; name another --output")
