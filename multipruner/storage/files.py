"""Files and folders that appear whole or not at all, with the permissions that the umask gives.

What is being written lies beside its place, in a folder ``.NAME.partial-HOST-PID-TOKEN``; a folder that is replaced is
called ``.NAME.old-...`` meanwhile. Killed processes leave such names behind, and :func:`sweep` removes them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from multipruner.core.errors import OutputError, UnknownModelError

DAY = 24 * 60 * 60
_MARK = re.compile(r"\.(?P<name>.+)\.(?P<what>partial|old)-(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}")
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_FULL = (errno.ENOSPC, errno.EDQUOT)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a text (UTF-8) or bytes.

    Raises:
        OutputError: when the file cannot be written; what was there stays, and nothing else is left.
    """
    with whole_file(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; the file takes its name at the end, on disk by then.

    Raises:
        OutputError: when it cannot be written; what was there stays, and nothing else is left.
    """
    with output_errors(path), scratch(path) as folder:
        yield folder / path.name
        publish(folder / path.name, path)


@contextmanager
def whole_folder(target: Path, carry: Callable[[Path, Path], object] | None = None) -> Iterator[Path]:
    """Give a folder to write to; it takes its name at the end, in place of an earlier one.

    Args:
        target: the folder.
        carry: called with the earlier folder and the new one, to bring along what shall stay.

    Raises:
        OutputError: when it cannot be written; what was there stays, and nothing else is left.
    """
    with output_errors(target), scratch(target) as made:
        yield made
        open_to_others(made)
        if carry is not None and target.exists():
            carry(target, made)
        flush(made)
        _take_name(made, target)


@contextmanager
def scratch(place: Path) -> Iterator[Path]:
    """Make a new folder beside a place, removed afterwards; first goes what killed processes left there."""
    place.parent.mkdir(parents=True, exist_ok=True)
    sweep(place.parent)
    folder = _aside(place, "partial")
    folder.mkdir()  # with the umask's permissions, unlike tempfile's
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn what a disk can do to us into one line.

    Raises:
        OutputError: naming the target and the reason.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in _FULL or any(f"os error {code}" in str(error) for code in _FULL)
        reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
        place = getattr(error, "filename", None)
        in_the_way = f": {place}" if place and Path(place).absolute() in target.absolute().parents else ""
        raise OutputError(f"cannot write {target}: {reason}{in_the_way}") from error


def publish(made: Path, target: Path) -> None:
    """Move a finished file to its place, from a folder on the same disk; it is on disk before it has its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    made.chmod(made.parent.stat().st_mode & 0o666)
    flush(made)
    made.replace(target)
    _flush_one(target.parent)


def open_to_others(folder: Path) -> None:
    """Give all files the permissions of their folder: transformers writes weights that only their owner can read."""
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(folder.stat().st_mode & 0o666)


def flush(path: Path) -> None:
    """Wait until a file, or a folder with all that is in it, is on disk."""
    for one in (*path.rglob("*"), path):
        if one.exists():  # a link may lead nowhere
            _flush_one(one)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network disks know no such thing for folders
            raise
    finally:
        os.close(descriptor)


def _take_name(made: Path, target: Path) -> None:
    """Rename into place; an old folder steps aside first and comes back if that fails."""
    old = _aside(target, "old")
    if target.exists():
        target.rename(old)
    try:
        made.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    _flush_one(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _aside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}-{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder: names with our mark, without a process, untouched for a day.

    An earlier folder that had stepped aside goes only where another one has its name.
    """
    with suppress(OSError):  # another process may sweep as well
        for path in folder.iterdir():
            mark = _MARK.fullmatch(path.name)
            if mark is None or (mark["host"] == _HOST and _runs(int(mark["pid"]))):
                continue
            needed = mark["what"] == "old" and not path.with_name(mark["name"]).exists()
            if not needed and time.time() - _touched(path) > DAY:
                shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    """Tell whether there is such a process on this machine; always, where one cannot ask without harm."""
    try:
        if os.name == "posix":
            os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _touched(folder: Path) -> float:
    """Tell when something in a folder was last written, in seconds since the epoch."""
    return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))


def path_of(model: str) -> Path:
    """Return a model's name as a path, whatever it names.

    Raises:
        UnknownModelError: when it can be no path and no Hub id.
    """
    try:
        path = Path(model).expanduser()
        path.exists()  # what no file system takes, such as a name that is too long, fails here
    except (OSError, ValueError, RuntimeError) as error:
        raise UnknownModelError(f"{model[:60]!r} cannot be a path or a Hub id: {error}") from None
    if not model.strip():
        raise UnknownModelError("the model's name is empty; give a recipe, a folder, a .gguf file or a Hub id")
    return path
