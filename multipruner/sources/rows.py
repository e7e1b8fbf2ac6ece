"""Rows of text for calibration and training: from the Hub through ``datasets``, or from local files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from multipruner.core.errors import CalibrationError

from .text.chat import Chat
from .text.columns import Taken, choose, listed, texts_of
from .text.files import Table, is_known, read
from .text.hub import HUB_TEXTS, hub_request, load
from .text.words import has_words

IDS = ".safetensors"
TOKENS_PER_ROW = 50
"""Rows taken from a stream are so many that this average length suffices."""


@dataclass(frozen=True)
class Rows(Sequence[str]):
    """The texts of a source in their own order, empty and repeated ones left out.

    Attributes:
        texts: the rows.
        columns: that were taken; none of running text.
        how: what conversations were rendered with; empty where there are none.
        found: rows with text, repeated ones included.
        first: how many rows are shuffled for calibration and held-out text; the others follow for moments only.
        running: whether the rows are stretches of a running text rather than texts of their own.
        refused: how many conversations the chat template refused.
    """

    texts: list[str] = field(repr=False)
    columns: tuple[str, ...]
    how: str
    found: int
    first: int
    running: bool
    refused: int = 0

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        return self.texts[place]

    def __len__(self) -> int:
        return len(self.texts)

    def to_json(self) -> dict[str, Any]:
        """What a report says of them."""
        return {
            "columns": list(self.columns),
            "rendered_with": self.how or None,
            "rows": self.found,
            "duplicates": self.found - len(self.texts),
            "refused": self.refused,
        }

    def line(self) -> str:
        """What a person is told of them."""
        parts = [f"column{'s' * (len(self.columns) > 1)} {listed(self.columns)}"] if self.columns else []
        parts += [f"rendered with {self.how}"] if self.how else []
        left = len(self.texts)
        parts.append(f"{self.found:,} {'stretches' if self.running else 'rows'}, {self.found - left:,} duplicates")
        parts += [f"{self.refused:,} refused by the template"] if self.refused else []
        return ", ".join(parts)


def rows_of(source: str, column: str | None, tokens: int, length: int, chat: Chat | None = None, more: int = 0) -> Rows:
    """The texts of a source.

    Running text is cut into stretches of about twice ``length`` tokens, so that a shuffled row is still coherent.

    Args:
        source: a name in :data:`HUB_TEXTS`, a local file or folder, or ``owner/name[:config][:split][:column]``.
        column: the column of a table that holds the text.
        tokens: how many tokens are wanted at least (bounds what is read of a stream).
        length: tokens per sequence.
        chat: renders conversations; default: as paragraphs "role: text".
        more: tokens that are wanted beside, for moments.

    Raises:
        CalibrationError: when the source does not exist, is damaged or empty, or holds nothing that is text.
        HubUnreachable: when the Hub cannot be asked and the data set is not cached.
    """
    chat, path = chat or Chat(None), Path(source).expanduser()
    if source not in HUB_TEXTS and (path.is_file() or path.is_dir()):
        texts, taken, running = _local(path, column, length, chat)
        return _rows(source, texts, taken, chat, running=running)
    request = None if is_known(Path(source)) or path.is_absolute() else hub_request(source)
    if request is None:
        known = ", ".join((*HUB_TEXTS, "self"))
        raise CalibrationError(
            f"no calibration text {source!r}: give {known}, a local file or folder, or a data set of the Hub "
            "(owner/name[:config][:split][:column])"
        )
    arguments, named = request
    limit, all_rows = (1000 + wanted // TOKENS_PER_ROW for wanted in (tokens, tokens + more))
    table = load(arguments, named or column, all_rows)
    taken = choose(table, source, named or column)
    texts = list(texts_of(table, taken, source, chat))
    if source == "wikitext2":
        return _rows(source, stretches("\n".join(texts), 8 * length), None, chat, running=True)
    return _rows(source, texts, taken, chat, limit if arguments.get("streaming") else None)


def stretches(text: str, size: int) -> list[str]:
    """A text cut into pieces of at most ``size`` characters, at line ends or else at blanks where it can be."""
    return re.findall(rf"[\s\S]{{1,{size}}}(?:\n|\Z)|[\s\S]{{1,{size}}}(?=\s)|[\s\S]{{1,{size}}}", text)


def _local(path: Path, column: str | None, length: int, chat: Chat) -> tuple[list[str], Taken | None, bool]:
    """The texts of a file, or of all files of a folder, whose tables have to have the same columns of text."""
    texts: list[str] = []
    takens: list[Taken | None] = []
    for part in read(path):
        if isinstance(part, str):
            texts += stretches("\n".join(part.splitlines()), 8 * length)
            takens.append(None)
        elif _holds_rows(part):
            takens.append(taken := choose(part, str(path), column))
            texts += texts_of(part, taken, str(path), chat)
    if len(set(takens)) > 1:
        columns = "; ".join(listed(taken.columns) for taken in dict.fromkeys(takens) if taken)
        raise CalibrationError(f"the files of {path} have text in different columns ({columns}): choose --text-column")
    return texts, takens[0] if takens else None, bool(takens) and takens[0] is None


def _holds_rows(table: Table) -> bool:
    return any(map(len, table.values()))


def _rows(
    source: str, texts: list[str], taken: Taken | None, chat: Chat, first: int | None = None, *, running: bool = False
) -> Rows:
    """Rows without those that are empty or repeated.

    Raises:
        CalibrationError: when nothing is left, or nothing of it is text.
    """
    filled = [text for text in texts if text.strip()]
    rows = list(dict.fromkeys(filled))
    if not rows and chat.refused:
        raise CalibrationError(f"the chat template refuses every row of {source}: {chat.reason}; give --chat-template")
    if not rows:
        raise CalibrationError(f"{source} is empty: it holds no text")
    if taken is None and not has_words(rows):
        raise CalibrationError(f"{source} is no text: most of it holds no words, but {rows[0].strip()[:40]!r}")
    early = sum(map(bool, map(str.strip, texts[:first])))
    count = len(rows) if first is None else len(set(filled[:early]))
    columns, how = (taken.columns, chat.how if taken.chat else "") if taken else ((), "")
    return Rows(rows, columns, how, len(filled), count, running, chat.refused)
