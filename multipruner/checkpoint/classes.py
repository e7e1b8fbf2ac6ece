"""Pruned models: transformers' own classes, with every decoder layer in its own size.

The classes are written once, in ``template.py`` (itself a working pruned Llama). Rendered for a family, that
text is both what this package runs and what travels with a checkpoint, so that plain transformers load it too.
Where all layers that are left are alike, a stock model of the family can say as much, and is what comes out.
"""

from __future__ import annotations

import re
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.utils.hub import HF_MODULES_CACHE

from multipruner.core.errors import ConfigError
from multipruner.core.families import FAMILIES, Family

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


def modeling_file(spec: Family) -> str:
    """Name of the file in a checkpoint that defines a family's pruned classes."""
    return f"modeling_{MODEL_TYPE}{spec.model_type}.py"


def modeling_source(spec: Family, dense: PreTrainedModel | None = None) -> str:
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


def _remote_family(spec: Family, dense: PreTrainedModel | None) -> str:
    """The imports and the layer of a family whose code is not part of transformers."""
    if dense is None:
        raise ConfigError(f"{spec.model_type}: the code travels with the model; load the folder with trust_remote_code")
    decoder = dense.get_submodule(spec.decoder)
    packed = spec.attention.inputs[0]
    names = {
        "config_module": type(dense.config).__module__.rpartition(".")[2],
        "config": type(dense.config).__name__,
        "module": type(dense).__module__.rpartition(".")[2],
        "causal_lm": type(dense).__name__,
        "model": type(decoder).__name__,
        "layer": type(decoder.get_submodule(f"{spec.layers}.0")).__name__,
    }
    blocks = {
        "attention": spec.attention.path,
        "packed": packed.path.removesuffix(".weight"),
        "output": spec.attention.output,
    }
    return _REMOTE_FAMILY.format(
        **names, **blocks, parts=packed.dims[0].size({"kv_groups": 1, "queries": 1, "head_dim": 1})
    )


def model_class(spec: Family, dense: PreTrainedModel | None = None) -> type[PreTrainedModel]:
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


def family_of(config: Any) -> Family | None:
    """The row of a pruned model's configuration (object or dictionary), or ``None`` when it is not a pruned one's."""
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    return FAMILIES.get(str(model_type).removeprefix(MODEL_TYPE)) if str(model_type).startswith(MODEL_TYPE) else None
