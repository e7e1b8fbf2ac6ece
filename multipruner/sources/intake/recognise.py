"""What lies in a folder or repository where a model should be, told by names and small files, with the way out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from multipruner.core.errors import UnknownModelError, UnsupportedModelError
from multipruner.core.families import FAMILIES, check_refused, first_row
from multipruner.core.families.towers import TOWERS
from multipruner.storage.tensor_headers import INDEX, SINGLE

ADAPTER = "adapter_config.json"
_PACKED = {
    "quantize_config.json": "GPTQ of AutoGPTQ's form",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
"""Files beside weights that say how these were quantised."""
QUANTISED = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "mxfp4")
"""What ``quantization_config.quant_method`` may say of weights that are read."""
_WAYS_OUT = {"MLX": " (mlx_lm.convert --dequantize writes one)"}
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHERS = {".onnx": "ONNX", ".h5": "TensorFlow", ".msgpack": "Flax", ".npz": "numpy", ".mlmodelc": "Core ML"}
"""Formats of weights that are not read, by the ending of their files."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json", "tiktoken.model")


def check_files(model: str, files: Collection[str], read: Callable[[str], Mapping[str, Any]]) -> None:
    """Refuse what is recognised as something else than a model with safetensors weights.

    Args:
        model: what to call it in errors.
        files: names of the files that are there, subfolders' as ``folder/name``.
        read: gives the object in one of them that is JSON.

    Raises:
        UnknownModelError: when there are no weights that can be read; it names what is there instead.
        UnsupportedModelError: for adapters and for quantised weights.
    """
    names = {name for name in files if "/" not in name}
    weights = SINGLE in names or INDEX in names
    adapter = sorted(name for name in names if name.startswith("adapter_model."))
    if ADAPTER in names or adapter:
        about = read(ADAPTER) if ADAPTER in names else {}
        raise UnsupportedModelError(_adapter(model, about, weights and "config.json" in names))
    if "config.json" not in names:
        raise UnknownModelError(f"{model} holds no config.json, so it is no model folder{_instead(model, names)}")
    if weights:
        return
    packed = next((kind for name, kind in _PACKED.items() if name in names), None)
    if packed:
        raise UnsupportedModelError(unread(model, packed))
    other = sorted(name for name in names if name.endswith(".safetensors"))
    kind = f"weights under another name than {SINGLE} ({other[0]})" if other else _other_weights(files)
    raise UnknownModelError(
        f"{model} has {kind}; only safetensors are loaded, from {SINGLE} or {INDEX}: convert it (save_pretrained "
        "writes them) and name the folder, or pick a --revision that has them"
    )


def check_wrapper(model: str, record: Mapping[str, Any]) -> None:
    """Refuse a model of several modalities, whose language model is a part of it.

    Args:
        model: what to call it in errors.
        record: its ``config.json``.

    Raises:
        UnsupportedModelError: naming the part, and how to take it out, or why no model of the family can be pruned.
    """
    check_refused(record.get("model_type"))
    inner = record.get("text_config") or record.get("llm_config") or record.get("language_config")
    if first_row(record.get("model_type")) or not isinstance(inner, dict):
        return
    raise UnsupportedModelError(
        f"{model} is a model of several modalities ({record.get('model_type')}), whose language model "
        f"({inner.get('model_type', 'of no model_type')}, in text_config) is a part of it, and none whose text tower "
        f"is taken out by itself ({', '.join(sorted(TOWERS))}); load it with transformers, save the language model and "
        "its tokenizer as a folder of their own, and name that folder if its family is among "
        f"{', '.join(sorted(FAMILIES))}"
    )


def quantised(record: Mapping[str, Any]) -> str | None:
    """Tell how a ``config.json`` says that the weights are quantised, or ``None``."""
    for key in ("quantization_config", "quantization", "compression_config"):
        value = record.get(key)
        if value:
            method = value.get("quant_method") if isinstance(value, dict) else value
            return str(method or ("MLX" if key == "quantization" else "unknown"))
    return None


def unread(name: str, method: str) -> str:
    """Return why quantised weights are not read, and the ways out.

    Args:
        name: of the model.
        method: how they are quantised, by :func:`quantised` or :func:`quantised_beside`.
    """
    own = _WAYS_OUT.get(method.partition(":")[0], "")
    return (
        f"{name} is quantised ({method}), which is not read ({', '.join(QUANTISED)} in config.json are, and GGUF "
        f"files): start from the unquantised model{own}, or save what transformers' model.dequantize() makes of it "
        "where the quantiser's package is installed, and name that folder"
    )


def quantised_beside(files: Collection[str]) -> str | None:
    """Tell how a file beside the weights says that they are quantised, or ``None``."""
    return next((f"{kind}: {name}" for name, kind in _PACKED.items() if name in files), None)


def _adapter(model: str, about: Mapping[str, Any], beside: bool) -> str:
    kind = str(about.get("peft_type") or "LoRA").replace("LORA", "LoRA")
    base = about.get("base_model_name_or_path") or "its base model"
    if beside:
        return (
            f"{model} has an adapter ({kind} of {base}, {ADAPTER}) beside its weights, which loading would add to "
            "them: where it is merged already, move the adapter_* files away; else merge it first (peft's "
            "merge_and_unload, then save_pretrained)"
        )
    return (
        f"{model} is an adapter ({kind}) of {base}, no model: name {base} to prune that, or merge first "
        "(peft.AutoPeftModelForCausalLM.from_pretrained, merge_and_unload, save_pretrained) and name the merged folder"
    )


def _instead(model: str, names: Collection[str]) -> str:
    packed = sorted(name for name in names if name.endswith(".gguf"))
    if packed:
        return f"; name the file itself: {model}/{packed[0]}"
    if "params.json" in names:
        return "; params.json is of the makers' own format: take the version for transformers"
    return f"; it has {_other_weights(names)}" if names else ""


def _other_weights(files: Collection[str]) -> str:
    if any(name.endswith(_PICKLED) for name in files):
        return "only pickled weights, which can run any code when read"
    for ending, kind in _OTHERS.items():
        if any(name.endswith(ending) for name in files):
            return f"only {kind} weights"
    return "no weights"
