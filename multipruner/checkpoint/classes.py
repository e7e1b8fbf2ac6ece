"""Pruned models: transformers' own classes, with every decoder layer in its own size.

The classes are written once, in ``template.py`` (itself a working pruned Llama). Rendered from a family's row, that
text is both what this package runs and what travels with a checkpoint, so that plain transformers load it too.
Where all layers that are left are alike, a stock model of the family can say as much, and is what comes out.
"""

from __future__ import annotations

import re
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub.utils import WeakFileLock
from transformers import PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module, get_relative_import_files
from transformers.utils.hub import HF_MODULES_CACHE

from multipruner.core.axes import BLOCK_KINDS, PAIRS
from multipruner.core.blocks import BlockSpec
from multipruner.core.errors import ConfigError, OutputError, UnsupportedModelError
from multipruner.core.families import Family, first_row, row_for, spec_for
from multipruner.core.families.parts import NEIGHBOURS
from multipruner.core.families.tasks import CAUSAL_LM, Task
from multipruner.core.layout import Layout

from .run_folder import read_json

MODEL_TYPE = "multipruner_"
"""Prefix of a pruned model's ``config.model_type``; the rest is the family's own."""
_TEMPLATE = Path(__file__).with_name("template.py")
_FAMILY = re.compile(r"# family: begin\n(.*)# family: end\n", re.DOTALL)
_STOCK = """\
from transformers.models.{module}.configuration_{module} import {config}
from transformers.models.{module}.modeling_{module} import {layer}, {causal_lm}, {model}
"""
_REMOTE = """\
from .{config_module} import {config} as {prefix}Config
from .{module} import {layer} as {prefix}DecoderLayer
from .{module} import {causal_lm} as {prefix}ForCausalLM
from .{module} import {model} as {prefix}Model
"""
_NAMES = """
DECODER, LAYERS, DEPTH, PART = {decoder!r}, {layers!r}, {depth!r}, {part!r}
{note}BLOCKS = {blocks!r}
CACHE_SLOTS = {cache!r}
SETTINGS: dict[str, tuple[str, ...]] = {settings!r}
VALUES: tuple[str, ...] = {values!r}
ROTATED, NEIGHBOURS = {rotated!r}, {neighbours!r}
MODEL_SETTINGS: dict[str, Any] = {model_settings!r}
ADDED_TO, PAIRED, HANDED = {added_to!r}, {paired!r}, {handed!r}
HEADS, KV_HEADS = {heads!r}, {kv_heads!r}


def stock_layer(config: Any, number: int, dense: dict[str, Any]) -> Any:
"""
_SWITCHED = (
    "# how experts run is chosen by @use_experts_implementation of transformers, which looks for its name here\n"
)
"""Where a class's file does not name that, transformers conclude that nobody can choose."""
_AS_IT_IS = '''\
    """Return the stock decoder layer of one layer's configuration; ``dense`` holds the dense model's."""
    return {prefix}DecoderLayer({arguments})
'''
_CUT_TO_SIZE = '''\
    """Return the dense decoder layer, cut to its size: the constructor knows no width but the dense one."""
    {counts}
    own = {{key: getattr(config, key) for key in {keys!r}}}
    vars(config).update({{key: dense[key] for key in own}})
    layer = {prefix}DecoderLayer({arguments})
    vars(config).update(own)
    {cuts}
    return layer


def cut_to(layer: Any, path: str, shape: tuple[int, ...]) -> None:
    """Keep the beginning of a parameter, where there is one."""
    parameter = dict(layer.named_parameters()).get(path)
    if parameter is None:
        return
    module = layer.get_submodule(path.rpartition(".")[0])
    kept = parameter.detach()[tuple(map(slice, shape))].clone()
    setattr(module, path.rpartition(".")[2], nn.Parameter(kept))
    if len(shape) == 2:  # the numbers by which linear layers know their shape
        known = ("nx", "nf") if hasattr(module, "nf") else ("out_features", "in_features")
        vars(module).update(zip(known, shape, strict=True))
'''


