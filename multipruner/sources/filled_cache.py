"""Keys and values of text that is being sampled, in memory that is taken once; only what is filled is attended to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer


class FilledLayer(CacheLayerMixin):
    """One layer's keys and values: the filled part of [sequences, KV heads, room, head_dim] each.

    Args:
        room: positions that there will be at most.
        dtype: that they are kept in, which is the attention function's to deal with; default: what they come in.
    """

    is_sliding = False

    def __init__(self, room: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self._room, self._dtype, self._filled = room, dtype, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the memory, for keys and values of the shapes that come first."""
        self.keys, self.values = (
            states.new_empty(*states.shape[:2], self._room, states.shape[3], dtype=self._dtype or states.dtype)
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new positions, and give those of all there are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        begin, self._filled = self._filled, self._filled + key_states.shape[2]
        self.keys[:, :, begin : self._filled] = key_states
        self.values[:, :, begin : self._filled] = value_states
        return self.keys[:, :, : self._filled], self.values[:, :, : self._filled]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tell how many keys so many more queries see, and the position of the first."""
        return self._filled + query_length, 0

    def get_seq_length(self) -> int:
        """Tell how many positions are filled."""
        return self._filled

    def get_max_length(self) -> int:
        """Tell how many positions there is room for."""
        return self._room


def cache_for(model: Any, room: int, dtype: torch.dtype | None = None) -> Cache | None:
    """Return a cache for so many positions; ``None`` where the model is to make its own.

    A cache that grows in every step is copied in every step. Layers with a window shorter than the text know only the
    last positions, and their model gets the stock cache of fixed size.

    Args:
        model: the stock model.
        room: positions of the text.
        dtype: see :class:`FilledLayer`.
    """
    if not getattr(model, "_can_compile_fullgraph", False):
        return None
    layers = DynamicCache(config=model.config).layers
    if layers and all(_sees_all(layer, room) for layer in layers):
        return Cache(layers=[FilledLayer(room, dtype) for _ in layers])
    return StaticCache(config=model.config, max_cache_len=room)


def _sees_all(layer: Any, room: int) -> bool:
    """Tell whether a stock layer would attend to every position of a text."""
    return type(layer) is DynamicLayer or getattr(layer, "sliding_window", 0) > room
