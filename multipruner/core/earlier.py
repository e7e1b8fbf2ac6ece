"""Files of version 1 as version 2 writes them: JSON to JSON, and nothing else in the house knows version 1.

It spoke of decoder layers instead of blocks: ``[query heads, KV heads, channels]`` of every one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .axes import units_in
from .errors import ConfigError

_SHAPES = {"hidden_size": "hidden", "queries_per_kv": "queries", "kv_heads": "kv_groups"}
"""What latency tables called shapes."""


def sizes_of_layer(row: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return sizes of the attention and the MLP block of a layer.

    Args:
        row: ``(query heads, KV heads, channels)``.

    Raises:
        ConfigError: for sizes that no layer can have.
        TypeError, ValueError: when a row does not hold three numbers.
    """
    heads, groups, channels = row
    if not all(isinstance(count, int) and not isinstance(count, bool) for count in row):
        raise TypeError(f"a size holds whole numbers, not {row!r}")
    if min(heads, groups, channels) < 0:
        raise ConfigError(f"layer sizes must not be negative: {list(row)}")
    if bool(heads) != bool(groups) or (groups and heads % groups):
        raise ConfigError(f"{groups} KV heads do not divide {heads} query heads")
    return (groups, heads // groups) if groups else (), (channels,) if channels else ()


def structure(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return a structure: ``[[query heads, KV heads, channels], ...]``."""
    return {"blocks": [list(size) for row in rows for size in sizes_of_layer(row)]}


def step(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step of a trajectory: it had the size of the whole layer."""
    rest = {key: value for key, value in record.items() if key != "size"}
    attention, mlp = sizes_of_layer(record["size"])
    return {**rest, "kept": list(attention if record["kind"] == "attention" else mlp)}


def plan(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan: a row of every layer, query heads by their numbers in the layer.

    Raises:
        ConfigError: when query heads are kept of groups that are not.
    """
    blocks: list[dict[str, Any]] = []
    for layer, (row, dense) in enumerate(zip(record["layers"], record["dense"], strict=True)):
        attention, mlp = sizes_of_layer(dense)
        heads, groups, channels = (units_in(row[key]) for key in ("query_heads", "kv_heads", "channels"))
        if attention:
            each = attention[1]
            inside = [[head % each for head in heads if head // each == group] for group in groups]
            if sum(map(len, inside)) != len(heads):
                raise ConfigError(f"layer {layer}: query heads outside the KV groups that stay")
            kept: dict[str, Any] = {"kv_groups": list(groups), "queries": inside} if groups else {}
            sizes = {"kv_groups": attention[0], "queries": each}
            blocks.append({"layer": layer, "kind": "attention", "dense": sizes, "kept": kept})
        if mlp:
            kept = {"channels": list(channels)} if channels else {}
            blocks.append({"layer": layer, "kind": "mlp", "dense": {"channels": mlp[0]}, "kept": kept})
    return {"format": record["format"], "version": 2, "base_model": record["base_model"], "blocks": blocks}


def shapes(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return shapes of a latency table, or a mapping with these among others, by their names of today."""
    return {_SHAPES.get(name, name): value for name, value in values.items()}


def latency_table(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a latency table: by KV heads, query heads in the dense proportion, and by channels; 0 for none."""
    queries = record["shapes"]["queries_per_kv"]

    def listed(rows: Sequence[Mapping[str, Any]], attention: bool) -> list[dict[str, Any]]:
        found = []
        for row in rows:
            width, rest = row["width"], {key: value for key, value in row.items() if key != "width"}
            size = sizes_of_layer((width * queries, width, 0) if attention else (0, 0, width))
            found.append({"size": list(size[0] if attention else size[1]), **rest})
        return found

    workloads = []
    for row in record["workloads"]:
        rest = {key: value for key, value in row.items() if key not in ("attention", "mlp")}
        blocks = {"attention": listed(row["attention"], True), "mlp": listed(row["mlp"], False)}
        workloads.append({**rest, "blocks": blocks})
    return {**record, "version": 2, "shapes": shapes(record["shapes"]), "workloads": workloads}