def modeling_file(spec: Family) -> str:
    """Name of the file in a checkpoint that defines a family's pruned classes."""
    return f"modeling_{MODEL_TYPE}{spec.model_type}.py"


def modeling_source(spec: Family, dense: PreTrainedModel | None = None) -> str:
    """Return text of the file in a checkpoint that defines a family's pruned classes.

    Args:
        spec: the family's row.
        dense: a dense model of the family; needed where the family's code travels with the checkpoint.

    Raises:
        ConfigError: when such a family's dense model is missing.
    """
    text = _TEMPLATE.read_text(encoding="utf-8").replace("Llama", spec.prefix).replace("llama", spec.model_type)
    text = text.replace(CAUSAL_LM.ending, spec.task.ending)
    return _FAMILY.sub(lambda _: _family(spec, dense), text)


def _family(spec: Family, dense: PreTrainedModel | None) -> str:
    """Return the part of the modelling code in which families differ: imports, names of modules, how a layer is
    built.
    """
    blocks = {
        block.kind: (block.gives, (*spec.leaving(block), *(path for path in block.modules if path != block.gives)))
        for block in spec.blocks
    }
    heads, kv_heads = spec.heads_keys
    rotated = [(block, tensor) for block in spec.blocks for tensor in block.giving(PAIRS)]
    names = _NAMES.format(
        decoder=spec.decoder, layers=spec.layers, depth=spec.depth, part=spec.part, blocks=blocks,
        cache={block.kind: block.cache for block in spec.blocks if block.cache}, heads=heads, kv_heads=kv_heads,
        added_to=any(block.added_to for block in spec.blocks), paired=any(block.paired for block in spec.blocks),
        values=next((tuple(map(block.within, block.valued)) for block in spec.blocks if block.valued), ()),
        rotated=tuple(block.within(tensor.path.rpartition(".")[0]) for block, tensor in rotated),
        neighbours=any(NEIGHBOURS in tensor.dims[0].text for _, tensor in rotated),
        handed=any(block.handed for block in spec.blocks),
        settings={block.path: block.settings for block in spec.blocks if block.settings},
        model_settings=dict(spec.model_settings), note=_SWITCHED if spec.routes(spec.kinds) else "",
    )  # fmt: skip
    resized = [block for block in spec.blocks if block.resized]
    text = _CUT_TO_SIZE if resized else _AS_IT_IS
    built = text.format(prefix=spec.prefix, arguments=spec.layer_arguments, **_sizes(spec, resized))
    names = names.replace("'", '"')
    return f"{_imports(spec, dense)}{names}{built}\n\n"


def _imports(spec: Family, dense: PreTrainedModel | None) -> str:
    """Tell where the stock classes come from.

    Raises:
        ConfigError: when the family's code travels with the model, and there is none.
    """
    if not spec.remote_code:
        stock = {"Config": f"{spec.infix}Config", "Model": f"{spec.infix}{spec.model}", "DecoderLayer": spec.layer,
                 spec.task.ending: spec.causal_lm}  # fmt: skip
        as_ours = {
            end: f"{spec.prefix}{own}" if own == end else f"{spec.prefix}{own} as {spec.prefix}{end}"
            for end, own in stock.items()
        }
        module = spec.model_type.removesuffix(f"_{spec.infix.lower()}") if spec.infix else spec.model_type
        return _STOCK.format(
            module=module, config=as_ours["Config"], model=as_ours["Model"], layer=as_ours["DecoderLayer"],
            causal_lm=as_ours[spec.task.ending],
        )  # fmt: skip
    if dense is None:
        raise ConfigError(f"{spec.model_type}: the code travels with the model; load the folder with trust_remote_code")
    decoder = dense.get_submodule(spec.decoder)
    return _REMOTE.format(
        prefix=spec.prefix,
        config_module=type(dense.config).__module__.rpartition(".")[2],
        config=type(dense.config).__name__,
        module=type(dense).__module__.rpartition(".")[2],
        causal_lm=type(dense).__name__,
        model=type(decoder).__name__,
        layer=type(decoder.get_submodule(f"{spec.layers}.0")).__name__,
    )


