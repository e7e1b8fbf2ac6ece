"""Tokenizers of every kind, trained in a moment on this repository's own words."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
TOKENS = 900
KINDS = ("byte-level", "whole words", "sentencepiece", "unigram")


@cache
def corpus() -> list[str]:
    """Lines of this repository's documentation."""
    texts = (path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))
    return [line for text in texts for line in text.splitlines() if len(line) > 40]


@cache
def record_of(kind: str) -> dict[str, Any]:
    """Return what ``tokenizer.json`` holds of a tokenizer of a kind; a text begins with ``<s>``."""
    tokenizer, trainer = _made(kind)
    tokenizer.train_from_iterator(corpus(), trainer)
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    record = json.loads(tokenizer.to_str())
    if kind == "whole words":
        record["model"]["ignore_merges"] = True
    if kind == "sentencepiece":
        record["model"]["byte_fallback"] = True
    return record


def _made(kind: str) -> tuple[Any, Any]:
    if kind in ("byte-level", "whole words"):
        tokenizer: Any = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return tokenizer, trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=SPECIAL, initial_alphabet=alphabet)
    if kind == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        fallback = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence(fallback)
        # bytes are no special tokens: they have to be decoded
        trainer = trainers.BpeTrainer(vocab_size=TOKENS + 256, special_tokens=[*SPECIAL, *BYTES], show_progress=False)
        return tokenizer, trainer
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(vocab_size=TOKENS, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return tokenizer, trainer


def trained(kind: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of a kind as transformers have it, with a chat template."""
    record = {**record_of(kind)}
    if kind == "sentencepiece":
        record["added_tokens"] = [each for each in record["added_tokens"] if each["content"] in SPECIAL]
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(record)),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
    )  # fmt: skip
    found.chat_template = TEMPLATE
    return found
