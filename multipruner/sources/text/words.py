"""What is text, told by what it holds: letters that make words, not ids, hashes, addresses or numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

SAMPLE = 200
"""Values of a column that are looked at."""
_LONGEST_WORD = 40
_CODE = re.compile(r"(?=.*\d)[0-9a-fA-F][0-9a-fA-F-]{7,}")
"""Hexadecimal digits, as in hashes and UUIDs."""
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "HANGUL")
"""Scripts that put no blanks, or few, between words; a letter's Unicode name begins with its script."""


def sample(values: Sequence[str]) -> list[str]:
    """Return at most :data:`SAMPLE` values that are not blank, evenly spread."""
    filled = [value for value in values if value.strip()]
    return filled[:: max(1, len(filled) // SAMPLE)][:SAMPLE]


def is_prose(values: Sequence[str]) -> bool:
    """Tell whether most values are made of several words each: what a column is that needs no name to be the text."""
    looked = sample(values)
    return bool(looked) and 2 * sum(map(_several_words, looked)) > len(looked)


def has_words(values: Sequence[str]) -> bool:
    """Tell whether most values hold a word at all: the least that is asked of a column that was named."""
    looked = sample(values)
    return bool(looked) and 2 * sum(_words(value[:2000]) > 0 for value in looked) > len(looked)


def _several_words(value: str) -> bool:
    parts = value[:2000].split()
    return _words(value[:2000]) >= max(2, len(parts) // 2)


def _words(value: str) -> int:
    """Tell how many words a value holds; letters of a script without blanks count two for a word."""
    spaced = sum(map(_is_word, value.split()))
    return spaced + sum(map(_is_unspaced, value)) // 2


def _is_word(part: str) -> bool:
    if len(part) > _LONGEST_WORD or "://" in part or part.startswith("www.") or _CODE.fullmatch(part):
        return False
    return any(letter.isalpha() for letter in part)


def _is_unspaced(letter: str) -> bool:
    return letter > "\u0dff" and letter.isalpha() and unicodedata.name(letter, "").startswith(_UNSPACED)
