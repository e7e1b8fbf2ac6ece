"""The folder where multipruner keeps what is costly to make again; every entry appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from multipruner.core.errors import OutputError

from .files import flush, open_to_others, scratch

ENVIRONMENT = "MULTIPRUNER_CACHE"
MARKER = "multipruner_source.json"
"""Written last into a folder: what it was made from and how large every file must be."""


def cache_folder() -> Path:
    """Return ``$MULTIPRUNER_CACHE``, or the user's cache folder for multipruner; made if missing.

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
    """Make a new folder within the cache (the same disk, so that a rename suffices), removed afterwards."""
    with scratch(cache_folder() / "work") as folder:
        yield folder


def publish_folder(made: Path, target: Path) -> bool:
    """Move a finished folder to its place, unless another process was faster.

    Returns:
        Whether ``made`` is now ``target``; ``False`` when something is there already.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    open_to_others(made)
    flush(made)
    try:
        made.rename(target)
    except OSError:
        if not target.exists():
            raise
        return False
    return True


def keep_folder(made: Path, target: Path, **about: str) -> None:
    """Give a folder that was made in the cache its place, marked as whole; one that is damaged there makes way.

    Args:
        made: the folder, on the same disk.
        target: its place.
        **about: what it was made from.
    """
    sizes = {path.relative_to(made).as_posix(): path.stat().st_size for path in made.rglob("*") if path.is_file()}
    (made / MARKER).write_text(json.dumps({**about, "sizes": sizes}, indent=1))
    if not publish_folder(made, target) and not is_whole(target):
        discard_folder(target)
        publish_folder(made, target)


def is_whole(folder: Path) -> bool:
    """Tell whether a folder that :func:`keep_folder` placed has every file at its full size."""
    try:
        sizes: dict[str, int] = json.loads((folder / MARKER).read_text())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def discard_folder(target: Path) -> None:
    """Remove a damaged entry; it loses its name at once."""
    with work_folder() as aside:
        try:
            target.rename(aside / "damaged")
        except FileNotFoundError:
            return


def file_hash(path: Path) -> str:
    """Return SHA-256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
