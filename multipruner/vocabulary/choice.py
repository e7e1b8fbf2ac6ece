"""Which tokens stay: what must, then what a text has most often, with all that it is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from multipruner.core.errors import ConfigError

from .kinds import Kind

_RARE = 0.001
"""Share of a text's characters that are not what it is made of, such as names in other scripts."""


@dataclass(frozen=True)
class Choice:
    """Tokens that stay.

    Attributes:
        ids: their ids in the dense tokenizer, ascending: the new ids are the places in it.
        needed: how many of them stay whatever the text.
        seen: how many of them the text has.
    """

    ids: tuple[int, ...]
    needed: int
    seen: int

    @property
    def numbers(self) -> dict[int, int]:
        """New ids by the dense ones."""
        return {old: new for new, old in enumerate(self.ids)}


def choose(kind: Kind, counts: Mapping[int, int], needed: Collection[int], tokens: int | None, multiple: int) -> Choice:
    """Choose tokens by how often a text has them.

    A token comes with all that merging passes through on the way to it, so that text still becomes it. One that does
    not fit any more with its parts is left out, and a rarer one that does may come in its place. Places that are left
    over are filled in the dense order, which is that of merges and so about that of frequency: first with tokens of
    characters that the text is made of.

    Args:
        kind: the dense tokenizer's model.
        counts: how often the text has a token, by id.
        needed: ids that stay whatever the text, without the alphabet.
        tokens: how many stay; ``None``: all that the text has.
        multiple: the number is raised to a multiple of this, where there are so many.

    Raises:
        ConfigError: when more tokens are needed than shall stay.
    """
    numbers = kind.numbers
    names = {number: token for token, number in numbers.items()}

    def with_parts(number: int) -> set[int]:
        token = names.get(number)
        return {number} if token is None else {number, *(numbers[part] for part in kind.parts(token))}

    kept: set[int] = {numbers[token] for token in kind.alphabet}
    for number in needed:
        kept |= with_parts(number)
    least = len(kept)
    every = len(kept | set(numbers.values()))
    if tokens is not None and tokens < least:
        raise ConfigError(
            f"{tokens:,} tokens are too few: {least:,} stay whatever the text (bytes, characters without bytes, "
            "special and added tokens, what the chat template and the configuration name, and their parts)"
        )
    most = every if tokens is None else min(_raised(tokens, multiple), every)
    _add(
        kept, sorted((one for one in counts if counts[one] > 0), key=lambda one: (-counts[one], one)), with_parts, most
    )
    most = min(_raised(len(kept) if tokens is None else most, multiple), every)
    common = _common_characters({names[one]: count for one, count in counts.items() if one in names})
    _add(kept, sorted(numbers.values(), key=lambda one: (not common.issuperset(names[one]), one)), with_parts, most)
    return Choice(tuple(sorted(kept)), least, sum(counts.get(number, 0) > 0 for number in kept))


def _add(kept: set[int], candidates: Sequence[int], with_parts: Callable[[int], set[int]], most: int) -> None:
    """Add candidates with their parts, in order, as long as there is room."""
    for number in candidates:
        if len(kept) >= most:
            return
        if number not in kept and len(kept) + len(more := with_parts(number) - kept) <= most:
            kept |= more


def _common_characters(counts: Mapping[str, int]) -> set[str]:
    """Return the characters that nearly all of a text is made of, from how often it has every token."""
    found = Counter[str]()
    for token, count in counts.items():
        found.update(dict.fromkeys(token, count))
    left, common = _RARE * found.total(), set(found)
    for character, count in reversed(found.most_common()):
        left -= count
        if left < 0:
            break
        common.discard(character)
    return common


def _raised(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