def _sizes(spec: Family, resized: list[BlockSpec]) -> dict[str, Any]:
    """Return statements that read a layer's sizes off its configuration, and those that cut its blocks to them."""
    axes = {axis.name for block in resized for axis in BLOCK_KINDS[block.kind].axes}
    cuts = [
        f'cut_to(layer, "{block.within(tensor.path)}", ({", ".join(layout.text for layout in tensor.dims)},))'
        for block in resized
        for tensor in block.tensors
    ]
    cuts += [
        f"layer.{block.within(name)} = {layout.text}" for block in resized for name, layout in block.own_attributes
    ]
    sizes = spec.reading("config")
    if "head_dim" not in sizes and resized:  # no key says it: the dense heads share the hidden size
        sizes["head_dim"] = f'dense["{spec.key("hidden")}"] // dense["{spec.heads_keys[0]}"]'
    counts = [f"{name} = {value}" for name, value in sizes.items()]
    keys = tuple(key for key, text in spec.config.items() if Layout(text).axes & axes)
    return {"counts": "\n    ".join(counts), "cuts": "\n    ".join(cuts), "keys": keys}


def model_class(spec: Family, dense: PreTrainedModel | None = None) -> type[PreTrainedModel]:
    """Return the pruned model of a family; its ``config_class`` is the pruned configuration.

    Args:
        spec: the family's row.
        dense: a dense model of the family; needed where the family's code travels with the checkpoint.

    Raises:
        ConfigError: when such a family's dense model is missing.
    """
    files = {modeling_file(spec): modeling_source(spec, dense)}
    if spec.remote_code:
        files |= _code_of(type(dense)) | _code_of(type(dense.config))  # pyright: ignore[reportOptionalMemberAccess]
    return _load_class(
        f"{modeling_file(spec)[:-3]}.Pruned{spec.prefix}{spec.task.ending}", tuple(sorted(files.items()))
    )


def _code_of(defined: type) -> dict[str, str]:
    """Return the source files that define a class, by name: its own and those it imports from beside it."""
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
    """Return the row of a pruned model's configuration (object or dictionary), or ``None`` when it is not a pruned
    one's.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    first = first_row(str(model_type).removeprefix(MODEL_TYPE)) if str(model_type).startswith(MODEL_TYPE) else None
    return None if first is None else row_for(first, config if isinstance(config, dict) else vars(config))


def spec_of(config: Any) -> Family:
    """Return the row of a configuration, of a pruned model or of a dense one.

    Raises:
        UnsupportedModelError: when it has none.
    """
    return family_of(config) or spec_for(config)


def check_reads_text(folder: str | Path, what: str) -> None:
    """Refuse a folder of an image classifier where language models alone can go on; one without a readable
    configuration is for others to refuse.

    Args:
        folder: of a model, dense or pruned.
        what: what is asked for.

    Raises:
        UnsupportedModelError: naming both.
    """
    if not (task := task_in(folder)).reads_text:
        raise UnsupportedModelError(f"{folder} is an {task.what}: {what} is for language models alone")


def task_in(folder: str | Path) -> Task:
    """Return what the model in a folder is for: a language model where nobody knows."""
    record: dict[str, Any] = {}
    with suppress(OutputError):
        record = read_json(Path(folder) / "config.json")
    return task_of(record)


def task_of(config: Any) -> Task:
    """Return what a model is for, dense or pruned, by its configuration (object or dictionary): a language model where
    nobody knows.
    """
    model_type = config.get("model_type") if isinstance(config, dict) else getattr(config, "model_type", None)
    row = first_row(str(model_type).removeprefix(MODEL_TYPE))
    return CAUSAL_LM if row is None else row.task
