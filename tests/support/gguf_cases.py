"""Tiny pruned models in folders, with tokenizers of the kinds that llama.cpp knows, trained in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.core.structure import Structure
from multipruner.export.gguf_tokenizer import PRE
from tests.support import tiny
from tests.support.layers import structure_of

VOCABULARY = 360
MIXED = structure_of((0, 0, 23), (4, 2, 0), (0, 0, 0), (2, 1, 7), (0, 0, 32), (4, 2, 40))
"""Six layers, of which the first has no attention, the second no MLP, the third neither, the fifth no attention."""
UNIFORM = structure_of(*[(2, 1, 24)] * 6)
_ELSEWHERE = ("baichuan", "qwen2-mixed", "qwen3", "qwen3-tied")  # has no such file, or its own tests
VARIANTS = {name: options for name, options in tiny.VARIANTS.items() if name not in _ELSEWHERE}
TEXT = (
    "The year 1984 began on a Sunday; it's said that 12,345 people weren't there.\n\n"
    "We'll see: they've 3 apples, I'd say, and the others had 77!\tDon't   panic...\r\n"
    "Ünïcödé wörds, Καλημέρα κόσμε, добрый день, 你好世界 and 🚀🚀 (twice).\n"
    "def f(x):\n    return x ** 2  # CamelCase and snake_case, HTTPServer\n"
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
CHAT = "{% for message in messages %}{{ message['content'] }}{{ eos_token }}{% endfor %}"
_ANY = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_STEPS: dict[str, Any] = {
    "ByteLevel regex": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "Digits": lambda: pre_tokenizers.Digits(individual_digits=True),
}


def _step(name: str) -> Any:
    return _STEPS[name]() if name in _STEPS else pre_tokenizers.Split(Regex(name), "isolated")


def byte_level(pre: str = "gpt-2", *, bos: bool = False, size: int = 340) -> PreTrainedTokenizerFast:
    """A byte-level byte-pair encoding with the pre-tokenizer of that name, and a token ``<tool>`` that is not special.

    Args:
        pre: one of the names in :data:`PRE`.
        bos: whether ``<s>`` is put before text.
        size: of the vocabulary.
    """
    ((steps, ignore_merges),) = [key for key, name in PRE.items() if name == pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    parts = [_step(name) for name in steps]
    parts += [] if steps[-1] == "ByteLevel regex" else [_ANY]
    set_part(tokenizer, "pre_tokenizer", pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size - 1, special_tokens=SPECIAL, initial_alphabet=alphabet)  # pyright: ignore
    tokenizer.train_from_iterator([TEXT] * 2, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    return _wrapped(tokenizer, bos)


def sentencepiece_like(*, metaspace: bool = False) -> PreTrainedTokenizerFast:
    """What transformers makes of a SentencePiece model with byte fallback, ``<s>`` before text.

    Args:
        metaspace: spaces become U+2581 in the pre-tokenizer (newer conversions), not in the normalizer.
    """
    tokenizer = Tokenizer(models.BPE())
    set_part(tokenizer, "normalizer", normalizers.Replace(" ", "\u2581"))
    tokenizer.train_from_iterator(
        ["\u2581" + line.replace(" ", "\u2581") for line in TEXT.splitlines()] * 2,
        trainers.BpeTrainer(vocab_size=130, special_tokens=[]),  # pyright: ignore
    )
    trained = json.loads(tokenizer.to_str())["model"]
    letters = sorted(trained["vocab"], key=trained["vocab"].get)
    vocabulary = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *letters, SPECIAL[3]]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in trained["merges"]]
    ids = {token: number for number, token in enumerate(vocabulary)}
    model = models.BPE(vocab=ids, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if metaspace:
        step = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
        set_part(tokenizer, "pre_tokenizer", step)
    else:
        replace = normalizers.Replace(" ", "\u2581")
        set_part(tokenizer, "normalizer", normalizers.Sequence([normalizers.Prepend("\u2581"), replace]))
    tokenizer.add_special_tokens(SPECIAL)
    return _wrapped(tokenizer, True)


def set_part(tokenizer: Tokenizer, name: str, part: Any) -> None:
    setattr(tokenizer, name, part)  # the type stubs do not know that these can be set


def _wrapped(tokenizer: Tokenizer, bos: bool) -> PreTrainedTokenizerFast:
    if bos:
        number = tokenizer.token_to_id("<s>")
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", number)])
        set_part(tokenizer, "post_processor", template)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **names)


def pruned_folder(
    folder: Path, variant: str = "llama", structure: Structure = MIXED, tokenizer: Any = None, **config: Any
) -> PreTrainedModel:
    """A pruned model, saved; returned as it is in memory."""
    options = {**VARIANTS.get(variant, {"family": variant}), "layers": len(structure) // 2, "vocab_size": VOCABULARY}
    model = tiny.tiny_model(**{**options, **config})
    plan = tiny.plan_for(model, structure, seed=1)
    pruned = apply_plan(model, plan)
    card = "---\nbase_model: someone/Tiny-1B\nlicense: mit\nlanguage: [en]\ntags: [pruned]\n---\n# card\n"
    save(folder, pruned, tokenizer or byte_level(), plan=plan, report={}, card=card)
    return pruned
