"""What was written, held against what should be there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from multipruner.checkpoint.load import load
from multipruner.checkpoint.save import weight_bytes
from multipruner.core.errors import OutputError, in_brief
from multipruner.storage.memory import free_memory
from multipruner.storage.tensor_headers import stored_tensors

from .dense import DTYPES
from .write import saved_tensors

_TRIAL = 8
"""Tokens that the written model is tried with."""


def check_written(
    folder: Path, model: PreTrainedModel, trust: bool, reopen: bool = True, opened: Callable[..., Any] = load
) -> None:
    """Hold a folder against what should be in it: names, shapes and types of tensors; where memory allows, and
    it is asked for, it is also opened, and a few tokens go through.

    Args:
        folder: what was written.
        model: what should be there; its tensors may be deferred.
        trust: whether code of the model's own may be run.
        reopen: whether to open it.
        opened: opens it.

    Raises:
        OutputError: naming what differs.
    """
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in saved_tensors(model).items()}
    there = {name: (tensor.shape, DTYPES[tensor.dtype]) for name, tensor in stored_tensors(folder).items()}
    if differ := sorted(set(wanted.items()) ^ set(there.items()), key=str):
        raise OutputError(f"what was written differs from what should be left: {differ[0][0]}")
    if not reopen or 2 * weight_bytes(model) > free_memory():
        return
    check_opens(lambda: opened(folder, dtype="auto", trust_remote_code=trust))


@torch.no_grad()
def check_opens(opened: Callable[[], Any]) -> None:
    """Open what was written, and have a few tokens go through.

    Args:
        opened: gives the model, or raises whatever it likes.

    Raises:
        OutputError: when it cannot be used.
    """
    try:
        again = opened()
        ids = torch.arange(_TRIAL)[None] % again.get_input_embeddings().num_embeddings
        finite = bool(again(input_ids=ids, use_cache=False).logits.isfinite().all())
    except Exception as error:  # whatever it is: what was written cannot be used
        raise OutputError(f"what was written cannot be opened again ({in_brief(error)})") from error
    if not finite:
        raise OutputError("what was written gives logits that are not finite; try the dense model in float32")
