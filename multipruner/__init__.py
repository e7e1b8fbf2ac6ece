"""Make Hugging Face causal language models smaller and faster without training."""

from __future__ import annotations

__version__ = "0.1.0"
