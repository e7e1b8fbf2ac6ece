"""Kinds of tokenizers as ``tokenizer.json`` writes them: what a token is made of, and the model of those that stay.

Format: the Rust library ``tokenizers`` (https://huggingface.co/docs/tokenizers), ``model`` of the serialised tokenizer.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from multipruner.core.errors import UnsupportedModelError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""How tokenizers call a byte that no other token holds."""


@dataclass(frozen=True, eq=False)
class Kind(ABC):
    """The model within a tokenizer.

    Attributes:
        record: ``model`` of ``tokenizer.json``.
        marks: characters that stand for something else, such as for a blank.
    """

    record: Mapping[str, Any]
    marks: frozenset[str] = frozenset()

    @cached_property
    @abstractmethod
    def numbers(self) -> Mapping[str, int]:
        """Tokens and their ids."""

    @cached_property
    @abstractmethod
    def unknown(self) -> str | None:
        """The token for what no other token tells."""

    @cached_property
    def alphabet(self) -> Collection[str]:
        """Tokens without which some text could not be told any more: bytes, marks and the unknown token.

        Where bytes have names (``byte_fallback``), a character without a token becomes those; else every character
        that has a token keeps it.
        """
        named = [token for token in self.numbers if _BYTE.fullmatch(token)] if self.record.get("byte_fallback") else []
        single = self.marks if len(named) == 256 else [token for token in self.numbers if len(self.bare(token)) == 1]
        others = [*single, *self.marks, *([] if self.unknown is None else [self.unknown])]
        return dict.fromkeys([*named, *(token for token in others if token in self.numbers)])

    def bare(self, token: str) -> str:
        """Return a token without what marks its place in a word."""
        return token

    @abstractmethod
    def parts(self, token: str) -> Collection[str]:
        """Return the tokens that must be there so that text still becomes this one, itself included."""

    @abstractmethod
    def without(self, numbers: Mapping[str, int]) -> dict[str, Any]:
        """Return the model that has these tokens alone, under these ids."""


class BytePairs(Kind):
    """Byte-pair encoding: pairs of tokens are merged, those of the lowest rank first."""

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Tokens and their ids."""
        return self.record["vocab"]

    @cached_property
    def unknown(self) -> str | None:
        """The token for what no other token tells."""
        return self.record.get("unk_token")

    def bare(self, token: str) -> str:
        """Return a token without what marks its place in a word."""
        return token.removeprefix(self._prefix).removesuffix(self.record.get("end_of_word_suffix") or "")

    def parts(self, token: str) -> Collection[str]:
        """Return the tokens that merging the characters of this one passes through, itself included; itself alone where
        merging does not lead to it, as with special tokens.

        What a merge makes of a piece does not depend on what stands around it, as long as that is not merged with it;
        so these are the tokens that text passes through as well.
        """
        there = self._characters(token)
        found = {token, *(each for each in there if each in self.numbers)}
        while len(there) > 1:
            ranked = [(self._ranks.get(pair, _LAST), place) for place, pair in enumerate(pairwise(there))]
            rank, place = min(ranked)
            if rank == _LAST:
                break
            there[place : place + 2] = [self._merged(there[place], there[place + 1])]
            found.add(there[place])
        return found if there == [token] else {token}

    def without(self, numbers: Mapping[str, int]) -> dict[str, Any]:
        """Return the model with these tokens, and with the merges that lead from some of them to another."""
        kept = [
            merge
            for merge, (left, right) in zip(self.record["merges"], self._pairs, strict=True)
            if left in numbers and right in numbers and self._merged(left, right) in numbers
        ]
        return {**self.record, "vocab": dict(sorted(numbers.items(), key=lambda each: each[1])), "merges": kept}

    @cached_property
    def _pairs(self) -> list[tuple[str, str]]:
        pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in self.record["merges"])
        return [(left, right) for left, right in pairs]

    @cached_property
    def _ranks(self) -> dict[tuple[str, str], int]:
        return {pair: rank for rank, pair in reversed(list(enumerate(self._pairs)))}

    @property
    def _prefix(self) -> str:
        return self.record.get("continuing_subword_prefix") or ""

    def _characters(self, token: str) -> list[str]:
        """Return what merging begins with: characters, marked with their place in a word where the model does that."""
        suffix = self.record.get("end_of_word_suffix") or ""
        inner = bool(self._prefix) and token.startswith(self._prefix)
        ends = bool(suffix) and token.endswith(suffix)
        found = [
            f"{self._prefix if inner or place else ''}{character}" for place, character in enumerate(self.bare(token))
        ]
        if ends and found:
            found[-1] += suffix
        return found

    def _merged(self, left: str, right: str) -> str:
        return left + right.removeprefix(self._prefix)


_LAST = 1 << 62


class Pieces(Kind):
    """Unigram (SentencePiece): the likeliest way to cut a text into pieces; every piece stands for itself."""

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Tokens and their ids."""
        return {piece: number for number, (piece, _) in enumerate(self.record["vocab"])}

    @cached_property
    def unknown(self) -> str | None:
        """The token for what no other token tells."""
        place = self.record.get("unk_id")
        return None if place is None else self.record["vocab"][place][0]

    def parts(self, token: str) -> Collection[str]:
        """Return the piece itself, and its characters: what it is made of where it is not the likeliest."""
        return {token, *(character for character in token if character in self.numbers)}

    def without(self, numbers: Mapping[str, int]) -> dict[str, Any]:
        """Return the model with these pieces and their scores. Ids are places in a list, so that pieces of tokens that
        were added elsewhere come first or last, as before.
        """
        ordered = sorted(numbers, key=lambda piece: numbers[piece])
        if [numbers[piece] for piece in ordered] != list(range(len(ordered))):
            raise UnsupportedModelError("pieces of a Unigram tokenizer have ids between those of added tokens")
        scores = dict(self.record["vocab"])
        place = None if self.unknown is None else numbers[self.unknown]
        return {**self.record, "vocab": [[piece, scores[piece]] for piece in ordered], "unk_id": place}


KINDS: dict[str, type[Kind]] = {"BPE": BytePairs, "Unigram": Pieces}
"""By ``model.type``."""


def kind_of(record: Mapping[str, Any], name: str) -> Kind:
    """Return what a tokenizer is, from what ``tokenizer.json`` holds.

    Args:
        record: that.
        name: what to call the model in errors.

    Raises:
        UnsupportedModelError: for a kind that has no row.
    """
    kind = record["model"].get("type")
    if kind not in KINDS:
        raise UnsupportedModelError(
            f"the tokenizer of {name} is of the kind {kind}; its vocabulary can be cut for {', '.join(KINDS)}"
        )
    return KINDS[kind](
        record["model"], _marks([record.get(name) for name in ("normalizer", "pre_tokenizer", "decoder")])
    )


def _marks(steps: Any) -> frozenset[str]:
    """Return characters beyond ASCII that steps before and after the model speak of: they mean something to them, which
    their bytes do not."""
    if isinstance(steps, str):
        return frozenset(character for character in steps if not character.isascii())
    inner = steps.values() if isinstance(steps, Mapping) else steps if isinstance(steps, list) else ()
    return frozenset().union(*map(_marks, inner))
