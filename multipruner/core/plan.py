"""Which parts of a model stay: plain values, no torch.

A ``Ranking`` turns a ``Structure`` into a ``PruningPlan``, which alone is enough to cut the dense model again, bit for
bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

from .errors import ConfigError
from .structure import LayerSize, Structure, queries_per_group

PLAN_FORMAT = "multipruner-plan"
PLAN_VERSION = 1
LARGEST = 10_000_000
"""What every index is below: a damaged file shall not fill the memory."""


@dataclass(frozen=True, slots=True)
class LayerRanking:
    """Most important first: KV groups, MLP channels and query heads of one dense layer, in the dense numbering.

    Attributes:
        kv_groups: of the layer.
        channels: of the layer.
        query_heads: for every KV group, by its number, the query heads in it; empty: each group's in the dense order.
    """

    kv_groups: tuple[int, ...]
    channels: tuple[int, ...]
    query_heads: tuple[tuple[int, ...], ...] = ()

    def heads(self, full: LayerSize, groups: int | None = None, per_group: int | None = None) -> tuple[int, ...]:
        """Query heads group by group: the first of every group, in the first groups, both most important first.

        Args:
            full: the dense layer.
            groups, per_group: how many KV groups, and how many query heads of each; all where nothing is given.
        """
        whole = queries_per_group(full)
        inside = self.query_heads or [range(group * whole, (group + 1) * whole) for group in range(full.kv_heads)]
        return tuple(head for group in self.kv_groups[:groups] for head in inside[group][:per_group])


@dataclass(frozen=True, slots=True)
class Ranking:
    """Nested orders for every layer: any width is a prefix of one ranking, and of one in every KV group that stays."""

    layers: tuple[LayerRanking, ...]

    @classmethod
    def identity(cls, dense: Structure) -> Ranking:
        """The dense model's own order (the paper's "no reordering")."""
        return cls(tuple(LayerRanking(tuple(range(s.kv_heads)), tuple(range(s.channels))) for s in dense.layers))


@dataclass(frozen=True, slots=True)
class KeptLayer:
    """Sorted indices, in the dense numbering, of what one decoder layer keeps."""

    query_heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def size(self) -> LayerSize:
        """How much that is."""
        return LayerSize(len(self.query_heads), len(self.kv_heads), len(self.channels))


def _encode(indices: Sequence[int]) -> str:
    """Sorted indices as ranges: ``(0, 1, 2, 7)`` becomes ``"0-2,7"``."""
    runs = []
    for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0]):
        members = [index for _, index in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ",".join(runs)


def _decode(text: str) -> tuple[int, ...]:
    """The inverse of :func:`_encode`."""
    indices: list[int] = []
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        if int(last or first) >= LARGEST:
            raise ValueError(f"index {last or first} is too large")
        indices.extend(range(int(first), int(last or first) + 1))
    return tuple(indices)


@dataclass(frozen=True, slots=True)
class PruningPlan:
    """Which heads and channels of which dense model stay. Stands alone: plan + dense weights => pruned model.

    Attributes:
        model: what the dense model was loaded from (Hub id or source name).
        revision: its revision, or ``None``.
        fingerprint: SHA-256 of the dense weights, or ``None`` when unknown.
        model_type: ``config.model_type`` of the dense model.
        dense: the dense structure.
        layers: kept indices per dense layer, in the dense numbering.

    Raises:
        ConfigError: when indices are unsorted, out of range, or KV groups keep unequal numbers of query heads.
    """

    model: str
    revision: str | None
    fingerprint: str | None
    model_type: str
    dense: Structure
    layers: tuple[KeptLayer, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.dense):
            raise ConfigError(f"plan has {len(self.layers)} layers, the dense model {len(self.dense)}")
        for number, (kept, full) in enumerate(zip(self.layers, self.dense, strict=True)):
            _check_layer(number, kept, full)

    @property
    def structure(self) -> Structure:
        """The sizes that this plan leads to."""
        return Structure(tuple(kept.size for kept in self.layers))

    @classmethod
    def from_structure(
        cls,
        structure: Structure,
        ranking: Ranking,
        dense: Structure,
        *,
        model: str,
        model_type: str,
        revision: str | None = None,
        fingerprint: str | None = None,
    ) -> PruningPlan:
        """Keep the most important groups and channels that a structure has room for.

        Args:
            structure: how much stays.
            ranking: the order of every dense layer's parts.
            dense: the dense model's structure.
            model, model_type, revision, fingerprint: of the dense model, see :class:`PruningPlan`.

        Raises:
            ConfigError: when a layer does not fit, or asks for more query heads per KV group than there are.
        """
        if not structure.fits_in(dense):
            raise ConfigError("the structure is larger than the dense model somewhere")
        layers = tuple(
            _keep(number, size, rank, full)
            for number, (size, rank, full) in enumerate(zip(structure, ranking.layers, dense, strict=True))
        )
        return cls(model, revision, fingerprint, model_type, dense, layers)

    def to_json(self) -> str:
        """JSON text, the same bytes for the same plan."""
        record = {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION,
            "base_model": {
                "name": self.model,
                "revision": self.revision,
                "fingerprint": self.fingerprint,
                "model_type": self.model_type,
            },
            "dense": self.dense.to_json(),
            "layers": [
                {
                    "query_heads": _encode(kept.query_heads),
                    "kv_heads": _encode(kept.kv_heads),
                    "channels": _encode(kept.channels),
                }
                for kept in self.layers
            ],
        }
        return json.dumps(record, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: when the text is no plan, or one of a newer format.
        """
        try:
            return cls._from_record(json.loads(text))
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ConfigError(f"not a pruning plan: {error!r}") from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> PruningPlan:
        if record.get("format") != PLAN_FORMAT or record.get("version") != PLAN_VERSION:
            raise ConfigError(
                f"plan format {record.get('format')!r} version {record.get('version')!r} is not "
                f"{PLAN_FORMAT!r} version {PLAN_VERSION}: a newer multipruner may read it"
            )
        base = record["base_model"]
        if not isinstance(base["name"], str) or not isinstance(base["model_type"], str):
            raise ValueError("the names of the base model and its type are no texts")
        layers = tuple(
            KeptLayer(_decode(row["query_heads"]), _decode(row["kv_heads"]), _decode(row["channels"]))
            for row in record["layers"]
        )
        dense = Structure.from_json(record["dense"])
        return cls(base["name"], base["revision"], base["fingerprint"], base["model_type"], dense, layers)


