"""Pruned models: transformers' own classes, with every decoder layer in its own size.

The classes are written once, in ``modeling_template.py`` (itself a working pruned Llama). Rendered for a family, that
text is both what this package runs and what travels with a checkpoint, so that plain transformers load it too.
Where all layers that are left are alike, a stock model of the family can say as much, and is what comes out.
"""

from __future__ import annotations

import copy
import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from huggingface_hub.utils import WeakFileLock
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.utils.hub import HF_MODULES_CACHE

from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.families import FAMILIES, ArchitectureSpec, dense_structure, dimensions, spec_for
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import LayerSize, Structure
from multipruner.engine.cutting import pruned_weights, surviving_layers

MODEL_TYPE = "multipruner_"
"""Prefix of a pruned model's ``config.model_type``; the rest is the family's own."""
_TEMPLATE = Path(__file__).with_name("template.py")
_FAMILY = re.compile(r"# family: begin\n(.*)# family: end\n", re.DOTALL)
_REMOTE_FAMILY = '''\
from .{config_module} import {config}
from .{module} import {layer} as LlamaDecoderLayer
from .{module} import {causal_lm}, {model}


def stock_layer(config: Any, number: int) -> Any:
    """The dense decoder layer, its attention resized: the constructor knows no width but the dense one."""
    heads, config.num_attention_heads = config.num_attention_heads, config.hidden_size // config.head_dim
    layer = LlamaDecoderLayer(config)
    attention, width = layer.{attention}, heads * config.head_dim
    packed, output = attention.{packed}, attention.{output}
    attention.{packed} = nn.Linear(config.hidden_size, {parts} * width, bias=packed.bias is not None)
    attention.{output} = nn.Linear(width, config.hidden_size, bias=output.bias is not None)
    attention.num_heads, attention.hidden_size = heads, width
    return layer


'''


def modeling_file(spec: ArchitectureSpec) -> str:
    """Name of the file in a checkpoint that defines a family's pruned classes."""
    return f"modeling_{MODEL_TYPE}{spec.model_type}.py"


def modeling_source(spec: ArchitectureSpec, dense: PreTrainedModel | None = None) -> str:
    """Text of the file in a checkpoint that defines a family's pruned classes.

    Args:
        spec: the family's row.
        dense: a dense model of the family; needed where the family's code travels with the checkpoint.

    Raises:
        ConfigError: when such a family's dense model is missing.
    """
    text = _TEMPLATE.read_text(encoding="utf-8")
    if spec.remote_code:
        text = _FAMILY.sub(lambda _: _remote_family(spec, dense), text)
    else:
        text = _FAMILY.sub(lambda match: match[1], text)
    return text.replace("Llama", spec.prefix).replace("llama", spec.model_type)


def _remote_family(spec: ArchitectureSpec, dense: PreTrainedModel | None) -> str:
    """The imports and the layer of a family whose code is not part of transformers."""
    if dense is None:
        raise ConfigError(f"{spec.model_type}: the code travels with the model; load the folder with trust_remote_code")
    decoder = dense.get_submodule(spec.decoder)
    projection = spec.attention.inputs[0]
    names = {
        "config_module": type(dense.config).__module__.rpartition(".")[2],
        "config": type(dense.config).__name__,
        "module": type(dense).__module__.rpartition(".")[2],
        "causal_lm": type(dense).__name__,
        "model": type(decoder).__name__,
        "layer": type(decoder.get_submodule(f"{spec.layers}.0")).__name__,
    }
    blocks = {"attention": spec.attention.path, "packed": projection.path, "output": spec.attention.output}
    return _REMOTE_FAMILY.format(**names, **blocks, parts=len(projection.parts))


def model_class(spec: ArchitectureSpec, dense: PreTrainedModel | None = None) -> type[PreTrainedModel]:
    """The pruned causal language model of a family; its ``config_class`` is the pruned configuration.

    Args:
        spec: the family's row.
        dense: a dense model of the family; needed where the family's code travels with the checkpoint.

    Raises:
        ConfigError: when such a family's dense model is missing.
    """
    files = {modeling_file(spec): modeling_source(spec, dense)}
    if spec.remote_code:
        files |= _code_of(type(dense)) | _code_of(type(dense.config))  # pyright: ignore[reportOptionalMemberAccess]
    return _load_class(f"{modeling_file(spec)[:-3]}.Pruned{spec.prefix}ForCausalLM", tuple(sorted(files.items())))


def _code_of(defined: type) -> dict[str, str]:
    """The source files that define a class, by name: its own and those it imports from beside it."""
    own = str(sys.modules[defined.__module__].__file__)
    return {Path(file).name: Path(file).read_text(encoding="utf-8") for file in (own, *get_relative_import_files(own))}


@cache
def _load_class(reference: str, files: tuple[tuple[str, str], ...]) -> type[PreTrainedModel]:
    """Import source text the way transformers import the code of a checkpoint.

    Real files in transformers' own module cache are what makes ``save_pretrained`` bring the code along, and
    tracebacks, ``torch.compile`` and pickling work.
    """
    cached = Path(HF_MODULES_CACHE)
    cached.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as parent, WeakFileLock(cached / ".multipruner.lock"):
        folder = Path(parent, "multipruner")
        folder.mkdir()
        for name, text in files:
            (folder / name).write_text(text, encoding="utf-8")
        return get_class_from_dynamic_module(reference, str(folder))


