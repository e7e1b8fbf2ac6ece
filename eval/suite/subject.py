"""What a measure is given: a model, its tokenizer, texts, and what is known of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


@dataclass(frozen=True)
class Subject:
    """A model that is judged.

    Attributes:
        model: a causal language model, in evaluation mode and without gradients while it is measured.
        tokenizer: its tokenizer.
        texts: token ids by kind: int64 [tokens], or [sequences, tokens] where the text is in pieces.
        context: the longest sequence it was made for, in tokens.
        reference: tensors of the dense model by name, for measures that need them; empty for the dense model itself.
        progress: told how far a measure is.
    """

    model: Any
    tokenizer: Any
    texts: Mapping[str, Tensor]
    context: int
    reference: Mapping[str, Tensor] = field(default_factory=dict)
    progress: Progress = lambda done, total: None

    def telling(self, progress: Progress) -> Subject:
        """Return the same with another progress."""
        return replace(self, progress=progress)

    def beside(self, reference: Mapping[str, Tensor]) -> Subject:
        """Return the same with what is known of the dense model."""
        return replace(self, reference=reference)
