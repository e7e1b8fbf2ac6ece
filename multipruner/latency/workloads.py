"""What of a model can be timed: batches of pictures, and no more tokens than there are positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multipruner.core.errors import ConfigError
from multipruner.core.latency_table import Workload
from multipruner.sources.intake.processor import shape_of


def on_pictures(name: str, config: Any, processor: Any, batches: Sequence[int]) -> list[Workload]:
    """Return workloads of pictures as an image classifier takes them.

    Args:
        name: what to call the model in errors.
        config: of the model.
        processor: its image processor.
        batches: how many pictures are classified together.

    Raises:
        ConfigError: when its pictures are not square.
    """
    _, height, width = shape_of(name, config, processor)
    if height != width:
        raise ConfigError(f"{name} takes pictures of {height} x {width} pixels: only square ones are timed")
    return [Workload("pictures", batch, height) for batch in dict.fromkeys(batches)]


def check_context(workloads: Sequence[Workload], config: Any) -> None:
    """Refuse more tokens than the model has positions for.

    Raises:
        ConfigError: naming the workload.
    """
    context = getattr(config, "max_position_embeddings", None)
    for workload in workloads:
        needed = workload.tokens + (workload.phase == "decode")
        if context is not None and needed > context:
            raise ConfigError(
                f"{workload.phase} with {workload.tokens} tokens goes beyond the model's context of {context}; lower "
                "--prompt, --generate or --cached"
            )
