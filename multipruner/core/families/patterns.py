"""How a configuration says which layers have which kinds of blocks, and sizes in words of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from multipruner.core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Pattern:
    """Which layers have a block of one kind and which of another, as a configuration says it.

    Attributes:
        keys: of the configuration that say so.
        kinds: the kind of the layers for which ``first`` is true, and that of the others.
        first: (the keys' values, number of a layer) -> whether it has a block of the first kind.
        said: of layers that are left, in order, whether they have the first kind -> what the keys say of them.
    """

    keys: tuple[str, ...]
    kinds: tuple[str, str]
    first: Callable[[Mapping[str, Any], int], bool]
    said: Callable[[Sequence[bool]], Mapping[str, Any]]

    def kind(self, values: Mapping[str, Any], layer: int) -> str:
        """Return the kind of those it tells apart that a layer has."""
        return self.kinds[not self.first(values, layer)]

    def telling(self, kinds: Sequence[str]) -> Mapping[str, Any]:
        """Return what the keys say of layers that are left, of these kinds, in order."""
        return self.said([kind == self.kinds[0] for kind in kinds])

    def renamed(self, names: Mapping[str, str]) -> Pattern:
        """Return the same of kinds of which some have other names."""
        first, other = (names.get(kind, kind) for kind in self.kinds)
        return replace(self, kinds=(first, other))


@dataclass(frozen=True, slots=True)
class Listed:
    """Which layers have a block of which kind, where a configuration lists a word for every layer.

    Attributes:
        key: of the list.
        words: what it calls a layer -> the kind of its block.
    """

    key: str
    words: Mapping[str, str] = field(hash=False)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of the configuration that say so."""
        return (self.key,)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that it tells apart."""
        return tuple(self.words.values())

    def kind(self, values: Mapping[str, Any], layer: int) -> str:
        """Return the kind of those it tells apart that a layer has.

        Raises:
            ConfigError: when the row has no block for it.
        """
        word = values[self.key][layer]
        if word not in self.words:
            raise ConfigError(
                f"{self.key} of layer {layer} is {word!r}: of this family only layers of {', '.join(self.words)} can "
                "be pruned"
            )
        return self.words[word]

    def telling(self, kinds: Sequence[str]) -> Mapping[str, Any]:
        """Return what the keys say of layers that are left, of these kinds, in order."""
        words = {kind: word for word, kind in self.words.items()}
        return {self.key: [words[kind] for kind in kinds]}

    def renamed(self, names: Mapping[str, str]) -> Listed:
        """Return the same of kinds of which some have other names."""
        return replace(self, words={word: names.get(kind, kind) for word, kind in self.words.items()})


@dataclass(frozen=True, slots=True)
class Wording:
    """Settings that change what another key of a configuration means.

    Attributes:
        keys: of the configuration, all that it reads.
        plain: the keys' values -> what is to be said in the place of some of them, so that every key means what it
            says; nothing where it does already.
    """

    keys: tuple[str, ...]
    plain: Callable[[Mapping[str, Any]], Mapping[str, Any]]
