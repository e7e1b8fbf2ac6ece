"""GGUF files in the types that people download are read as what the gguf package makes of their blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from multipruner.sources import gguf as gguf_source

HALVES = {
    "Q2_K": (-4, -2), "Q3_K": (-2,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (-2,), "IQ4_XS": (0,), "IQ4_NL": (0,),
    "Q4_0": (0,), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
}  # fmt: skip
"""Where the 16-bit scales of a block lie (ggml-common.h of llama.cpp), by type."""
READ = [*HALVES, "F16", "BF16"]


def blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Random blocks of a type with scales that are numbers, (rows, bytes)."""
    if kind.name == "F16":
        return rng.normal(0, 0.2, (rows, columns)).astype(np.float16)
    if kind.name == "BF16":
        return gguf.quants.quantize(rng.normal(0, 0.2, (rows, columns)).astype(np.float32), kind)
    per, size = gguf.GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows * columns // per, size), dtype=np.uint8)
    for place in HALVES[kind.name]:
        at = place % size
        data[:, at : at + 2] = rng.uniform(1e-4, 2e-3, len(data)).astype(np.float16)[:, None].view(np.uint8)
    return data.reshape(rows, -1)


@pytest.mark.parametrize("name", READ)
def test_a_type_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    kind, rng = gguf.GGMLQuantizationType[name], np.random.default_rng(0)
    writer = gguf.GGUFWriter(path := tmp_path / "small.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    letters = [chr(0x21 + n) for n in range(94)] + [chr(0x100 + n) for n in range(201)] + ["ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "<pad>", *letters])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * len(letters))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    wanted = {}
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        data = blocks(kind, 256, 256, rng)
        wanted[part] = gguf.quants.dequantize(data, kind)
        writer.add_tensor(f"blk.0.{part}.weight", data, raw_dtype=kind)
    for one, shape in {
        "token_embd": (len(letters) + 3, 256),
        "output_norm": 256,
        "blk.0.attn_norm": 256,
        "blk.0.ffn_norm": 256,
    }.items():
        writer.add_tensor(f"{one}.weight", rng.normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = load_file(gguf_source.from_file(path, lambda text: None) / "model.safetensors")
    places = {f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")}
    for place, part in {**places, "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}.items():
        found = made[f"model.layers.0.{place}.weight"]
        assert torch.equal(found, torch.tensor(wanted[part]).bfloat16()), part
