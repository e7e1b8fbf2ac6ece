"""The text that says which tokens stay: counted, and a part of it held out to tell what that costs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from multipruner.core.errors import CalibrationError
from multipruner.sources.rows import rows_of
from multipruner.sources.text.chat import Chat

_HELD_OUT = 20
"""One row of so many is held out."""
_LONGEST = 1 << 16
"""Characters that are encoded at a time: some encoders take time that grows faster than the text."""
_BATCH = 256
_SAMPLE = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Hello"},
]
_SYSTEM = {"role": "system", "content": "Hello"}


@dataclass(frozen=True)
class Text:
    """A text in two parts without a common row.

    Attributes:
        counted: rows whose tokens are counted.
        held_out: rows that tell what the choice costs.
        line: what a person is told of it.
    """

    counted: Sequence[str]
    held_out: Sequence[str]
    line: str


def read_text(sources: Sequence[str], column: str | None, tokens: int, tokenizer: Any, template: str | None) -> Text:
    """Read rows of all sources and hold a twentieth of them out, spread by a fixed shuffle.

    Args:
        sources: as for calibration (:func:`.rows_of`).
        column: of tables; ``None``: found by what is in it.
        tokens: the most that is read of each source that is a stream.
        tokenizer, template: render conversations.

    Raises:
        CalibrationError: when a source cannot be read, or is too short to hold anything out.
    """
    rows: list[str] = []
    said = []
    for source in sources:
        found = rows_of(source, column, tokens, 2048, Chat(tokenizer, template))
        said.append(f"text: {source}, {found.line()}")
        rows += found
    rows = list(dict.fromkeys(rows))
    random.Random(0).shuffle(rows)
    held = rows[::_HELD_OUT]
    counted = [row for place, row in enumerate(rows) if place % _HELD_OUT]
    if not counted:
        raise CalibrationError(
            f"{', '.join(sources)}: {len(rows)} row is too little to count tokens in; give a text of many rows or lines"
        )
    return Text(counted, held, "\n".join(said))


def count_tokens(tokenizer: Any, rows: Sequence[str], progress: Callable[[int, int], None]) -> Counter[int]:
    """Return how often rows have every token, as text without special tokens around it."""
    found: Counter[int] = Counter()
    for done, ids in enumerate(encoded(tokenizer, rows), 1):
        found.update(ids)
        if done % _BATCH == 0:
            progress(done, len(rows))
    return found


def encoded(tokenizer: Any, rows: Sequence[str]) -> Iterator[list[int]]:
    """Yield the ids of rows, a list each."""
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        parts = [row[place : place + _LONGEST] for row in batch for place in range(0, max(len(row), 1), _LONGEST)]
        ids = iter(tokenizer(parts, add_special_tokens=False, verbose=False)["input_ids"])
        for row in batch:
            yield [one for _ in range(0, max(len(row), 1), _LONGEST) for one in next(ids)]


def template_ids(tokenizer: Any) -> set[int]:
    """Return the tokens that the chat templates put around what is said; none where a tokenizer has no template."""
    own = getattr(tokenizer, "chat_template", None)
    found: set[int] = set()
    for template in own.values() if isinstance(own, dict) else [own] if own else []:
        for messages in (_SAMPLE, [_SYSTEM, *_SAMPLE]):
            for prompt in (False, True):
                try:
                    said = tokenizer.apply_chat_template(
                        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
                    )
                except Exception:  # a template is a program: it raises what it likes, such as at a system's message
                    continue
                found.update(tokenizer(said, add_special_tokens=False)["input_ids"])
    return found


@dataclass(frozen=True)
class Fit:
    """How a text is told with fewer tokens.

    Attributes:
        bytes: of the text in UTF-8.
        before, after: tokens of it.
        same: tokens that are what they were, of those before.
    """

    bytes: int
    before: int
    after: int
    same: int

    def to_json(self) -> dict[str, float]:
        """Return what the record says."""
        return {
            "bytes": self.bytes,
            "tokens_before": self.before,
            "tokens_after": self.after,
            "share_as_before": self.same / max(self.before, 1),
        }


def fit(dense: Any, smaller: Any, rows: Sequence[str], numbers: Mapping[int, int]) -> Fit:
    """Compare how two tokenizers tell rows.

    Args:
        dense, smaller: the tokenizers.
        rows: of text.
        numbers: new ids by the dense ones.
    """
    size = before = after = same = 0
    for row, old, new in zip(rows, encoded(dense, rows), encoded(smaller, rows), strict=True):
        size += len(row.encode())
        before, after = before + len(old), after + len(new)
        same += sum((Counter(numbers[one] for one in old if one in numbers) & Counter(new)).values())
    return Fit(size, before, after, same)
