"""Checkpoints of random weights in the shapes of published models, with a tokenizer and a text: nothing is downloaded.

They are written shard by shard, a layer at a time. What a run takes hardly depends on the numbers; what it chooses
means nothing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from multipruner.stream.write import saved_tensors

_SHARED = {"max_position_embeddings": 4096, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}
_LONG = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "0.01b": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
              "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
    "0.1b": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "moe-1b": {"model_type": "qwen3_moe", "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 384,
               "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64,
               "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True, "vocab_size": 32000,
               "tie_word_embeddings": True},
    "llama-tiny": {"model_type": "llama", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4400, "tie_word_embeddings": True},
    "llama-2-7b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
                   "tie_word_embeddings": False},
    "llama-3.1-8b": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
                     "tie_word_embeddings": False, "max_position_embeddings": 131072, "rope_parameters": _LONG},
}  # fmt: skip
"""Configurations of Qwen 2.5 (and, at 0.1 billion, the sizes of SmolLM2) by their billions of parameters, of Llama by
name, and of a mixture of 64 experts such as Qwen 3's."""
WORDS = 4096
"""Of the vocabulary that the random text is of."""
TEXT = 200_000
"""Words of the text, where nothing else is said."""
_INDEX = "model.safetensors.index.json"


def checkpoint(shape: Mapping[str, Any], folder: Path, device: str = "cpu") -> Path:
    """Write a model of random weights, one layer's at a time; nothing where it is there already.

    Args:
        shape: keys of its configuration; without ``model_type`` it is a Qwen 2.
        folder: to write.
        device: that draws the numbers, which are others on a GPU.
    """
    if (folder / _INDEX).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(shape), dtype=torch.bfloat16)
    generator, placed = torch.Generator(device).manual_seed(0), dict[str, str]()
    for number, names in enumerate(_parts(model)):
        tensors = {name: _drawn(name, tuple(tensor.shape), generator) for name, tensor in names.items()}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, file)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    _tokenizer(folder)
    size = sum(tensor.numel() * 2 for tensor in model.parameters())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / _INDEX).write_text(json.dumps(index))
    return folder


def _config(shape: Mapping[str, Any]) -> Any:
    keys = {**_SHARED, **shape}
    return AutoConfig.for_model(keys.pop("model_type", "qwen2"), **keys)


def _parts(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of the layers, and of what is outside of them, layer by layer, as they are published: experts
    one by one.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in saved_tensors(model).items():
        words = name.split(".")
        parts.setdefault(words[2] if words[1] == "layers" else "outside", {})[name] = tensor
    yield from parts.values()


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return one tensor: norms near one, biases near zero, rows of matrices of length one half."""
    noise = torch.randn(prod(shape), generator=generator, device=generator.device).view(shape)
    if len(shape) == 1:
        return (0.02 * noise + ("norm" in name)).to("cpu", torch.bfloat16)
    return noise.mul_(0.5 / shape[1] ** 0.5).to(torch.bfloat16).cpu()


def _tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<s>", "</s>", *letters, *_words()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _words() -> list[str]:
    return [f"word{number}" for number in range(WORDS)]


def text(folder: Path, length: int = TEXT) -> Path:
    """Write so many random words, a line of 64 each, some far more often than others; every one is a token."""
    drawn, words = random.Random(0), _words()
    weights = [1 / (1 + number) for number in range(WORDS)]
    rows = [" ".join(drawn.choices(words, weights, k=64)) for _ in range(length // 64)]
    (folder / "text.txt").write_text("\n\n".join(rows))
    return folder / "text.txt"
