"""Which columns of a table are the text, told by what they hold, and the text of every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from multipruner.core.errors import CalibrationError, did_you_mean

from .chat import Chat, Messages, messages_of
from .files import Table
from .words import SAMPLE, has_words, is_prose

Kind = Literal["prose", "words", "strings", "mixed", "chat", "nested", "nothing", "values"]
"""Texts of several words; of words; of neither; texts and numbers; conversations; lists or objects; empty; numbers."""
_CONVERSATIONS = ("messages", "conversations", "conversation")
_ASKED = ("prompt", "instruction", "question", "query")
_ABOUT = ("input", "context")
"""Beside an instruction: what it is about."""
_ANSWERED = ("completion", "response", "output", "answer")
_SYSTEM = ("system", "system_prompt")
_OTHERWISE: dict[Kind, str] = {
    "nested": ": it holds lists or objects",
    "nothing": ": it is empty",
    "mixed": ": it holds numbers among its texts",
    "values": ": it holds no texts",
}


@dataclass(frozen=True)
class Taken:
    """The columns that were taken.

    Attributes:
        columns: their names; of a pair, what is asked and what is answered (after the system's words, where there are).
        chat: whether they make conversations.
    """

    columns: tuple[str, ...]
    chat: bool


def choose(table: Table, source: str, wanted: str | None = None) -> Taken:
    """Return the columns of a table that are its text.

    The one named; else ``text``; else conversations; else a pair of question and answer; else the only column of
    prose, unless lists or objects stand beside it, which may be the text as well.

    Raises:
        CalibrationError: listing the columns that could be, when none of them clearly is.
    """
    kinds: dict[str, Kind] = {name: _kind(values) for name, values in table.items()}
    if wanted is not None:
        if kinds.get(wanted) in ("prose", "words", "chat"):
            return Taken((wanted,), kinds[wanted] == "chat")
        raise CalibrationError(f"{source} has no text column {wanted!r}{_why(table, kinds, wanted)}; {_could(kinds)}")
    names = {name.lower(): name for name in reversed(kinds)}
    if (text := names.get("text")) and kinds[text] in ("prose", "words", "chat"):
        return Taken((text,), kinds[text] == "chat")
    chats = [name for name, kind in kinds.items() if kind == "chat"]
    for name in _CONVERSATIONS:
        if names.get(name) in chats:
            return Taken((names[name],), True)
    if pair := _pair(names, kinds):
        return Taken(pair, True)
    if len(chats) == 1:
        return Taken((chats[0],), True)
    prose = [name for name, kind in kinds.items() if kind == "prose"]
    nested = [name for name, kind in kinds.items() if kind in ("nested", "chat")]
    if len(prose) == 1 and not nested:
        return Taken((prose[0],), False)
    mixed = [name for name, kind in kinds.items() if kind == "mixed"]
    beside = f" (lists or objects: {listed(nested)})" if nested else ""
    beside += f" (numbers among the texts: {listed(mixed)})" if mixed else ""
    raise CalibrationError(f"{source} has no column that is clearly the text{beside}; {_could(kinds)}")


def texts_of(table: Table, taken: Taken, source: str, chat: Chat) -> Iterator[str]:
    """Yield the text of every row that has one.

    Raises:
        CalibrationError: naming the row that cannot be text.
    """
    columns = [table[name] for name in taken.columns]
    if len(set(map(len, columns))) > 1:
        raise CalibrationError(f"{source}: the columns {listed(taken.columns)} are of different lengths")
    for number, values in enumerate(zip(*columns, strict=True), 1):
        if any(value is None for value in values[-2:]):
            continue
        text = values[0]
        if taken.chat:
            messages = _conversation(values, taken.columns)
            if messages is None:
                raise CalibrationError(
                    f"row {number:,} of {listed(taken.columns)} in {source} is no conversation: lists of "
                    "role and content (or from and value) are expected"
                )
            text = chat.render(messages) if messages else ""
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise CalibrationError(f"row {number:,} of {source} holds half of a character (a lone surrogate): no text")
        yield text


def listed(names: Sequence[str]) -> str:
    """Return names of columns for one line, whatever they are made of."""
    shown = [name if name.isprintable() else repr(name) for name in names[:20]]
    return ", ".join([*shown, *(["..."] if len(names) > 20 else [])])


def _kind(values: Sequence[Any]) -> Kind:
    filled = [value for value in values if value is not None]
    if not filled or all(isinstance(value, str) and not value.strip() for value in filled):
        return "nothing"
    if all(isinstance(value, str) for value in filled):
        return "prose" if is_prose(filled) else "words" if has_words(filled) else "strings"
    if not any(isinstance(value, list | dict) for value in filled):
        return "mixed" if any(isinstance(value, str) for value in filled) else "values"
    found = [messages_of(value) for value in filled[:: max(1, len(filled) // SAMPLE)]]
    said = [message["content"] for messages in found if messages for message in messages]
    return "chat" if None not in found and has_words(said) else "nested"


def _pair(names: dict[str, str], kinds: dict[str, Kind]) -> tuple[str, ...] | None:
    """Return the columns of question and answer, where there is one of each."""
    spoken = ("prose", "words", "chat")
    asked = [names[name] for name in _ASKED if name in names and kinds[names[name]] in spoken]
    about = [names[name] for name in _ABOUT if name in names and kinds[names[name]] in ("prose", "words", "strings")]
    asked = asked or about[:1]
    answered = [names[name] for name in _ANSWERED if name in names and kinds[names[name]] in (*spoken, "strings")]
    if len(asked) != 1 or len(answered) != 1:
        return None
    system = [names[name] for name in _SYSTEM if name in names and kinds[names[name]] in ("prose", "words")]
    return (*system[:1], *[name for name in about[:1] if name != asked[0]], asked[0], answered[0])


def _conversation(values: Sequence[Any], columns: Sequence[str]) -> Messages | None:
    """Return a row as messages: one conversation, or what is asked and answered."""
    if len(values) == 1:
        return messages_of(values[0])
    *before, asked, answered = values
    told: Messages = []
    for name, value in zip(columns, before, strict=False):
        if isinstance(value, str) and value.strip():
            if name.lower() in _SYSTEM:
                told = [{"role": "system", "content": value}]
            elif isinstance(asked, str) and asked.strip():
                asked = f"{asked}\n\n{value}"
    sides = [_said(asked, "user"), _said(answered, "assistant")]
    if sides[0] is None or sides[1] is None:
        return None
    return [*told, *sides[0], *sides[1]] if sides[0] and sides[1] else []


def _said(value: Any, role: str) -> Messages | None:
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value.strip() else []
    return messages_of(value)


def _could(kinds: dict[str, Kind]) -> str:
    """Return what ``--text-column`` may name."""
    could = [name for name, kind in kinds.items() if kind in ("prose", "chat")]
    could = could or [name for name, kind in kinds.items() if kind == "words"]
    return f"columns with text: {listed(could) or 'none'}; choose with --text-column"


def _why(table: Table, kinds: dict[str, Kind], wanted: str) -> str:
    if wanted not in kinds:
        return did_you_mean(wanted, kinds)
    if kinds[wanted] == "strings":
        first = next(value for value in table[wanted] if isinstance(value, str) and value.strip())
        return f": it holds no words, but {first[:40]!r} and its like"
    return _OTHERWISE.get(kinds[wanted], "")