def _keep(number: int, size: LayerSize, rank: LayerRanking, full: LayerSize) -> KeptLayer:
    per_group = queries_per_group(size)
    if per_group > queries_per_group(full):
        raise ConfigError(f"layer {number}: a KV group has {queries_per_group(full)} query heads, {size} wants more")
    heads = rank.heads(full, size.kv_heads, per_group)
    groups, channels = rank.kv_groups[: size.kv_heads], rank.channels[: size.channels]
    return KeptLayer(tuple(sorted(heads)), tuple(sorted(groups)), tuple(sorted(channels)))


def _check_layer(number: int, kept: KeptLayer, full: LayerSize) -> None:
    for name in ("query_heads", "kv_heads", "channels"):
        indices, limit = getattr(kept, name), getattr(full, name)
        ascending = all(a < b for a, b in pairwise(indices))
        if not ascending or (indices and not 0 <= indices[0] <= indices[-1] < limit):
            raise ConfigError(f"layer {number}: {name} must be ascending indices below {limit}")
    if not kept.kv_heads:
        if kept.query_heads:
            raise ConfigError(f"layer {number}: query heads without KV heads")
        return
    per_group = queries_per_group(full)
    in_group = [sum(head // per_group == group for head in kept.query_heads) for group in kept.kv_heads]
    if sum(in_group) != len(kept.query_heads) or len(set(in_group)) != 1 or not in_group[0]:
        raise ConfigError(f"layer {number}: every kept KV group must keep the same number of query heads")


def surviving_layers(plan: PruningPlan) -> list[int]:
    """Dense numbers of the decoder layers that keep at least one block, in order."""
    return [number for number, kept in enumerate(plan.layers) if kept.size.has_attention or kept.size.has_mlp]
