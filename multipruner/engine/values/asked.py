"""Queries and keys as attention multiplies them: behind their norms and rotations, whatever a family's code does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from multipruner.core.errors import UnsupportedModelError

_NAME = "multipruner_asked"


class _Asked(Exception):
    """Carries them out of the forward pass, the rest of which nobody wants."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        super().__init__()
        self.query, self.key = query, key


def queries_and_keys(module: nn.Module, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    """Return what an attention block multiplies, queries [sequences, heads, length, head_dim] and keys [sequences,
    kv_heads, length, head_dim], through transformers' own attention interface.

    Args:
        module: the block.
        run: calls it.

    Raises:
        UnsupportedModelError: when its code does not ask that interface.
    """
    config: Any = module.config
    before, config._attn_implementation = config._attn_implementation, _NAME
    try:
        run()
    except _Asked as asked:
        return asked.query, asked.key
    finally:
        config._attn_implementation = before
    raise UnsupportedModelError(
        f"{type(module).__name__} does not attend through transformers' interface, so that its RoPE pairs cannot be "
        "put in order by text: give no RoPE pair step (rope_pair_step)"
    )


def _forward(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **settings: Any) -> Any:
    raise _Asked(query, key)


AttentionInterface.register(_NAME, _forward)
AttentionMaskInterface.register(_NAME, sdpa_mask)
