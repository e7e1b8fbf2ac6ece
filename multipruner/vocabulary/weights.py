"""The rows of embeddings and head that belong to the tokens that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from multipruner.core.errors import UnsupportedModelError


def check_places(model: PreTrainedModel, name: str) -> None:
    """Refuse a model in which something beside embeddings and head has a row for every token.

    Raises:
        UnsupportedModelError: naming the tensor.
    """
    rows, others = _rows(model), _other_sizes(model)
    own = {id(parameter) for module in _places(model) for parameter in module.parameters()}
    for key, tensor in model.named_parameters():
        if id(tensor) not in own and rows in tensor.shape and rows not in others:
            raise UnsupportedModelError(
                f"{name} has {key}, {list(tensor.shape)}, with as many rows as it has tokens; only embeddings and head "
                "can be cut"
            )


def row_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Return how many rows the embeddings have, and how many parameters one token has in embeddings and head."""
    rows = _rows(model)
    own = {id(parameter): parameter for module in _places(model) for parameter in module.parameters()}
    return rows, sum(parameter.numel() for parameter in own.values()) // rows


def keep_rows(model: PreTrainedModel, ids: Sequence[int]) -> PreTrainedModel:
    """Leave a model the rows of some tokens, in their order, in place, and return it.

    Args:
        model: whose tensors may be deferred; tied matrices stay one.
        ids: dense ids, whose places in the sequence are the new ones.
    """
    index, done = torch.tensor(ids), dict[int, nn.Parameter]()
    for module in _places(model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in done:
                rows = parameter.detach().index_select(0, index.to(parameter.device))
                done[id(parameter)] = nn.Parameter(rows, requires_grad=False)
            setattr(module, name, done[id(parameter)])
        for size in ("num_embeddings", "out_features"):
            if hasattr(module, size):
                setattr(module, size, len(ids))
        if getattr(module, "padding_idx", None) is not None:
            module.padding_idx = None  # it matters to training alone, and the file's configuration says it
    model.config.vocab_size = len(ids)
    return model


def _rows(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return len(embeddings.weight)


def _places(model: PreTrainedModel) -> list[Any]:
    head = model.get_output_embeddings()
    return [model.get_input_embeddings(), *([] if head is None else [head])]


def _other_sizes(model: PreTrainedModel) -> set[int]:
    """Return sizes of tensors that a configuration says otherwise: a chance meeting with the vocabulary's."""
    values = model.config.to_dict().items()
    return {value for key, value in values if isinstance(value, int) and "vocab" not in key}