def family_of(config: Any) -> ArchitectureSpec | None:
    """The row of a pruned model's configuration (object or dictionary), or ``None`` when it is not a pruned one's."""
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return FAMILIES.get(str(model_type).removeprefix(MODEL_TYPE)) if str(model_type).startswith(MODEL_TYPE) else None


def pruned_config(config: Any, plan: PruningPlan, dense: PreTrainedModel | None = None) -> PreTrainedConfig:
    """The configuration that a plan leaves of a dense one: a stock one where that can say it.

    Args:
        config: the dense model's configuration; not modified.
        plan: what stays.
        dense: the dense model; needed where the family's code travels with the checkpoint.

    Raises:
        ConfigError: when the plan was made for another model, or leaves nothing.
        UnsupportedModelError: when the family has no row.
    """
    spec = spec_for(config)
    _check_plan(config, plan)
    layers = surviving_layers(plan)
    record = config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version", "per_layer_config"):
        record.pop(key, None)
    record["num_hidden_layers"] = len(layers)
    sizes = Structure(tuple(plan.structure[number] for number in layers))
    if record.get("layer_types"):
        record["layer_types"] = _layer_types([record["layer_types"][number] for number in layers], sizes)
    stock = _stock_config(config, record, sizes, spec)
    if stock is not None:
        return stock
    record["head_dim"] = dimensions(config).head_dim
    grouped = "num_key_value_heads" in record
    record["per_layer_config"] = {number: _overrides(size, grouped) for number, size in enumerate(sizes)}
    config_class: Any = model_class(spec, dense).config_class
    return config_class(**record)


def _stock_config(
    config: Any, record: dict[str, Any], sizes: Structure, spec: ArchitectureSpec
) -> PreTrainedConfig | None:
    """The family's own configuration for these sizes, or ``None`` where it has no words for them."""
    size, head_dim = sizes[0], dimensions(config).head_dim
    if spec.remote_code or len(set(sizes)) > 1 or not (size.has_attention and size.has_mlp):
        return None
    record = {**record, "num_attention_heads": size.query_heads, "intermediate_size": size.channels}
    if "num_key_value_heads" in record or size.kv_heads != size.query_heads:
        record["num_key_value_heads"] = size.kv_heads
    if "head_dim" in record or size.query_heads * head_dim != config.hidden_size:
        record["head_dim"] = head_dim
    config_class: Any = type(config)
    try:
        stock = config_class(**record)
    except StrictDataclassClassValidationError:  # LlamaConfig: heads must divide hidden_size, head_dim or not
        return None
    rope = getattr(stock, "rope_parameters", None) or {}
    if "rope_theta" in rope:  # transformers 4 and most other readers look for it here
        stock.rope_theta = rope["rope_theta"]
    return stock


def _check_plan(config: Any, plan: PruningPlan) -> None:
    if plan.model_type != config.model_type:
        raise ConfigError(f"the plan was made for a {plan.model_type!r} model, this one is {config.model_type!r}")
    if plan.dense != dense_structure(config):
        sizes = [f"{len(s)} layers, the first {s[0]}" for s in (plan.dense, dense_structure(config))]
        raise ConfigError(f"the plan was made for a model of {sizes[0]}; this one has {sizes[1]}")
    if not surviving_layers(plan):
        raise ConfigError("the plan leaves no decoder layer")


def _layer_types(types: list[str], sizes: Structure) -> list[str]:
    """Layers without attention take the type of one that has it: a type only says which cache slot there is."""
    living = [kind for kind, size in zip(types, sizes, strict=True) if size.has_attention]
    return [kind if size.has_attention or not living else living[0] for kind, size in zip(types, sizes, strict=True)]


def _overrides(size: LayerSize, grouped: bool) -> dict[str, Any]:
    """One layer's entry of ``per_layer_config``.

    A removed block is written with size 1, the least that stock constructors take: building the layer costs nothing,
    and a stock class that knows no ``skip`` meets differing sizes and refuses.
    """
    heads = {"num_attention_heads": size.query_heads or 1}
    if grouped:
        heads["num_key_value_heads"] = size.kv_heads or 1
    skip = [kind for kind, there in (("attention", size.has_attention), ("mlp", size.has_mlp)) if not there]
    return {**heads, "intermediate_size": size.channels or 1, **({"skip": skip} if skip else {})}


def apply_plan(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """Cut a dense model in memory: a new model, same dtype and device; the same bits every time.

    Its class is the family's stock one where the layers that are left are all alike and have both blocks, the pruned
    one otherwise.

    Args:
        model: the dense model; not modified, and no memory is shared with it.
        plan: what stays.

    Raises:
        ConfigError: when the plan was made for another model.
        UnsupportedModelError: when the family has no row, or the weights are quantised or offloaded.
    """
    spec = spec_for(model.config)
    config = pruned_config(model.config, plan, model)
    dense = model.state_dict()
    if getattr(model.config, "quantization_config", None) or any(tensor.is_meta for tensor in dense.values()):
        raise UnsupportedModelError("quantised or offloaded weights cannot be cut; load the model in full precision")
    weights = pruned_weights(dense, plan, spec, dimensions(model.config).head_dim)
    cls = model_class(spec, model) if family_of(config) else type(model)
    pruned = _with_weights(cls, config, _own(weights, dense), model)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned


def _own(weights: dict[str, torch.Tensor], dense: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the tensors that still share memory with the dense model's."""
    shared = {tensor.data_ptr() for tensor in dense.values()}
    return {name: tensor.clone() if tensor.data_ptr() in shared else tensor for name, tensor in weights.items()}


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
