"""Whether a folder that was written is the model in memory: opened from the disk and compared on a little text."""

from __future__ import annotations

from math import isclose
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from multipruner.core.errors import OutputError

from .classes import task_of
from .load import load

SEQUENCES, LENGTH = 2, 128
"""Of the text that is compared on, at most."""


def check_reopened(folder: Path, model: PreTrainedModel, ids: Tensor) -> None:
    """Open a folder again and compare its loss with the model's in memory.

    Args:
        folder: what was written.
        model: what it should hold.
        ids: token ids, int64 [sequences, length], or pixels; the first few are used.

    Raises:
        OutputError: when it cannot be opened, or differs beyond the rounding of its type.
    """
    where: dict[str, Any] = {} if model.device.type == "cpu" else {"device_map": {"": model.device}}
    try:
        again = load(
            folder, dtype="auto", trust_remote_code=True, attn_implementation=model.config._attn_implementation, **where
        )
    except Exception as error:  # whatever it is: what was written cannot be used
        reason = " ".join(str(error).split())[:300]
        raise OutputError(
            f"what was written cannot be opened again ({type(error).__name__}: {reason}); the disk or the installed "
            "transformers may be at fault: run the same command again, it does not search again"
        ) from error
    few = ids[:SEQUENCES, :LENGTH].to(model.device)  # of pictures, all channels
    ours, theirs = (_loss(one, few) for one in (model, again))
    rounding = max(1e-5, 2 * torch.finfo(model.dtype).eps)
    if again.dtype != model.dtype or not (ours == theirs or isclose(ours, theirs, rel_tol=rounding, abs_tol=rounding)):
        raise OutputError(
            f"what was written differs from the model in memory: a loss of {theirs:.6f} instead of {ours:.6f} nats "
            f"({again.dtype} and {model.dtype})"
        )


@torch.no_grad()
def _loss(model: PreTrainedModel, ids: Tensor) -> float:
    """Return mean loss in nats, of the next token or of some class; one that is not finite counts as infinite."""
    task = task_of(model.config)
    if task.reads_text:
        logits, labels = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    else:
        logits = model(**{task.inputs: ids}).logits
        labels = torch.arange(len(logits), device=logits.device) % logits.shape[1]
    loss = cross_entropy(logits.float(), labels).item()
    return loss if loss == loss else float("inf")
