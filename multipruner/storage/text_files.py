"""Files of text: compressed or not, in UTF-8 or in what their byte order mark says."""

from __future__ import annotations

import codecs
from pathlib import Path

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
"""Endings of compressed files, and what pyarrow calls their codecs."""
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def ending(path: Path) -> str:
    """Return what a file is by its name, in lower case: ``.jsonl`` for ``rows.JSONL`` and for ``rows.jsonl.gz``."""
    suffix = path.suffix.lower()
    return path.with_suffix("").suffix.lower() if suffix in COMPRESSED else suffix


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed where its name says so.

    Raises:
        OSError: when it is missing, unreadable or damaged.
        NotImplementedError: naming the codec, when this pyarrow comes without it.
    """
    codec = COMPRESSED.get(path.suffix.lower())
    if codec is None:
        return path.read_bytes()
    import pyarrow

    path.stat()  # says of a missing file what everybody says
    with pyarrow.input_stream(str(path), compression=codec) as stream:
        return stream.read()


def read_text(path: Path) -> str:
    """Return the text of a file, its byte order mark left out.

    Raises:
        OSError: when it is missing, unreadable or damaged.
        NotImplementedError: when it cannot be decompressed here.
        ValueError: when it is no text, or text in an encoding that nothing in it names.
    """
    content = read_bytes(path)
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeError as error:
        where = f" (byte {error.start:,})" if isinstance(error, UnicodeDecodeError) else ""
        raise ValueError(f"not {encoding.removesuffix('-sig').upper()}{where}; save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("it holds NUL characters: no text, or UTF-16 without a byte order mark; save it as UTF-8")
    return text
