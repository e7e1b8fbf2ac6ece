"""llama.cpp itself computes from our GGUF files what transformers compute from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multipruner.checkpoint.load import load
from multipruner.core.structure import Structure
from multipruner.export.gguf import export_gguf
from multipruner.export.gguf_tokenizer import PRE
from tests.support.gguf_cases import (
    CHAT,
    TEXT,
    UNIFORM,
    VARIANTS,
    VOCABULARY,
    byte_level,
    pruned_folder,
    sentencepiece_like,
)
from tests.support.layers import structure_of
from tests.support.llama_cpp import check_llama, opened

pytestmark = pytest.mark.llama_cpp
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "mistral-sliding"])
def test_llama_cpp_computes_the_same_of_mixed_layers(variant: str, tmp_path: Path) -> None:
    check_llama(tmp_path / "run", pruned_folder(tmp_path / "run", variant), "deci")


@pytest.mark.parametrize("last", [(0, 0, 9), (2, 1, 0)], ids=["without attention", "without MLP"])
def test_llama_cpp_computes_the_same_with_a_cut_last_layer(last: tuple[int, int, int], tmp_path: Path) -> None:
    structure = structure_of((2, 1, 0), (4, 2, 13), last)
    check_llama(tmp_path / "run", pruned_folder(tmp_path / "run", "qwen2", structure), "deci")


@pytest.mark.parametrize("variant", ["llama", "qwen2"])
def test_llama_cpp_computes_the_same_of_partial_kv_groups(variant: str, tmp_path: Path) -> None:
    structure = structure_of((4, 2, 7), (2, 2, 0), (2, 1, 13), (1, 1, 40))
    check_llama(tmp_path / "run", pruned_folder(tmp_path / "run", variant, structure), "deci")


@pytest.mark.parametrize(
    ("variant", "structure", "config", "architecture"),
    [
        ("llama", UNIFORM, {}, "llama"),
        ("llama-biased", UNIFORM, {}, "llama"),
        ("llama", structure_of(*[(5, 5, 40)] * 2), {"num_attention_heads": 6, "num_key_value_heads": 6}, "llama"),
        ("mistral", UNIFORM, {}, "llama"),
        ("llama", structure_of(*[(2, 2, 24)] * 2), {}, "llama"),
        ("qwen2", UNIFORM, {}, "deci"),
        ("qwen2", structure_of(*[(4, 2, 24)] * 3), {"hidden_size": 64}, "qwen2"),
    ],
)
def test_llama_cpp_computes_the_same_of_uniform_layers(
    variant: str, structure: Structure, config: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    check_llama(tmp_path / "run", pruned_folder(tmp_path / "run", variant, structure, **config), architecture)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ROPES)
def test_llama_cpp_computes_the_same_with_scaled_rotary_embeddings(kind: str, family: str, tmp_path: Path) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    square = structure_of(*[(4, 2, 24)] * 3)
    model = pruned_folder(tmp_path / "run", family, square, hidden_size=64, rope_parameters=rope)
    check_llama(tmp_path / "run", model, {"llama": "llama", "qwen2": "deci"}[family])


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_llama_cpp_loads_smaller_types(outtype: str, tmp_path: Path) -> None:
    pruned_folder(tmp_path / "run", hidden_size=64)
    ids = torch.randint(4, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(5))
    done = export_gguf(tmp_path / "run", outtype=outtype)
    with torch.no_grad(), opened(done.path) as llama:
        llama.eval(ids[0].tolist())
        logits = load(tmp_path / "run")(ids).logits[0].numpy()
        error = np.abs(np.array(llama.scores[:80]) - logits).mean() / np.abs(logits).mean()
    assert error < {"f16": 2e-2, "bf16": 1e-1, "q8_0": 2e-1}[outtype], (
        f"{error}; random weights: another model gives about 1.4"
    )


@pytest.mark.parametrize("name", [*sorted(PRE.values()), "sentencepiece", "metaspace"])
def test_llama_cpp_cuts_text_into_the_same_tokens(name: str, tmp_path: Path) -> None:
    made = {"sentencepiece": sentencepiece_like, "metaspace": lambda: sentencepiece_like(metaspace=True)}
    tokenizer = made.get(name, lambda: byte_level(name, bos=True))()
    pruned_folder(tmp_path / "run", tokenizer=tokenizer, vocab_size=len(tokenizer))
    with opened(export_gguf(tmp_path / "run").path) as llama:
        spaced = [] if name == "metaspace" else ["  two  spaces 1234567 ", "<s>x</s>"]
        for text in (TEXT, TEXT[4:], "it's I'M we'LL", "a\n\n\nb", "x</s>", *spaced):
            special = "s>" in text
            ids = tokenizer(text).input_ids
            assert llama.tokenize(text.encode(), add_bos=True, special=special) == ids, text
        assert llama.detokenize(tokenizer(TEXT).input_ids[1:]).decode().strip() == TEXT.strip()
        assert llama.metadata["tokenizer.chat_template"] == CHAT
