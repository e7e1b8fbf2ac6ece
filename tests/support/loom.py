"""A throw-away family as one row; as a pytest plugin it joins every test that is parametrised over the families."""

from __future__ import annotations

from multipruner.core.blocks import BlockSpec, conv1d
from multipruner.core.families import FAMILIES, Family
from multipruner.core.layout import Layout

from . import tiny

_HEADS = "kv_groups * queries * head_dim"
ROW = Family(
    "loom",
    "Loom",
    (
        BlockSpec(
            kind="attention",
            path="mixer",
            before="norm_a",
            tensors=(
                *conv1d("fused", "kv_groups * (queries + 2) * head_dim", "hidden"),
                *conv1d("out", "hidden", _HEADS),
            ),
            output="out",
            attributes=(("groups", Layout("kv_groups")), ("each", Layout("queries"))),
            arguments=True,
            cached=(Layout("kv_groups * head_dim"), Layout("kv_groups * head_dim")),
            scores=(Layout(_HEADS), Layout(_HEADS)),
            cache="slot",
        ),
        BlockSpec(
            kind="mlp",
            path="feed",
            before="norm_b",
            tensors=(*conv1d("wide", "channels + channels", "hidden"), *conv1d("narrow", "hidden", "channels")),
            output="narrow",
        ),
    ),
    config={
        "d_model": "hidden",
        "head_width": "head_dim",
        "n_head": "kv_groups * queries",
        "n_group": "kv_groups",
        "ffn_width": "channels",
    },
    depth="n_layer",
    decoder="cloth",
    layers="stages",
    embeddings="words",
    final_norm="last_norm",
    head="readout",
    layer_arguments="number, config",
    remote_code=True,
)


def pytest_configure() -> None:
    """Add the row to the tables, before tests are collected."""
    FAMILIES["loom"] = ROW
    tiny.VARIANTS["loom"] = {"family": "loom"}
    tiny.CONTRACT.append("loom")
    tiny.OWN_CODE.append("loom")
