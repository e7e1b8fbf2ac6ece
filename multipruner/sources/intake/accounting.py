"""Whether every tensor of a checkpoint has its place in the model, and every place its tensor; no weight is loaded.

The configuration says which tensors there must be: the stock class is built on the meta device, where a tensor takes
no memory. What could be built wrongly or without end is refused by arithmetic before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

from multipruner.core.errors import ConfigError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import FAMILIES, Family, first_row, spec_for
from multipruner.core.layout import Layout
from multipruner.core.plan import PLAN_FORMAT
from multipruner.storage.tensor_headers import StoredTensor, check_tied, json_object, stored_tensors

from .recognise import QUANTISED, check_wrapper, quantised, quantised_beside, unread
from .spare import spare_names
from .unknown import modules_met

PLAN_FILE = "plan.json"
WIDE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types that weights may have, as safetensors names them, and their bytes."""
RUN_TIME: dict[str, Any] = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}
"""What a configuration may remember of how it was run, and what it is run with here."""
_POSITIONS = ("max_position_embeddings", "sliding_window")
_MOST = 2**31 - 1
"""The largest size in a configuration: positions and widths are 32-bit numbers in most of what reads them."""
_MOST_LAYERS = 10_000
"""Beyond any model, and few enough for lists that a configuration makes of its layers."""
_SCALES = re.compile(r"(_scale|_scale_inv|_scale_2|\.scales|\.biases|\.qweight|\.qzeros|\.g_idx|\.absmax|\.SCB)$")
_PARTS = {
    r"lora_[AB]|lora_embedding": "an adapter that is not merged",
    r"^(score|classifier|v_head|value_head|reward_head|qa_outputs)\.": "a head that is no language model's (reward, "
    "classification)",
    r"vision|visual|multi_modal|mm_projector|audio": "parts of a model of several modalities",
    r"(^|\.)_orig_mod\.": "names of torch.compile's wrapper; save its _orig_mod instead",
    r"^module\.": "names of a parallel wrapper; save its module instead",
}
"""What names of tensors without a place tell."""


def read_config(folder: Path, name: str, trust: bool, *, packed: bool = False, pictures: bool = False) -> Family:
    """Return the family of a folder's model, where its configuration says nothing that stands against pruning it.

    Args:
        folder: of the model.
        name: what to call it in errors.
        trust: whether the model's own code may be run.
        packed: whether quantised weights of a format that is read are no hindrance.
        pictures: whether an image classifier will do.

    Raises:
        UnsupportedModelError: for another family or task, code of the model's own, quantised or pruned weights.
        UnknownModelError: when ``config.json`` cannot be read.
        ConfigError: when a value cannot be meant, or the family's code would have to be trusted and is not.
    """
    record = json_object(folder / "config.json")
    model_type = record.get("model_type")
    if "per_layer_config" in record or str(model_type).startswith("multipruner") or has_plan(folder):
        raise UnsupportedModelError(f"{name} is pruned already; start from the dense model, at a higher ratio")
    if (method := quantised(record)) and not (packed and method in QUANTISED):
        raise UnsupportedModelError(unread(name, method))
    check_wrapper(name, record)
    if not isinstance(model_type, str):
        raise UnsupportedModelError(
            f"config.json of {name} has no model_type; write the family's name into it: {', '.join(sorted(FAMILIES))}"
        )
    try:
        spec = spec_for(record)
    except UnsupportedModelError as error:
        met = "" if first_row(model_type) else modules_met(folder)
        raise UnsupportedModelError(f"{error}{met}") from None
    if not (pictures or spec.task.reads_text):
        there = "pruned by pictures, judged, timed, exported to ONNX"
        raise UnsupportedModelError(f"{name} is an {spec.task.what}: {there}; the rest is for language models")
    _check_class(name, record, spec)
    if spec.remote_code and not trust:
        raise ConfigError(
            f"{name} brings code of its own, which loading it runs; read it, then pass --trust-remote-code"
        )
    _check_sizes(name, spec.part_of(record), spec)
    return spec


