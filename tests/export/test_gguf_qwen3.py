"""Qwen3 in GGUF: ``openelm`` where layers differ, the family's own architecture where they are alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import PreTrainedModel

from multipruner.core.errors import UnsupportedModelError
from multipruner.core.structure import Structure
from multipruner.export.gguf import export_gguf
from tests.support import tiny
from tests.support.gguf_cases import MIXED, UNIFORM, pruned_folder
from tests.support.layers import layers_of, structure_of
from tests.support.llama_cpp import check_llama

HEAD, HIDDEN = 16, 48
WRITTEN = {"head_count": [1, 4, 2, 1, 4], "head_count_kv": [1, 2, 1, 1, 2], "feed_forward_length": [23, 32, 7, 32, 40]}
"""What ``openelm`` is told of MIXED: a zero head wherever attention is gone, 32 zero channels wherever the MLP is."""
NAMES = {
    "attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def _folder(folder: Path, structure: Structure = MIXED, *, tied: bool = True, **config: Any) -> PreTrainedModel:
    return pruned_folder(folder, "qwen3", structure, tied=tied, **config)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def test_every_tensor_and_array_of_mixed_layers_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    state = {name: tensor.numpy() for name, tensor in _folder(tmp_path / "run").state_dict().items()}
    done = export_gguf(tmp_path / "run", outtype="f32")
    fields, tensors = _read(done.path)
    assert done.architecture == fields["general.architecture"] == "openelm"
    for key, values in WRITTEN.items():
        assert fields[("openelm." if key.startswith("feed") else "openelm.attention.") + key] == values, key
    assert fields["openelm.block_count"] == 5 and fields["openelm.rope.dimension_count"] == HEAD
    assert fields["openelm.attention.key_length"] == fields["openelm.attention.value_length"] == HEAD

    assert np.array_equal(tensors.pop("token_embd.weight"), state["model.embed_tokens.weight"])
    assert np.array_equal(tensors.pop("output_norm.weight"), state["model.norm.weight"])
    assert len(tensors) == 5 * 9, "norm, qkv, two head norms, output; norm, gate, up, down"
    for number, size in enumerate(size for size in layers_of(MIXED) if any(size)):
        layer, block = f"model.layers.{number}", f"blk.{number}"
        qkv, heads = tensors.pop(f"{block}.attn_qkv.weight"), WRITTEN["head_count"][number]
        assert qkv.shape == ((heads + 2 * WRITTEN["head_count_kv"][number]) * HEAD, HIDDEN)
        if size.kv_heads:
            rows = [state[f"{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
            assert [len(part) for part in rows] == [size.query_heads * HEAD, *[size.kv_heads * HEAD] * 2]
            assert np.array_equal(qkv, np.concatenate(rows)), "queries, keys, values, halves where they were"
        else:
            assert not qkv.any()
        for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "attn_output", "ffn_norm", "ffn_gate", "ffn_up",
                     "ffn_down"):  # fmt: skip
            values = tensors.pop(f"{block}.{name}.weight")
            if size.kv_heads if name.startswith("attn") else size.channels:
                assert np.array_equal(values, state[f"{layer}.{NAMES[name]}.weight"]), (number, name)
            else:
                assert (values == ("norm" in name)).all(), (number, name)
    assert not tensors


@pytest.mark.parametrize("tied", [True, False])
def test_uniform_layers_take_qwen3_itself(tied: bool, tmp_path: Path) -> None:
    state = {n: t.numpy() for n, t in _folder(tmp_path / "run", UNIFORM, tied=tied).state_dict().items()}
    done = export_gguf(tmp_path / "run", outtype="f32")
    fields, tensors = _read(done.path)
    assert done.architecture == fields["general.architecture"] == "qwen3"
    assert (fields["qwen3.attention.head_count"], fields["qwen3.attention.head_count_kv"]) == (2, 1)
    assert fields["qwen3.feed_forward_length"] == 24
    ours = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", **({} if tied else {"output": "lm_head"})}
    ours |= {f"blk.{n}.{a}": f"model.layers.{n}.{b}" for n in range(len(layers_of(UNIFORM))) for a, b in NAMES.items()}
    assert set(tensors) == {f"{name}.weight" for name in ours}
    for name, source in ours.items():
        assert np.array_equal(tensors[f"{name}.weight"], state[f"{source}.weight"]), name


def test_what_neither_architecture_computes_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    cases: list[tuple[Structure, dict[str, Any], str]] = [
        (MIXED, {"tied": False}, r"'openelm' takes no output projection besides .* or prune with --layout uniform"),
        (MIXED, {"attention_bias": True}, r"'qwen3' takes no layers that differ, no biases; 'openelm' .* biases"),
        (UNIFORM, {"rope_parameters": rope}, r"'qwen3' takes no scaled rotary .* load the folder with transformers$"),
    ]
    for number, (structure, config, message) in enumerate(cases):
        _folder(tmp_path / str(number), structure, **config)
        with pytest.raises(UnsupportedModelError, match=message):
            export_gguf(tmp_path / str(number))
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    "structure",
    [
        MIXED,
        structure_of((2, 1, 0), (4, 2, 13), (0, 0, 9)),
        structure_of((2, 2, 13), (4, 2, 0), (1, 1, 40)),
    ],
    ids=["mixed", "cut ends", "partial KV groups"],
)
def test_llama_cpp_computes_the_same_of_mixed_layers(structure: Structure, tmp_path: Path) -> None:
    model = _folder(tmp_path / "run", structure)
    assert {name.rpartition(".")[2] for name, _ in model.named_modules()} >= {"q_norm", "k_norm"}
    check_llama(tmp_path / "run", model, "openelm")


@pytest.mark.llama_cpp
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_computes_the_same_of_uniform_layers(tied: bool, tmp_path: Path) -> None:
    check_llama(tmp_path / "run", _folder(tmp_path / "run", UNIFORM, tied=tied), "qwen3")


def test_the_pruned_model_is_the_dense_one_with_parts_zeroed() -> None:
    from multipruner.checkpoint.cut import apply_plan

    dense = tiny.tiny_model("qwen3", tied=True, layers=4)
    plan, ids = tiny.random_plan(dense, 3), tiny.random_ids()
    with torch.no_grad():
        difference = apply_plan(dense, plan)(ids).logits - tiny.masked_model(dense, plan)(ids).logits
    assert difference.abs().max() < 1e-4
