"""Experts in a graph: run by operators that every graph format has."""

from __future__ import annotations

from typing import Any

from multipruner.checkpoint.classes import family_of
from multipruner.core.families import spec_for


def batch_experts(model: Any) -> None:
    """Let a model with experts gather each token's weights, which a tracer can follow.

    Running one expert after the other depends on the text, and transformers' grouped product is an operator of its own.
    """
    spec = family_of(model.config) or spec_for(model.config)
    if any(block.routed for block in spec.blocks):
        model.set_experts_implementation("batched_mm")
