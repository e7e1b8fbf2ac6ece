"""What else vLLM can do with a pruned folder, against transformers: families, LoRA, two processes, fewer bits.

    python .ci/vllm_kinds.py KIND FOLDER

KIND is one of :data:`KINDS`; ``vllm_models.py`` wrote the FOLDER. What vLLM refuses is told with its own words.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from vllm_check import BOUND, Case, cleared, judged, offline, texts

LONGEST = 400
"""Letters of an error that are told, the last ones."""
LENGTHS = (5, 17, 70)
"""Of random prompts, where there is no tokenizer."""
SMALL: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 128}
PARALLEL: dict[str, dict[str, Any]] = {
    "one process": {},
    "tensor parallel": {"tensor_parallel_size": 2},
    "pipeline parallel": {"pipeline_parallel_size": 2},
}
_AO = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None}}
AT_LOAD: dict[str, dict[str, Any]] = {
    **{name: {"quantization": name} for name in (
        "fp8_per_tensor", "fp8_per_block", "fp8_per_channel", "mxfp8", "int8_per_channel_weight_only", "bitsandbytes")},
    "torchao int8": {
        "quantization": "torchao", "hf_overrides": {"quantization_config_dict_json": json.dumps(_AO)}},
    "fp8 keys and values": {"kv_cache_dtype": "fp8"},
}  # fmt: skip
"""How vLLM is asked to quantise what is not quantised yet."""
GROUP = 32
_ROW = {"symmetric": True, "type": "int"}
STORED: dict[str, tuple[int, dict[str, Any]]] = {
    "int8, activations too": (8, {
        "format": "int-quantized", "weights": {**_ROW, "num_bits": 8, "strategy": "channel"},
        "input_activations": {**_ROW, "num_bits": 8, "strategy": "token", "dynamic": True}}),
    "int8": (8, {"format": "pack-quantized", "weights": {**_ROW, "num_bits": 8, "strategy": "channel"}}),
    "int4": (4, {
        "format": "pack-quantized",
        "weights": {**_ROW, "num_bits": 4, "strategy": "group", "group_size": GROUP}}),
}  # fmt: skip
"""What compressed-tensors say of weights, by name, with the bits of a number."""


def families(folder: Path) -> Iterator[Case]:
    """One random model of every family."""
    for model in sorted(folder.iterdir()):
        yield from tried(model.name, model, model, BOUND)


def adapter(folder: Path) -> Iterator[Case]:
    """LoRA beside a pruned model, against the model into which peft merged it."""
    base, lora = folder / "pruned", {"enable_lora": True, "max_lora_rank": 8}
    yield from tried("adapter", base, folder / "merged", BOUND, adapter=folder / "adapter", **lora)
    yield from tried("without it", base, base, BOUND, **lora)


def parallel(folder: Path) -> Iterator[Case]:
    """One process and two."""
    for name, options in PARALLEL.items():
        yield from tried(name, folder / "pruned", folder / "pruned", BOUND, **options)


def quantised(folder: Path) -> Iterator[Case]:
    """Weights that vLLM quantises when it loads them, and such as are stored so, rounded to the nearest."""
    model, place = folder / "pruned", folder / "stored"
    for name, how in AT_LOAD.items():
        yield from tried(f"when loaded, {name}", model, model, None, dtype="bfloat16", **how)
    for name in STORED:
        rounded(model, place, name)
        yield from tried(f"stored, {name}", place, model, None, dtype="bfloat16")
        shutil.rmtree(place)
    yield from tried("bfloat16", model, model, None, dtype="bfloat16")


KINDS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "families": families, "adapter": adapter, "parallel": parallel, "quantised": quantised
}  # fmt: skip


def tried(what: str, folder: Path, truth: Path, bound: float | None, **options: Any) -> Iterator[Case]:
    """Yield what was written, or say why nothing was."""
    bare = {} if (folder / "tokenizer.json").exists() else SMALL
    try:
        yield Case(what, str(truth), offline(folder, prompts_for(folder), **bare, **options), bound)
    except Exception as error:
        print(f"{what}: refused, {' '.join(repr(error).split())[-LONGEST:]}", flush=True)
    cleared()


def prompts_for(folder: Path) -> list[list[int]]:
    """Texts where there is a tokenizer, else random tokens."""
    if (folder / "tokenizer.json").exists():
        return texts(folder)
    config, drawn = json.loads((folder / "config.json").read_text()), random.Random(0)
    return [[drawn.randrange(4, config["vocab_size"]) for _ in range(length)] for length in LENGTHS]


def rounded(folder: Path, place: Path, name: str) -> None:
    """Write a folder with the matrices of all layers rounded, as compressed-tensors store them."""
    bits, scheme = STORED[name]
    shutil.copytree(folder, place, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {}
    for file in folder.glob("*.safetensors"):
        for key, tensor in load_file(file).items():
            if ".layers." in key and tensor.dim() == 2:
                tensors |= {f"{key}{end}": part for end, part in packed(tensor.float(), bits, scheme).items()}
            else:
                tensors[key] = tensor
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    group = {key: value for key, value in scheme.items() if key != "format"}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": scheme["format"], "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": {"targets": ["Linear"], **group}},
    }  # fmt: skip
    (place / "config.json").write_text(json.dumps(config))


def packed(weight: torch.Tensor, bits: int, scheme: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Round a matrix to the nearest; return its tensors by how their names go on after ``weight``."""
    most, (rows, columns) = 2 ** (bits - 1) - 1, weight.shape
    blocks = weight.view(rows, -1, scheme["weights"].get("group_size", columns))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-8) / most
    whole = (blocks / scale).round().clamp(-most - 1, most).view(rows, columns).to(torch.int8)
    scales = scale[..., 0].to(torch.bfloat16)
    if scheme["format"] == "int-quantized":
        return {"": whole, "_scale": scales}
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    shape = torch.tensor([rows, columns])
    return {"_packed": pack_to_int32(whole, bits), "_scale": scales, "_shape": shape}


if __name__ == "__main__":
    kind, folder = sys.argv[1:]
    found: list[Case] = []
    try:
        found.extend(KINDS[kind](Path(folder)))
    finally:  # what was written is told, also where vLLM ended early
        judged(found)
