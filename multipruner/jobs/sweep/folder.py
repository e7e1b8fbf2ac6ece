"""The folder of a sweep: appears whole, and only an earlier sweep is replaced."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from multipruner.checkpoint.run_folder import check_name
from multipruner.core.errors import OutputError

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
    target = output.absolute()
    aside, old = (target.with_name(f".{target.name}.{word}-{os.getpid()}") for word in ("partial", "old"))
    try:
        for name, content in files.items():
            path = aside / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        _carry_over(target, aside)
        if target.exists():
            target.rename(old)
        try:
            aside.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or output}: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    """What others put there; what an earlier sweep wrote goes."""
    for path in (path for path in old.rglob("*") if path.is_file()):
        name = path.relative_to(old).as_posix()
        if not (new / name).exists() and not any(fnmatch(name, ours) for ours in _OURS):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, new / name)
