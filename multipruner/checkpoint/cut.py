"""Cutting a dense model in memory: a new model, built from the weights and the configuration that a plan leaves."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from multipruner.checkpoint.weights import Own, pruned_weights
from multipruner.core.axes import STREAM
from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.families import constants_of, spec_for
from multipruner.core.plan import PruningPlan

from .classes import family_of, model_class
from .config import pruned_config


def apply_plan(
    model: PreTrainedModel, plan: PruningPlan, narrower: PreTrainedModel | None = None, own: Own = torch.clone
) -> PreTrainedModel:
    """Cut a dense model in memory: a new model, same dtype and device; the same bits every time.

    Its class is the family's stock one where the layers that are left are all alike and have both blocks, the pruned
    one otherwise.

    Args:
        model: the dense model; not modified, and no memory is shared with it.
        plan: what stays.
        narrower: what a plan of the same residual stream left of the dense model, all blocks whole: its weights are
            taken, as they have been repaired since.
        own: makes every tensor of the new model, of what is cut out of the dense one's or as large as that.

    Raises:
        ConfigError: when the plan was made for another model, or of a stream that a run turned.
        UnsupportedModelError: when the family has no row, or the weights are quantised or offloaded.
    """
    spec = spec_for(model.config)
    config = pruned_config(model.config, plan, model)
    dense, left, constants = model.state_dict(), plan, constants_of(model.config)
    if narrower is not None and plan.stream is not None:
        dense, left = narrower.state_dict(), replace(plan, stream=None)
        constants["hidden"] = len(plan.stream)
    elif STREAM.axes[0].name in plan.bases:
        raise ConfigError(f"the plan's {plan.turned} are not those of the weights: take the folder of the run itself")
    if getattr(model.config, "quantization_config", None) or any(tensor.is_meta for tensor in dense.values()):
        raise UnsupportedModelError("quantised or offloaded weights cannot be cut; load the model in full precision")
    weights = pruned_weights(dense, left, spec, constants, own)
    cls = model_class(spec, model) if family_of(config) else type(model)
    pruned: Any = _with_weights(cls, config, _apart(weights, dense, own), model)
    pruned.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    if cls is type(model) and spec.routes(spec.kinds):
        _written_like(model, pruned)
    return pruned


def _written_like(model: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Have transformers write a stock model's tensors in the layout that the dense one's were read in.

    Where experts lay one by one in the checkpoint they do so again: other readers than transformers know no stacks.
    """
    vars(pruned).pop("_weight_conversions", None)
    vars(pruned).update({key: value for key, value in vars(model).items() if key == "_weight_conversions"})


def _apart(weights: dict[str, torch.Tensor], dense: dict[str, torch.Tensor], own: Own) -> dict[str, torch.Tensor]:
    """Return tensors of their own in place of those that still share memory with the dense model's."""
    shared = {tensor.data_ptr() for tensor in dense.values()}
    return {name: own(tensor) if tensor.data_ptr() in shared else tensor for name, tensor in weights.items()}


def _with_weights(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    weights: dict[str, torch.Tensor],
    like: PreTrainedModel,
) -> PreTrainedModel:
    """Build on the meta device and fill in; anything missing or left over is an error."""
    where: dict[str, Any] = {} if like.device.type == "cpu" else {"device_map": {"": like.device}}
    result: Any = cls.from_pretrained(
        None,
        config=config,
        state_dict=weights,
        dtype=like.dtype,
        attn_implementation=like.config._attn_implementation,
        output_loading_info=True,
        **where,
    )
    pruned, info = result
    faults = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        raise ConfigError(f"the plan does not fit the weights: {faults}")
    return pruned