def account(
    folder: Path, name: str, config: Any, spec: Family, stored: Mapping[str, StoredTensor] | None = None
) -> dict[str, StoredTensor]:
    """Hold what a folder's weight files contain against what its configuration asks for.

    Args:
        folder: of the model.
        name: what to call it in errors.
        config: its configuration (:func:`build_config`).
        spec: its family.
        stored: the tensors that there will be; default: those in the folder's files.

    Returns:
        The tensors that will be loaded, by name.

    Raises:
        UnsupportedModelError: naming the first tensors that are missing, too many, of another shape, or quantised.
        UnknownModelError: when files are missing or damaged.
        ConfigError: when no model can be built from the configuration.
    """
    stored = stored_tensors(folder) if stored is None else stored
    spare = spare_names(config, spec)
    found = {key: tensor for key, tensor in stored.items() if not spare.search(key)}
    packed = [key for key, tensor in found.items() if tensor.dtype not in WIDE]
    packed += [key for key in found if _SCALES.search(key)]
    if packed:
        beside = quantised_beside([path.name for path in folder.iterdir()])
        raise UnsupportedModelError(
            f"{name} is quantised{f' ({beside})' if beside else ''}: {packed[0]} is stored as "
            f"{found[packed[0]].dtype}; start from the unquantised model, of F16, BF16 or F32 weights"
        )
    if f"{spec.head}.weight" not in found and not any(key.startswith(f"{spec.decoder}.") for key in found):
        found = {f"{spec.decoder}.{key}": tensor for key, tensor in found.items()}  # files of the decoder alone
    _check_layers(name, spec.part_of(config).num_hidden_layers, spec, found)
    if spec.remote_code:
        return found  # what its own code builds is known when it has run
    tied = spec.task.reads_text and bool(config.tie_word_embeddings)
    expected = max(_expected(name, config, spec), key=lambda shapes: len(shapes.keys() & found.keys()))
    _compare(name, found, expected, spec, tied=tied)
    if tied:
        check_tied(name, found, f"{spec.decoder}.{spec.embeddings}.weight", f"{spec.head}.weight")
    return found


def needed_bytes(tensors: Iterable[StoredTensor], dtype: str) -> int:
    """Return bytes that tensors take once loaded, in a type by torch's name or ``auto``: as they are stored."""
    wide = {"float32": 4, "float16": 2, "bfloat16": 2}.get(dtype)
    return sum((wide or WIDE.get(tensor.dtype, 4)) * prod(tensor.shape) for tensor in tensors)


def build_config(name: str, folder: Path, **more: Any) -> Any:
    """Return the configuration object of a folder, without what it remembers of how it was run.

    Raises:
        ConfigError: when the configuration's class refuses a value.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **RUN_TIME, **more)
    except Exception as error:  # of every kind: the class meets values that nobody checked
        raise ConfigError(f"config.json of {name} cannot be meant: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Return what an error of another library says, in one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def has_plan(folder: Path) -> bool:
    """Tell whether a plan of ours lies beside the weights."""
    try:
        return json_object(folder / PLAN_FILE).get("format") == PLAN_FORMAT
    except UnknownModelError:  # none, or somebody else's
        return False


def _check_class(name: str, record: Mapping[str, Any], spec: Family) -> None:
    """Check that the checkpoint's own word for its class is the family's stock class of its task."""
    stock = spec.class_name
    classes = record.get("architectures") or [stock]
    if not isinstance(classes, list) or not all(isinstance(each, str) for each in classes):
        raise ConfigError(f"config.json of {name}: architectures must be a list such as [{stock!r}], not {classes!r}")
    own = record.get("auto_map") if not spec.remote_code else None
    if own:
        code = own.get(spec.task.auto_class) or next(iter(own.values()), "?") if isinstance(own, dict) else own
        raise UnsupportedModelError(
            f"{name} has modelling code of its own ({code}), which may compute another function than {stock}, the "
            "class that is pruned; where the code is the stock one, take auto_map out of config.json, with "
            f"architectures [{stock!r}]"
        )
    if stock.casefold() not in [each.casefold() for each in classes]:
        raise UnsupportedModelError(
            f"{name} is a {', '.join(classes)}, not the {spec.task.what} {stock} (architectures in config.json): "
            "its head would be lost; where it is that class under another name, say so in config.json"
        )


def _check_sizes(name: str, record: Mapping[str, Any], spec: Family) -> None:
    """Refuse sizes that cannot be meant, before anything is built from them.

    Which keys say sizes, and which of them follow from others, is the family's row. Keys that are absent have defaults.
    """
    sizes = {spec.depth: _MOST_LAYERS, **dict.fromkeys(("vocab_size", *spec.config, *_POSITIONS), _MOST)}
    nullable = {*_POSITIONS, *(key for key in spec.config if _follows(key, spec))}
    for key, most in sizes.items():
        value = record.get(key)
        if value is None and (key in nullable or key not in record):
            continue
        least = int(record.get(f"use_{key}") is not False)  # some classes write 0 where it is not used
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ConfigError(f"config.json of {name}: {key} is {value!r}; a whole number from 1 to {most} is needed")
    if any(record.get(key) is None and key not in nullable for key in spec.config):
        return
    try:
        counts = spec.counts(record)
    except ConfigError as error:
        raise ConfigError(f"config.json of {name}: {error}; correct what is wrong") from None
    heads, width = record.get(spec.heads_keys[0]), spec.key("head_dim")
    if heads and counts["hidden"] % heads and not (width and record.get(width)):
        raise ConfigError(
            f"config.json of {name}: the hidden size {counts['hidden']} does not divide into {heads} heads, and no key "
            "says how wide a head is; correct what is wrong"
        )


def _follows(key: str, spec: Family) -> bool:
    """Tell whether a family's other keys are enough to know all sizes without this one."""
    layouts = {other: Layout(text) for other, text in spec.config.items() if other != key}
    try:
        spec.counts({other: layout.size(dict.fromkeys(layout.names, 1)) for other, layout in layouts.items()})
    except ConfigError:
        return False
    return True


