"""How much of a model stays: plain values, no torch. Search, budgets and look-up tables see nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .errors import ConfigError

BlockKind = Literal["attention", "mlp"]
KINDS: tuple[BlockKind, ...] = ("attention", "mlp")
"""The residual blocks of a decoder layer, in the order in which they run."""


@dataclass(frozen=True, slots=True)
class LayerSize:
    """What one decoder layer keeps.

    Attributes:
        query_heads: query heads; 0 means the layer has no attention block.
        kv_heads: KV heads; divides ``query_heads``.
        channels: MLP intermediate size; 0 means the layer has no MLP block.

    Raises:
        ConfigError: for negative sizes or KV heads that do not divide the query heads.
    """

    query_heads: int
    kv_heads: int
    channels: int

    def __post_init__(self) -> None:
        if min(self.query_heads, self.kv_heads, self.channels) < 0:
            raise ConfigError(f"layer sizes must not be negative: {self}")
        if (self.query_heads == 0) != (self.kv_heads == 0):
            raise ConfigError(f"query heads and KV heads must vanish together: {self}")
        if self.kv_heads and self.query_heads % self.kv_heads:
            raise ConfigError(f"{self.kv_heads} KV heads do not divide {self.query_heads} query heads")

    @property
    def has_attention(self) -> bool:
        """Whether the attention block is still there."""
        return self.query_heads > 0

    @property
    def has_mlp(self) -> bool:
        """Whether the MLP block is still there."""
        return self.channels > 0

    def has(self, kind: BlockKind) -> bool:
        """Whether the block of this kind is still there."""
        return self.has_attention if kind == "attention" else self.has_mlp

    def without(self, kind: BlockKind) -> LayerSize:
        """This layer with one residual block removed."""
        if kind == "attention":
            return replace(self, query_heads=0, kv_heads=0)
        return replace(self, channels=0)

    def same_block(self, other: LayerSize, kind: BlockKind) -> bool:
        """Whether the block of this kind has the same size in this layer and in the other."""
        if kind == "mlp":
            return self.channels == other.channels
        return (self.query_heads, self.kv_heads) == (other.query_heads, other.kv_heads)


def queries_per_group(size: LayerSize) -> int:
    """Query heads that share one KV head; 0 in a layer without attention."""
    return size.query_heads // size.kv_heads if size.kv_heads else 0


@dataclass(frozen=True, slots=True)
class Structure:
    """The sizes of all decoder layers; hashable, hence the key of every memo, cache and look-up table."""

    layers: tuple[LayerSize, ...]

    @classmethod
    def uniform(cls, layers: int, query_heads: int, kv_heads: int, channels: int) -> Structure:
        """A structure whose layers are all alike, such as every dense model's.

        Args:
            layers: how many.
            query_heads, kv_heads, channels: of each, see :class:`LayerSize`.

        Raises:
            ConfigError: for sizes that no layer can have.
        """
        return cls((LayerSize(query_heads, kv_heads, channels),) * layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> LayerSize:
        return self.layers[layer]

    def __iter__(self) -> Iterator[LayerSize]:
        return iter(self.layers)

    def replace(self, layer: int, size: LayerSize) -> Structure:
        """This structure with one layer's size changed."""
        return Structure((*self.layers[:layer], size, *self.layers[layer + 1 :]))

    def count(self, kind: BlockKind) -> int:
        """How many residual blocks of this kind are left."""
        return sum(size.has(kind) for size in self.layers)

    def fits_in(self, dense: Structure) -> bool:
        """Whether every size is at most the dense model's."""
        return len(self) == len(dense) and all(
            a.query_heads <= b.query_heads and a.kv_heads <= b.kv_heads and a.channels <= b.channels
            for a, b in zip(self, dense, strict=True)
        )

    def to_json(self) -> list[list[int]]:
        """``[[query_heads, kv_heads, channels], ...]``."""
        return [[size.query_heads, size.kv_heads, size.channels] for size in self.layers]

    @classmethod
    def from_json(cls, rows: Sequence[Sequence[int]]) -> Structure:
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: for sizes that no layer can have.
            TypeError: when a row does not hold three numbers.
        """
        return cls(tuple(LayerSize(*row) for row in rows))
