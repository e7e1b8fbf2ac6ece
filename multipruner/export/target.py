"""Where an export goes."""

from __future__ import annotations

from pathlib import Path


def target_of(folder: Path, output: str | Path | None, outtype: str, suffix: str) -> Path:
    """Return the place of an export: as asked, or ``FOLDER-OUTTYPE.SUFFIX`` beside the folder.

    Args:
        folder: what is exported.
        output: what was asked for, if anything.
        outtype: of the weights.
        suffix: of the format.
    """
    whole = folder.absolute()
    return Path(output) if output else whole.with_name(f"{whole.name}-{outtype}.{suffix}")
