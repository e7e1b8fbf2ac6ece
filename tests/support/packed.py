"""Tiny checkpoints whose projections are quantised: random numbers in the layout of each format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from multipruner.storage.tensor_headers import StoredTensor, stored_tensors
from tests.support.inputs import FILE, Weights, edit_json, write_model

CASES = Path(__file__).parents[1] / "fixtures" / "quantised" / "quantised.safetensors"
SIZES = {"hidden_size": 64, "intermediate_size": 64, "dtype": torch.bfloat16}
"""Widths that words of eight numbers and groups of 32 divide."""
SETTINGS: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 48], "activation_scheme": "dynamic"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]},
}


def _words(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int()


def _packed(method: str, name: str, weight: torch.Tensor, generator: torch.Generator) -> Weights:
    """The tensors that stand for a matrix of this shape; their numbers are others."""
    rows, columns = weight.shape[-2:]
    stem, scale = name.removesuffix("weight"), torch.rand(rows, generator=generator) * 0.1
    if method == "fp8":
        blocks = torch.rand(-(-rows // 32), -(-columns // 48), generator=generator)
        return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": blocks}
    if method == "compressed-tensors":
        numbers = torch.randint(-128, 128, weight.shape, generator=generator).to(torch.int8)
        return {name: numbers, f"{name}_scale": scale[:, None].bfloat16() / 10}
    if method == "bitsandbytes":
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, columns]}
        numbers = torch.randint(0, 256, (rows * columns // 2, 1), generator=generator).byte()
        about = torch.tensor(list(json.dumps(state).encode())).byte()
        return {name: numbers, f"{name}.absmax": torch.rand(rows * columns // 64, generator=generator),
                f"{name}.quant_map": torch.linspace(-1, 1, 16),
                f"{name}.quant_state.bitsandbytes__nf4": about}  # fmt: skip
    groups = columns // 32
    scales = (torch.rand(groups, rows, generator=generator) * 0.02).half()
    zeros = _words(generator, groups, rows // 8)
    shape = (columns // 8, rows) if method == "gptq" else (columns, rows // 8)
    return {f"{stem}qweight": _words(generator, *shape), f"{stem}qzeros": zeros, f"{stem}scales": scales}


def write_packed(folder: Path, method: str, family: str = "llama", **options: Any) -> Path:
    """A tiny model of two layers, of bfloat16, whose projections are quantised; its tokenizer and a text."""
    write_model(folder, family, **{**SIZES, **options})
    generator = torch.Generator().manual_seed(1)
    packed: Weights = {}
    for name, weight in sorted(load_file(folder / FILE).items()):
        if method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            experts, columns, rows = weight.shape
            shape = (experts, rows, columns // 32)
            packed[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator).byte()
            packed[f"{name}_scales"] = torch.randint(120, 126, shape, generator=generator).byte()
        elif method != "mxfp4" and name.endswith("_proj.weight"):
            packed |= _packed(method, name, weight, generator)
        else:
            packed[name] = weight
    packed["model.layers.0.self_attn.k_scale"] = torch.ones(1)  # of a cache of fewer bits: no weight
    save_file({name: tensor.contiguous() for name, tensor in packed.items()}, folder / FILE, {"format": "pt"})
    edit_json(folder / "config.json", quantization_config=SETTINGS[method])
    return folder


def case(name: str, folder: Path) -> tuple[dict[str, StoredTensor], torch.Tensor]:
    """The tensors of a case of the quantisers' own, as a checkpoint's, and what they make of them."""
    found = {
        key.removeprefix(f"{name}/"): value for key, value in load_file(CASES).items() if key.startswith(f"{name}/")
    }
    result = found.pop("=")
    folder.mkdir()
    save_file(found, folder / FILE)
    return stored_tensors(folder), result
