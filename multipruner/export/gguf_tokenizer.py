"""Tokenizer metadata of a GGUF file: from the folder's own tokenizer, or copied from another GGUF file.

llama.cpp knows pre-tokenizers (how text is split before merges apply) by name only. The names in :data:`PRE` were
matched by the regular expressions that llama.cpp's ``llama-vocab.cpp`` lists for each; a tokenizer that splits in
another way is refused, because a wrong name gives other tokens without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFReader, GGUFValueType, TokenType

from multipruner.core.errors import ConfigError, UnsupportedModelError

Field = tuple[str, Any, GGUFValueType, GGUFValueType | None]
"""Key, value, type, and the type of an array's elements."""
Steps = tuple[str, ...]

_GPT2 = "ByteLevel regex"
_DIGITS = "Digits"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE: dict[tuple[Steps, bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((rf"{_WORDS}\p{{N}}{{1,3}}{_REST}",), True): "llama-bpe",
    ((rf"{_WORDS}\p{{N}}{{1,3}}{_REST}",), False): "smaug-bpe",
    ((rf"{_WORDS}\p{{N}}{_REST}",), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
"""Names of byte-level pre-tokenizers, by their steps and whether whole words of the vocabulary skip the merges."""
_LICENSE = "general.license"
_SPACE = "\u2581"
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_INSTEAD = "give the tokenizer of a GGUF file of the base model with --base-gguf FILE"


def tokenizer_fields(folder: Path, config: Any) -> list[Field]:
    """Return the metadata of the tokenizer in a checkpoint folder.

    Args:
        folder: the checkpoint.
        config: the family's stock configuration; ids below its ``vocab_size`` without a token are filled up.

    Raises:
        UnsupportedModelError: when there is no tokenizer, or none of a kind that llama.cpp knows.
    """
    tokenizer = _load(folder, config)
    if tokenizer is None:
        raise UnsupportedModelError(f"{folder} has no tokenizer; {_INSTEAD}")
    record = json.loads(tokenizer.backend_tokenizer.to_str())
    model = record["model"]
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsupportedModelError(
            f"the tokenizer ({model['type']}) is no byte-pair encoding of a known kind; {_INSTEAD}"
        )
    tokens = _tokens(record, config.vocab_size)
    sentencepiece = bool(model.get("byte_fallback")) and _SPACE in json.dumps(
        [record["normalizer"], record["pre_tokenizer"]], ensure_ascii=False
    )
    kind = _sentencepiece(record, tokens) if sentencepiece else _byte_level(record)
    special_ids = {added["id"]: bool(added["special"]) for added in record["added_tokens"]}
    types = [int(_token_type(model, token, special_ids.get(number))) for number, token in enumerate(tokens)]
    names = [token if token is not None else f"[PAD{number}]" for number, token in enumerate(tokens)]
    return [
        *kind,
        _array("tokenizer.ggml.tokens", names, GGUFValueType.STRING),
        _array("tokenizer.ggml.token_type", types, GGUFValueType.INT32),
        *_behaviour(tokenizer),
    ]


def copied_fields(source: Path, folder: Path, config: Any) -> list[Field]:
    """Return the tokenizer metadata of another GGUF file, value by value, and the base model's licence.

    Args:
        source: a GGUF file of the same base model.
        folder: the checkpoint; its tokenizer, if it has one, must have the same tokens.
        config: the family's stock configuration.

    Raises:
        ConfigError: when that is no GGUF file, or one of another tokenizer.
    """
    try:
        reader = GGUFReader(source)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError(f"--base-gguf {source} cannot be read: {error}") from error
    fields = [
        (key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for key, field in reader.fields.items()
        if (key.startswith("tokenizer.") or key == _LICENSE) and len(field.data)
    ]
    values = {key: value for key, value, _, _ in fields}
    tokens, types = values.get("tokenizer.ggml.tokens", []), values.get("tokenizer.ggml.token_type", [])
    if len(tokens) != config.vocab_size:
        count = f"{len(tokens)} tokens, the model {config.vocab_size}"
        raise ConfigError(f"--base-gguf {source} has {count}: another base model")
    tokenizer = _load(folder, config)
    if tokenizer is not None:
        ours = {number: token for token, number in tokenizer.get_vocab().items()}
        for number, (token, kind) in enumerate(zip(tokens, types, strict=False)):
            if kind == TokenType.NORMAL and ours.get(number, token) != token:
                raise ConfigError(
                    f"--base-gguf {source}: token {number} is {token!r}, the folder's tokenizer says {ours[number]!r}"
                )
    return fields


def _load(folder: Path, config: Any) -> Any:
    """Return the folder's tokenizer, or ``None`` without one that is described by ``tokenizer.json``.

    With the stock configuration given, transformers neither look for code in the folder nor ask about it.
    """
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)


def _tokens(record: dict[str, Any], vocab_size: int) -> list[str | None]:
    """Return tokens by id; ``None`` where the tokenizer has none."""
    vocabulary: dict[str, int] = dict(record["model"]["vocab"])
    vocabulary |= {added["content"]: added["id"] for added in record["added_tokens"]}
    tokens: list[str | None] = [None] * vocab_size
    for token, number in vocabulary.items():
        if number >= vocab_size:
            raise UnsupportedModelError(f"token {token!r} has id {number}, the model only {vocab_size} embeddings")
        tokens[number] = token
    return tokens


def _token_type(model: dict[str, Any], token: str | None, special: bool | None) -> TokenType:
    """Return a token's kind; ``special`` is ``None`` for one that was not added to the vocabulary."""
    if token is None:
        return TokenType.UNUSED
    if model.get("byte_fallback") and _BYTE.fullmatch(token):
        return TokenType.BYTE
    if model.get("byte_fallback") and token == model.get("unk_token"):
        return TokenType.UNKNOWN
    if special is None:
        return TokenType.NORMAL
    return TokenType.CONTROL if special else TokenType.USER_DEFINED


def _byte_level(record: dict[str, Any]) -> list[Field]:
    """Return llama.cpp's ``gpt2`` tokenizer: merges, and the pre-tokenizer's name."""
    steps, ignore_merges = tuple(_steps(record["pre_tokenizer"])), bool(record["model"].get("ignore_merges"))
    normalizer = (record["normalizer"] or {}).get("type", "NFC")
    pre = PRE.get((steps, ignore_merges)) if normalizer == "NFC" else None
    if pre is None:
        raise UnsupportedModelError(
            f"no name is known for this pre-tokenizer ({'; '.join(steps) or 'none'}; normalizer {normalizer}, "
            f"ignore_merges {ignore_merges}); {_INSTEAD}"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in record["model"]["merges"]]
    return [
        ("tokenizer.ggml.model", "gpt2", GGUFValueType.STRING, None),
        ("tokenizer.ggml.pre", pre, GGUFValueType.STRING, None),
        *([_array("tokenizer.ggml.merges", merges, GGUFValueType.STRING)] if merges else []),
    ]


def _steps(pre_tokenizer: dict[str, Any] | None) -> Iterator[str]:
    """Yield a pre-tokenizer as a list of regular expressions and names of steps, whatever it is nested in."""
    step = pre_tokenizer or {"type": "none"}
    kind = step["type"]
    if kind == "Sequence":
        for inner in step["pretokenizers"]:
            yield from _steps(inner)
    elif kind == "ByteLevel" and not step.get("add_prefix_space"):
        yield from [_GPT2] if step.get("use_regex", True) else []
    elif kind == "Digits" and step.get("individual_digits"):
        yield _DIGITS
    elif kind == "Split" and "Regex" in step["pattern"] and _splits_off_matches(step):
        yield step["pattern"]["Regex"]
    else:
        yield json.dumps(step, ensure_ascii=False)


def _splits_off_matches(step: dict[str, Any]) -> bool:
    """Tell whether the matches are the words (where a pattern covers all text, nothing is between them to be
    dropped).
    """
    return (step["behavior"], bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))


def _sentencepiece(record: dict[str, Any], tokens: list[str | None]) -> list[Field]:
    """Return llama.cpp's ``llama`` tokenizer: no merges but scores; the highest goes first, so earlier merges score
    higher.

    llama.cpp puts a space before text and after special tokens; transformers' newer conversions (Metaspace) not before
    text that begins with one, nor after special tokens.

    Raises:
        UnsupportedModelError: when text is split in a way that this tokenizer does not know.
    """
    steps = [*_parts(record["normalizer"], "normalizers"), *_parts(record["pre_tokenizer"], "pretokenizers")]
    known = {"Prepend", "Replace", "Metaspace"}
    strange = [step["type"] for step in steps if step["type"] not in known]
    if strange:
        raise UnsupportedModelError(f"llama.cpp's SentencePiece tokenizer has no {', '.join(strange)}; {_INSTEAD}")
    prefix = any(s["type"] == "Prepend" or s.get("prepend_scheme") in ("always", "first") for s in steps)
    merges = record["model"]["merges"]
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault(merge.replace(" ", "") if isinstance(merge, str) else "".join(merge), number)
    scores = [-float(rank.get(token or "", len(merges))) for token in tokens]
    return [
        ("tokenizer.ggml.model", "llama", GGUFValueType.STRING, None),
        ("tokenizer.ggml.pre", "default", GGUFValueType.STRING, None),
        ("tokenizer.ggml.add_space_prefix", prefix, GGUFValueType.BOOL, None),
        _array("tokenizer.ggml.scores", scores, GGUFValueType.FLOAT32),
    ]


def _parts(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for each in step[inner] for part in _parts(each, inner)] if step["type"] == "Sequence" else [step]


def _behaviour(tokenizer: Any) -> Iterator[Field]:
    """Yield special tokens, which of them are added to text (by trying), and the chat template."""
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            key = {"unk": "unknown", "pad": "padding"}.get(name, name)
            yield f"tokenizer.ggml.{key}_token_id", number, GGUFValueType.UINT32, None
    plain, marked = (tokenizer("a", add_special_tokens=flag).input_ids for flag in (False, True))
    extra = len(marked) - len(plain)
    bos = extra > 0 and marked[0] == tokenizer.bos_token_id and marked[1 : 1 + len(plain)] == plain
    eos = extra > 0 and marked[-1] == tokenizer.eos_token_id and marked[:-1][-len(plain) :] == plain
    yield "tokenizer.ggml.add_bos_token", bos, GGUFValueType.BOOL, None
    yield "tokenizer.ggml.add_eos_token", eos, GGUFValueType.BOOL, None
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        yield "tokenizer.chat_template", template, GGUFValueType.STRING, None


def _array(key: str, values: list[Any], kind: GGUFValueType) -> Field:
    return key, values, GGUFValueType.ARRAY, kind
