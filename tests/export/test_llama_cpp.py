"""llama.cpp itself computes from our GGUF files what transformers compute from the checkpoint."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multipruner.checkpoint.load import load
from multipruner.commands import export
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
from tests.support.llama_cpp import check_llama, log_probabilities, opened

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
    with opened(done.path) as llama:
        error = _error(llama.everywhere(ids[0].tolist(), VOCABULARY, 60), load(tmp_path / "run"), ids)
    assert error < {"f16": 2e-2, "bf16": 1e-1, "q8_0": 2e-1}[outtype]


def _error(found: Any, model: Any, ids: torch.Tensor) -> float:
    """Mean difference over the spread; random weights: another model gives about 1.1."""
    exact = log_probabilities(model, ids)[-len(found) :]
    return float(np.abs(found - exact).mean() / exact.std())


@pytest.mark.skipif(
    shutil.which("llama-quantize") is None and find_spec("llama_cpp") is None,
    reason="llama.cpp's quantiser is not here",
)
def test_llama_cpp_computes_from_what_its_quantiser_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    structure = structure_of((0, 0, 256), (4, 2, 512), (2, 1, 0), (4, 2, 300))
    model = pruned_folder(tmp_path / "run", structure=structure, hidden_size=256, head_dim=64, intermediate_size=512)
    ids = torch.randint(4, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(5))
    errors = {}
    for quant in ("q3_k_m", "q6_k"):
        assert export.run([str(tmp_path / "run"), "--quant", quant]) == 0
        said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("export, ")]
        assert said[0].startswith(f"{quant} wants rows of a multiple of 256; 2 of ")
        assert said[0].endswith(": 128 (1), 300 (1, f16)")
        assert said[1] == "pruned with --align 256, the widths that pruning chooses fit"
        assert f"{quant}, " in said[2] and said[3].startswith("by type, with tensors: ") and "_K " in said[3]
        assert sorted(path.name for path in tmp_path.glob("*.gguf"))[-1] == f"run-{quant}.gguf"
        with opened(tmp_path / f"run-{quant}.gguf") as llama:
            errors[quant] = _error(llama.everywhere(ids[0].tolist(), VOCABULARY, 70), model, ids)
    assert errors["q6_k"] < 0.3 < errors["q3_k_m"] < 0.9, errors


@pytest.mark.parametrize("name", [*sorted(PRE.values()), "sentencepiece", "metaspace"])
def test_llama_cpp_cuts_text_into_the_same_tokens(name: str, tmp_path: Path) -> None:
    made = {"sentencepiece": sentencepiece_like, "metaspace": lambda: sentencepiece_like(metaspace=True)}
    tokenizer = made.get(name, lambda: byte_level(name, bos=True))()
    pruned_folder(tmp_path / "run", tokenizer=tokenizer, vocab_size=len(tokenizer))
    with opened(export_gguf(tmp_path / "run").path) as llama:
        spaced = [] if name == "metaspace" else ["  two  spaces 1234567 ", "<s>x</s>"]
        for text in (TEXT, TEXT[4:], "it's I'M we'LL", "a\n\n\nb", "x</s>", *spaced):
            assert llama.tokenize(text, special="s>" in text) == tokenizer(text).input_ids, text
        assert llama.detokenize(tokenizer(TEXT).input_ids[1:]).strip() == TEXT.strip()
        assert llama.chat_template == CHAT
