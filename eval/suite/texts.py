"""Text that is wherever Python is: programs, as the second of the kinds that models are compared on."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_MODULES = ("argparse", "textwrap", "statistics", "csv", "heapq", "shlex", "string", "fractions", "difflib", "tarfile")


@cache
def library_code() -> str:
    """Return some modules of Python's standard library, one after another."""
    found = []
    for name in _MODULES:
        spec = find_spec(name)
        if spec is not None and spec.origin and Path(spec.origin).suffix == ".py":
            found.append(Path(spec.origin).read_text(encoding="utf-8"))
    return "\n\n".join(found)


def beginning(tokenizer: Any, text: str, tokens: int) -> Tensor:
    """Return the first tokens of a text, int64 [tokens]; so much of it is read as they can need."""
    cut = text[: tokens * 12]  # no vocabulary has tokens that are longer on the average
    return tokenizer(cut, return_tensors="pt", verbose=False)["input_ids"][0][:tokens]


def text_digest(ids: Tensor) -> str:
    """Return SHA-256 (hexadecimal) over shape and int64 bytes of token ids."""
    digest = hashlib.sha256(repr(tuple(ids.shape)).encode())
    digest.update(ids.to(torch.int64).contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()
