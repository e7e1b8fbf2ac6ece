"""What of a model a table is asked for: workloads that it can be timed on, and widths of its residual stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multipruner.checkpoint.config import check_narrower
from multipruner.config.counts import narrower_sizes
from multipruner.core.errors import ConfigError
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.latency_table import HIDDEN, Workload
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


def narrower_than(config: Any, asked: str | None, step: int) -> tuple[int, ...]:
    """Return the narrower widths of the residual stream that are asked for, the widest first.

    Args:
        config: of the dense model.
        asked: numbers with commas between them, the model's own perhaps among them, or ``"auto"``: those that a run
            with ``--hidden-size auto`` tries; ``None``: none.
        step: what they are multiples of.

    Raises:
        ConfigError: for other numbers.
        UnsupportedModelError: when the residual stream of the model's family cannot be narrower.
    """
    if asked is None:
        return ()
    whole = anatomy_of(config).constants[HIDDEN]
    words = [word.strip() for word in asked.split(",")]
    numbers = {int(word) for word in words if word.isascii() and word.isdigit() and len(word) < 10}
    if words == ["auto"]:
        numbers = set(narrower_sizes(whole, step))
        if not numbers:
            raise ConfigError(
                f"--hidden-sizes auto: no multiple of --hidden-step {step} lies between half of the model's hidden "
                f"size of {whole} and all of it; give a smaller --hidden-step, or sizes"
            )
    elif len(numbers) < len(set(words)) or any(not 0 < n <= whole or (n % step and n != whole) for n in numbers):
        raise ConfigError(
            f"--hidden-sizes {asked}: give multiples of --hidden-step {step} up to the model's {whole} with commas "
            "between them, or auto"
        )
    if narrower := tuple(sorted(numbers - {whole}, reverse=True)):
        check_narrower(spec_for(config))
    return narrower
