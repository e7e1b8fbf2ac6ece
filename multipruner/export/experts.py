"""Blocks in a graph: experts run by operators that every graph format has, mixers that no graph holds are refused."""

from __future__ import annotations

from typing import Any

from multipruner.checkpoint.classes import spec_of
from multipruner.core.axes import BLOCK_KINDS
from multipruner.core.errors import UnsupportedModelError


def batch_experts(model: Any) -> None:
    """Let a model with experts gather each token's weights, which a tracer can follow.

    Running one expert after the other depends on the text, and transformers' grouped product is an operator of its own.
    """
    if (spec := spec_of(model.config)).routes(spec.kinds):
        model.set_experts_implementation("batched_mm")


def check_mixers(model: Any, format_name: str, *, cached: bool) -> None:
    """Refuse a model whose mixers of tokens a graph does not hold.

    A state that is handed on from piece to piece makes a graph of one length, whatever is asked for.

    Args:
        model: to export.
        format_name: of the graph.
        cached: whether the graph keeps what it has seen; it knows keys and values alone.

    Raises:
        UnsupportedModelError: naming the family.
    """
    spec = spec_of(model.config)
    if any(block.recurrent or (cached and BLOCK_KINDS[block.kind].whole) for block in spec.blocks):
        raise UnsupportedModelError(
            f"{spec.model_type}: what its mixers of tokens keep has no place in a graph for {format_name}; load the "
            "folder with transformers"
        )
