"""Models of families without a row: what they are made of is said before anything is computed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import DiffLlamaConfig, GPT2Config, GPT2LMHeadModel

from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import spec_for
from multipruner.sources.intake.accounting import account, read_config


def test_the_modules_of_an_unknown_family_are_named(tmp_path: Path) -> None:
    config = DiffLlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError) as caught:
        read_config(tmp_path, "m", trust=False)
    met = "Its layers hold self_attn (DiffLlamaAttention), mlp (DiffLlamaMLP), input_layernorm (DiffLlamaRMSNorm), "
    assert f"docs/adding-a-family.md. {met}" in str(caught.value)


@pytest.mark.parametrize("record", [{"model_type": "nobody"}, {"model_type": "diffllama", "num_hidden_layers": 10**6},
                                    {"model_type": "diffllama", "num_attention_heads": "many"}])  # fmt: skip
def test_what_cannot_be_built_is_refused_all_the_same(record: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(UnsupportedModelError, match=r"docs/adding-a-family.md\.$"):
        read_config(tmp_path, "m", trust=False)


def test_a_refused_family_says_why_in_its_multimodal_form_too(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3n", "text_config": {"hidden_size": 8}}))
    with pytest.raises(UnsupportedModelError, match=r"cannot be pruned: .*hidden_size_per_layer_input"):
        read_config(tmp_path, "m", trust=False)


def test_files_of_the_decoder_alone_have_their_places(tmp_path: Path) -> None:
    """As the oldest checkpoints have them, with masks among the tensors."""
    from safetensors.torch import save_file

    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=50))
    model.config.save_pretrained(tmp_path)
    tensors = {name: tensor.clone() for name, tensor in model.transformer.state_dict().items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "model.safetensors")
    found = account(tmp_path, "m", model.config, spec_for(model.config))
    assert set(found) == {f"transformer.{name}" for name in tensors}


def test_a_size_that_follows_from_others_may_be_null(tmp_path: Path) -> None:
    """An MLP four times as wide as the stream, as the family's own code has it."""
    for record in ({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 32, "n_head": 4, "n_layer": 2,
                    "n_inner": None},
                   {"model_type": "falcon", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
                    "ffn_hidden_size": None}):  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(record))
        assert read_config(tmp_path, "m", trust=False).counts(record)["channels"] == 128