def _check_layers(name: str, said: int, spec: Family, found: Mapping[str, StoredTensor]) -> None:
    """Check the number of layers, by the names alone: a model of a billion layers must not be built to be compared."""
    pattern = re.compile(rf"^(?:{re.escape(spec.decoder)}\.)?{re.escape(spec.layers)}\.(\d{{1,9}})\.")
    numbers = {int(match[1]) for key in found if (match := pattern.match(key))}
    if not numbers or said == len(numbers) == max(numbers) + 1:
        return
    files = f"config.json says {said} layers, the files hold {len(numbers)}"
    if said > len(numbers):
        first = next(number for number in range(said) if number not in numbers)
        raise UnsupportedModelError(
            f"{name} lacks weights: {spec.decoder}.{spec.layers}.{first} and what comes with it ({files})"
        )
    raise UnsupportedModelError(
        f"{name} has tensors without a place: layer {max(numbers)} ({files}); correct num_hidden_layers, or save the "
        "smaller model with save_pretrained"
    )


def _expected(name: str, config: Any, spec: Family) -> list[dict[str, tuple[int, ...]]]:
    """Return name and shape of every tensor that the stock class of a configuration has: as the class holds them, and
    as checkpoints hold them where transformers convert (one matrix for each expert, say); they read both.
    """
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            model = getattr(transformers, spec.class_name)(config)
            own = model.state_dict()
            layouts = [own, revert_weight_conversion(model, dict(own))]
        return [{key: tuple(tensor.shape) for key, tensor in layout.items()} for layout in layouts]
    except Exception as error:  # of every kind: the class meets values that nobody checked
        raise ConfigError(f"no model can be built from config.json of {name}: {reason_of(error)}") from error


def _compare(
    name: str,
    found: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    spec: Family,
    tied: bool,
) -> None:
    head, embeddings = f"{spec.head}.weight", f"{spec.decoder}.{spec.embeddings}.weight"
    spare = head if embeddings in found else embeddings
    missing = sorted(key for key in expected if key not in found and not (tied and key == spare))
    unexpected = sorted(key for key in found if key not in expected)
    if unexpected:
        told = next((text for sign, text in _PARTS.items() if any(re.search(sign, key) for key in unexpected)), None)
        raise UnsupportedModelError(
            f"{name} has {len(unexpected)} tensors without a place in {spec.class_name}: "
            f"{_few(unexpected)}{f' ({told})' if told else ''}{_lacks(missing)}; save the language model alone, with "
            "the configuration that is its own"
        )
    if missing:
        tying = "; if head and embeddings are one matrix, config.json must say tie_word_embeddings"
        raise UnsupportedModelError(f"{name} lacks weights: {_few(missing)}{tying if head in missing else ''}")
    for key, tensor in found.items():
        if tensor.shape != expected[key]:
            raise UnsupportedModelError(
                f"{name}: {key} has shape {list(tensor.shape)}, the configuration asks for {list(expected[key])}; "
                "take the config.json that belongs to these weights"
            )


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _lacks(missing: list[str]) -> str:
    return f", and lacks {_few(missing)}" if missing else ""
