"""The folder of a sweep: appears whole, and only an earlier sweep is replaced."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from multipruner.checkpoint.run_folder import check_name
from multipruner.core.errors import OutputError
from multipruner.storage.files import whole_folder

RECORD = "sweep.json"
_OURS = (RECORD, "sweep.csv", "*.png", "plans/*.json", "measurements.jsonl*")


def check_free(output: Path) -> None:
    """Refuse a folder that is something else than a sweep's, before any work.

    Raises:
        OutputError: naming it.
    """
    check_name(output)
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file():
        raise OutputError(f"{output} holds something that is no sweep; choose another --output")


def write_sweep(output: Path, files: Mapping[str, bytes]) -> None:
    """Write the folder aside and give it its name; files of others in an earlier one are carried over.

    Args:
        output: the folder.
        files: contents by relative path.

    Raises:
        OutputError: when it cannot be written; what was there stays.
    """
    with whole_folder(output.absolute(), _carry_over) as aside:
        for name, content in files.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            (aside / name).write_bytes(content)


def _carry_over(old: Path, new: Path) -> None:
    """Keep what others put there; what an earlier sweep wrote goes."""
    for path in (path for path in old.rglob("*") if path.is_file()):
        name = path.relative_to(old).as_posix()
        if not (new / name).exists() and not any(fnmatch(name, ours) for ours in _OURS):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, new / name)
