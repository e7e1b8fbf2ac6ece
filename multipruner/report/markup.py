"""Names of others in Markdown: as text, as code, in commands, without what they might do or tell."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

_FRONT = re.compile(r"\A---\n(.*?)^---\n", re.DOTALL | re.MULTILINE)
_SPECIAL = re.compile(r"([\\`*\[\]<>|#~])|(?<!\w)_|_(?!\w)")


def one_line(text: Any) -> str:
    """Return a name on one line, whatever line breaks and control characters it has."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in str(text)).split())


def plain(text: Any) -> str:
    """Return a name as Markdown that shows it and does nothing else; also in a table."""
    return _SPECIAL.sub(lambda found: "\\" + found[0], one_line(text)).replace("\\<", "&lt;").replace("\\>", "&gt;")


def code(text: Any) -> str:
    """Return a name as code inside a line or a table."""
    said = one_line(text).replace("|", "¦")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", said)), default=0))
    room = " " if said.startswith("`") or said.endswith("`") else ""
    return f"{fence}{room}{said}{room}{fence}"


def fenced(text: str, language: str = "") -> str:
    """Return lines as a block of code."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def front_matter(card: str) -> tuple[str | None, str]:
    """Return the metadata at the beginning of a card (``None`` where there is none), and the rest."""
    found = _FRONT.match(card)
    return (found[1], card[found.end() :]) if found else (None, card)


def without_places(value: Any) -> Any:
    """Return a recipe or a part of one, with the last part of every absolute path instead of it."""
    if isinstance(value, Mapping):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    return _placeless(value) if isinstance(value, str) else value


def command_without_places(command: str) -> str:
    """Return a command line that does not say where on somebody's disk things lie."""
    try:
        words = shlex.split(command)
    except ValueError:
        return one_line(command)
    return one_line(shlex.join("=".join(map(_placeless, word.split("=", 1))) for word in words))


def _placeless(text: str) -> str:
    windows = PureWindowsPath(text)
    if text.startswith(("/", "~")) or windows.is_absolute():
        return (windows if windows.drive else PurePosixPath(text)).name or text
    return text
