"""A causal language model as one stateful OpenVINO graph: it keeps the keys and values of every attention itself.

Inputs ``input_ids``, ``attention_mask``, ``position_ids`` (int64 [batch, length]) and ``beam_idx`` (int32 [batch]:
whose keys and values each row goes on from); output ``logits`` [batch, length, vocabulary]. This is what openvino-genai
reads (the form of optimum-intel's ``patch_stateful``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from multipruner.console.quiet import quieted
from multipruner.core.errors import UnsupportedModelError

from .experts import batch_experts

INPUTS = ("input_ids", "attention_mask", "position_ids")
_BATCH, _TIME = 0, 2
_BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings that change with the length of the text, which a graph cannot."""


def converted(model: Any) -> Any:
    """Return the graph of a model in 32 bits, an ``openvino.Model``.

    Every attention has its own number of KV heads in the graph's shapes: told later, decoding takes longer.

    Args:
        model: on the CPU, in evaluation mode.

    Raises:
        UnsupportedModelError: when transformers' own forward pass cannot be traced.
    """
    import openvino

    _check_rotary(model.config)
    batch_experts(model)
    slots = _slots(model)
    example = _example(model, slots)
    shapes = [openvino.PartialShape([-1, -1])] * len(INPUTS)
    shapes += [openvino.PartialShape([-1, heads, -1, width]) for kept in slots.values() for heads, width in kept]
    with quieted("openvino"), torch.no_grad():  # what tracing warns of is compared afterwards
        try:
            traced = torch.jit.trace(_Step(model, tuple(slots)), example, check_trace=False, strict=False)
            graph = openvino.convert_model(traced, example_input=example, input=shapes)
        except Exception as error:  # of every kind: the code may be the model's own
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UnsupportedModelError(f"the model's forward pass cannot be traced for OpenVINO ({reason})") from error
    return _stateful(graph, list(slots))


class _Step(nn.Module):
    """The model with the past as arguments, and what it becomes as results."""

    def __init__(self, model: Any, slots: Sequence[int]) -> None:
        super().__init__()
        self.model, self.slots = model, slots

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor) -> Any:
        cache = _cache(dict(zip(self.slots, zip(past[::2], past[1::2], strict=True), strict=True)))
        masks = _masks(self.model.config, attention_mask, input_ids.shape[1])
        logits = self.model(
            input_ids=input_ids, attention_mask=masks, position_ids=position_ids, past_key_values=cache, use_cache=True
        ).logits
        return (logits, *(each for slot in self.slots for each in (cache.layers[slot].keys, cache.layers[slot].values)))


def _cache(past: dict[int, tuple[Tensor, Tensor]]) -> Any:
    """Return transformers' cache with these keys and values, kept whole: a window is the mask's business."""
    from transformers.cache_utils import Cache, DynamicLayer

    layers: list[Any] = [DynamicLayer() for _ in range(max(past, default=-1) + 1)]
    for slot, (keys, values) in past.items():
        layers[slot].dtype, layers[slot].device = keys.dtype, keys.device
        layers[slot].keys, layers[slot].values, layers[slot].is_initialized = keys, values, True
    return Cache(layers=layers)


def _masks(config: Any, attention_mask: Tensor, length: int) -> Any:
    """Return what is added to the scores, [batch, 1, length, all]; one for each type of layers if there are several."""
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    total = attention_mask.shape[1]
    keys, queries = torch.arange(total), torch.arange(total)[total - length :]
    seen = (keys[None] <= queries[:, None])[None] & attention_mask[:, None].bool()
    near = keys[None] > queries[:, None] - window if window else keys[None] >= 0
    full, sliding = (
        torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None] for allowed in (seen, seen & near)
    )
    if len(types) > 1:
        return {"full_attention": full, "sliding_attention": sliding}
    return sliding if window and types != {"full_attention"} else full


@torch.no_grad()
def _slots(model: Any) -> dict[int, list[tuple[int, int]]]:
    """Return heads and their width by the slot of the cache, of the keys and of the values of the attentions that are
    left; low-rank states stand in their place where these are made of them.
    """
    past = model(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    filled = {number: layer for number, layer in enumerate(past.layers) if getattr(layer, "keys", None) is not None}
    return {
        number: [(each.shape[1], each.shape[-1]) for each in (layer.keys, layer.values)]
        for number, layer in filled.items()
    }


def _example(model: Any, slots: dict[int, list[tuple[int, int]]]) -> tuple[Tensor, ...]:
    """Return two rows of four tokens after three."""
    ids = torch.arange(8).reshape(2, 4) % model.config.vocab_size
    positions = torch.arange(3, 7).expand(2, 4).contiguous()
    past = [torch.zeros(2, heads, 3, width) for kept in slots.values() for heads, width in kept]
    return (ids, torch.ones(2, 7, dtype=torch.long), positions, *past)


def _check_rotary(config: Any) -> None:
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in _BY_LENGTH:
        raise UnsupportedModelError(
            f"rotary embeddings of type {kind!r} depend on the text's length, which an OpenVINO graph cannot express; "
            "use the folder with transformers"
        )


def _stateful(graph: Any, slots: list[int]) -> Any:
    """Name what goes in and out, let every past be reordered by ``beam_idx``, and hide it in the graph."""
    import openvino
    from openvino import opset13 as ops
    from openvino._offline_transformations import apply_make_stateful_transformation

    names = [f"{number}.{what}" for number in range(len(slots)) for what in ("key", "value")]
    past, present = [f"past_key_values.{name}" for name in names], [f"present.{name}" for name in names]
    for port, name in zip(graph.inputs, (*INPUTS, *past), strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
    for port, name in zip(graph.outputs, ("logits", *present), strict=True):
        port.get_tensor().set_names({name})
    beam = ops.parameter(openvino.PartialShape([-1]), dtype=np.int32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    graph.add_parameters([beam])
    for name in past:
        port = graph.input(name)
        consumers = port.get_target_inputs()
        gathered = ops.gather(port, beam, ops.constant(_BATCH))
        for consumer in consumers:
            consumer.replace_source_output(gathered.output(0))
    graph.validate_nodes_and_infer_types()
    if past:
        apply_make_stateful_transformation(graph, dict(zip(past, present, strict=True)))
    _begin_empty(graph)
    return graph


def _begin_empty(graph: Any) -> None:
    """Let every state begin with a past of no tokens, of as many rows as there are."""
    from openvino import opset13 as ops

    ids = graph.input("input_ids")
    batch = ops.gather(ops.shape_of(ids, output_type="i64"), ops.constant([0]), ops.constant(0))
    for node in graph.get_ops():
        if node.get_type_name() == "ReadValue":
            dims: list[Any] = [ops.constant(np.array([dim.min_length])) for dim in node.get_output_partial_shape(0)]
            dims[_BATCH], dims[_TIME] = batch, ops.constant(np.array([0]))
            zero = ops.constant(0.0, dtype=node.get_output_element_type(0))
            node.set_arguments([ops.broadcast(zero, ops.concat(dims, axis=0))])
    graph.validate_nodes_and_infer_types()
