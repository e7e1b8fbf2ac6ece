"""The folder where multipruner keeps what is costly to make again; every entry appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from multipruner.core.errors import OutputError

ENVIRONMENT = "MULTIPRUNER_CACHE"


def cache_folder() -> Path:
    """``$MULTIPRUNER_CACHE``, or the user's cache folder for multipruner; made if missing.

    Raises:
        OutputError: when it cannot be made, or is a file.
    """
    chosen = os.environ.get(ENVIRONMENT)
    folder = Path(chosen).expanduser() if chosen else user_cache_path("multipruner")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = "it is a file" if folder.is_file() else getattr(error, "strerror", None) or error
        raise OutputError(f"{folder} cannot be the cache folder: {reason}; name another with {ENVIRONMENT}") from error
    return folder


@contextmanager
def work_folder() -> Iterator[Path]:
    """A new folder within the cache (the same disk, so that a rename suffices), removed afterwards.

    What a killed process leaves has a name of its own that nothing ever reads.
    """
    folder = cache_folder() / f".work-{uuid.uuid4().hex}"
    folder.mkdir()  # with the umask's permissions, unlike tempfile's
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(made: Path, target: Path) -> None:
    """Move a finished file to its place in the cache, on disk before it has its name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    flush(made)
    made.replace(target)


def publish_folder(made: Path, target: Path) -> bool:
    """Move a finished folder to its place, unless another process was faster.

    Returns:
        Whether ``made`` is now ``target``; ``False`` when something is there already.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in made.iterdir():
        path.chmod(made.stat().st_mode & 0o666)  # transformers writes weights that only their owner can read
        flush(path)
    try:
        made.rename(target)
    except OSError:
        if not target.exists():
            raise
        return False
    return True


def discard_folder(target: Path) -> None:
    """Remove a damaged entry; it loses its name at once."""
    with work_folder() as aside:
        try:
            target.rename(aside / "damaged")
        except FileNotFoundError:
            return


def flush(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
