"""Rows of text for calibration and training: from the Hub through ``datasets``, or from local files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

from multipruner.config.choices import TEXTS, Text, listed_texts, loaded
from multipruner.core.errors import CalibrationError, did_you_mean

from .text.chat import Chat
from .text.columns import Taken, choose, listed, texts_of
from .text.files import Table, is_known, read
from .text.hub import hub_request, load
from .text.words import has_words

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
        """Return what a report says of them."""
        return {
            "columns": list(self.columns),
            "rendered_with": self.how or None,
            "rows": self.found,
            "duplicates": self.found - len(self.texts),
            "refused": self.refused,
        }

    def line(self) -> str:
        """Return what a person is told of them."""
        parts = [f"column{'s' * (len(self.columns) > 1)} {listed(self.columns)}"] if self.columns else []
        parts += [f"rendered with {self.how}"] if self.how else []
        left = len(self.texts)
        parts.append(f"{self.found:,} {'stretches' if self.running else 'rows'}, {self.found - left:,} duplicates")
        parts += [f"{self.refused:,} refused by the template"] if self.refused else []
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of a source of rows.

    Attributes:
        column: of a table that holds the text; ``None``: found by what is in it.
        tokens: how many are wanted at least (bounds what is read of a stream).
        length: tokens per sequence. Running text is cut into stretches of about twice as many, so that a shuffled row
            is still coherent.
        chat: renders conversations.
        more: tokens that are wanted beside, for moments.
    """

    column: str | None
    tokens: int
    length: int
    chat: Chat
    more: int = 0


def kind_of(source: str) -> Text:
    """Return the row of ``TEXTS`` that a source belongs to: that of its name, or the first that takes it.

    Raises:
        CalibrationError: naming the closest source, and all that there are.
    """
    if source in TEXTS and TEXTS[source].takes is None:
        return TEXTS[source]
    for row in TEXTS.values():
        if row.takes is not None and loaded(row.takes)(source):
            return row
    named = [name for name, row in TEXTS.items() if row.takes is None]
    raise CalibrationError(
        f"no calibration text {source!r}{did_you_mean(source, named)}: give {listed_texts(TEXTS, brief=True)}; "
        "a data set of the Hub is owner/name[:config][:split][:column]"
    )


def rows_of(source: str, column: str | None, tokens: int, length: int, chat: Chat | None = None, more: int = 0) -> Rows:
    """Return the texts of a source.

    Args:
        source: a name in ``TEXTS``, a local file or folder, or ``owner/name[:config][:split][:column]``.
        column, tokens, length, chat, more: see :class:`Wanted`; without a chat, conversations become paragraphs
            "role: text".

    Raises:
        CalibrationError: when the source does not exist, is damaged or empty, or holds nothing that is text.
        HubUnreachable: when the Hub cannot be asked and the data set is not cached.
    """
    row = kind_of(source)
    if row.by is None or row.ids:
        raise CalibrationError(f"{source} gives no rows of text; give {listed_texts(TEXTS, brief=True, ids=False)}")
    return loaded(row.by)(source, Wanted(column, tokens, length, chat or Chat(None), more), **row.options)


def is_local(source: str) -> bool:
    """Tell whether a source is a file or folder that is there."""
    path = Path(source).expanduser()
    return path.is_file() or path.is_dir()


def of_files(source: str, wanted: Wanted) -> Rows:
    """Read rows of a file, or of all files of a folder."""
    path, chat = Path(source).expanduser(), wanted.chat
    texts, taken, running = _local(path, wanted.column, wanted.length, chat)
    return _rows(source, texts, taken, chat, running=running)


def is_data_set(source: str) -> bool:
    """Tell whether a source is written as a data set of the Hub, and not as a file."""
    path = Path(source).expanduser()
    return not is_known(Path(source)) and not path.is_absolute() and hub_request(source) is not None


def of_data_set(source: str, wanted: Wanted) -> Rows:
    """Read rows of any data set of the Hub, which is streamed."""
    request = hub_request(source)
    assert request is not None, "it was taken for one"
    arguments, column = request
    return _loaded(source, arguments, column, wanted)


def of_named_set(source: str, wanted: Wanted, *, running: bool = False, **arguments: Any) -> Rows:
    """Read rows of a data set with a name of its own: the column ``text`` of its train split.

    Args:
        source: its name.
        wanted: what is asked.
        running: whether its rows are lines of a running text.
        arguments: what ``datasets.load_dataset`` is asked for.
    """
    return _loaded(source, {"split": "train", **arguments}, "text", wanted, running=running)


def of_texts(source: str, texts: Iterable[str]) -> Rows:
    """Make rows of texts that a source of its own has made.

    Raises:
        CalibrationError: when there are none, or they hold no words.
    """
    return _rows(source, list(texts), None, Chat(None))


def _loaded(
    source: str, arguments: dict[str, Any], column: str | None, wanted: Wanted, *, running: bool = False
) -> Rows:
    """Read rows through ``datasets``, as many as are wanted where they are streamed."""
    column, chat = column or wanted.column, wanted.chat
    limit, every = (1000 + tokens // TOKENS_PER_ROW for tokens in (wanted.tokens, wanted.tokens + wanted.more))
    table = load(arguments, column, every)
    taken = choose(table, source, column)
    texts = list(texts_of(table, taken, source, chat))
    if running:
        return _rows(source, stretches("\n".join(texts), 8 * wanted.length), None, chat, running=True)
    return _rows(source, texts, taken, chat, limit if arguments.get("streaming") else None)


def stretches(text: str, size: int) -> list[str]:
    """Return a text cut into pieces of at most ``size`` characters, at line ends or else at blanks where it can be."""
    return re.findall(rf"[\s\S]{{1,{size}}}(?:\n|\Z)|[\s\S]{{1,{size}}}(?=\s)|[\s\S]{{1,{size}}}", text)


def _local(path: Path, column: str | None, length: int, chat: Chat) -> tuple[list[str], Taken | None, bool]:
    """Return the texts of a file, or of all files of a folder, whose tables have to have the same columns of text."""
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
    """Leave out rows that are empty or repeated.

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
