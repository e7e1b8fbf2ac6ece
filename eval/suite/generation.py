"""What a model writes when it is left alone: loops, lengths, ends and variety of continuations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from multipruner.eval.results import MetricResult
from multipruner.eval.suite.subject import Subject

LOOP_SHARE = 0.3
LOOP_SIZES = range(2, 9)
_REPEATS = 3
"""An n-gram that stands there once or twice is no loop, however short the output."""
_SEED = 17
_BATCH = 32
PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "List five things that one should take along on a long walk in the mountains.",
    "What is the difference between weather and climate?",
    "Describe how bread is made, from flour to loaf.",
    "Give three reasons why people learn to play an instrument.",
    "Who was Marie Curie, and what did she discover?",
    "Write a polite letter to a neighbour whose dog barks at night.",
    "How does a bicycle stay upright while it moves?",
    "Summarise what happens in the water cycle.",
    "Write a Python function that returns the largest of three numbers, and explain it.",
    "What should a person do who has lost the key to the front door?",
    "Compare trains and planes for a journey of five hundred kilometres.",
    "Tell me about the history of paper.",
    "Why do leaves change their colour in autumn?",
    "Write a poem of eight lines about the sea in winter.",
    "What are the main parts of a plant, and what does each of them do?",
    "Explain what a prime number is, with examples.",
    "Plan a simple dinner for four people who eat no meat.",
    "How can one tell whether a source on the internet can be trusted?",
    "Describe the city that you would build if you could begin anew.",
    "What is money, and why does it have value?",
    "Explain to a child how the Moon moves around the Earth.",
    "Write instructions for changing the wheel of a car.",
)
"""Put into the chat template by a tokenizer that has one; other models go on with them."""


def generation(
    subject: Subject, *, prompts: int, tokens: int, texts: Sequence[str] = PROMPTS
) -> dict[str, MetricResult]:
    """Return how greedy and sampled continuations look.

    Args:
        subject: the model; with a chat template it answers questions, without one it goes on with them.
        prompts: how many.
        tokens: new tokens at most.
        texts: to begin with; the first ``prompts`` of them.

    Returns:
        For ``greedy`` and ``sampled`` (temperature 1, the same seed for every model): the share of outputs that loop
        (:func:`loops`), length in tokens, the share that ended by itself, and the share of 2-grams and 3-grams that
        occur once in their output.
    """
    asked = [_prompt(subject.tokenizer, text) for text in texts[:prompts]]
    found: dict[str, MetricResult] = {}
    for number, (how, sampled) in enumerate((("greedy", False), ("sampled", True))):
        subject.progress(number, 2)
        written, ended = _continued(subject, asked, tokens, sampled)
        examples: dict[str, list[float]] = {
            "looping": [float(loops(ids)) for ids in written],
            "length": [float(len(ids)) for ids in written],
            "ended": [float(end) for end in ended],
            "distinct 2-grams": [distinct(ids, 2) for ids in written],
            "distinct 3-grams": [distinct(ids, 3) for ids in written],
        }
        for name, values in examples.items():
            found[f"{name}, {how}"] = MetricResult.of({str(n): value for n, value in enumerate(values)})
    return found


def loops(ids: Sequence[int]) -> bool:
    """Tell whether one n-gram (n from 2 to 8, three times at least) covers more than 30 % of an output's tokens."""
    for size in LOOP_SIZES:
        grams = [tuple(ids[begin : begin + size]) for begin in range(len(ids) - size + 1)]
        for gram, count in Counter(grams).most_common(1):
            if count < _REPEATS:
                continue
            covered = {begin + inner for begin, each in enumerate(grams) if each == gram for inner in range(size)}
            if len(covered) > LOOP_SHARE * len(ids):
                return True
    return False


def distinct(ids: Sequence[int], size: int) -> float:
    """Return the number of different n-grams over that of all; 1 for an output with none."""
    grams = [tuple(ids[begin : begin + size]) for begin in range(len(ids) - size + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _prompt(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids that ask for an answer to a text, or are the text, where there is no chat template."""
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(text)["input_ids"])
    said = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(rendered, add_special_tokens=False)["input_ids"])


def _continued(
    subject: Subject, prompts: list[list[int]], tokens: int, sampled: bool
) -> tuple[list[list[int]], list[bool]]:
    """Return what a model writes after each prompt, and whether it ended that by itself."""
    model, ends = subject.model, _ends(subject)
    pad = ends[0] if ends else 0
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=sampled, repetition_penalty=1.0, eos_token_id=ends or None, pad_token_id=pad,
        use_cache=True, **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}),
    )  # fmt: skip
    written: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        for begin in range(0, len(prompts), _BATCH):
            batch = prompts[begin : begin + _BATCH]
            longest = max(map(len, batch))
            ids = torch.tensor([[pad] * (longest - len(each)) + each for each in batch], device=model.device)
            mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in batch], device=model.device)
            written += model.generate(ids, attention_mask=mask, generation_config=config)[:, longest:].tolist()
    stops = [next((at for at, token in enumerate(ids) if token in ends), None) for ids in written]
    return [ids[:stop] for ids, stop in zip(written, stops, strict=True)], [stop is not None for stop in stops]


def _ends(subject: Subject) -> list[int]:
    """Return the tokens that end a text, as model and tokenizer say."""
    own = getattr(subject.model.generation_config, "eos_token_id", None)
    known = own if own is not None else subject.tokenizer.eos_token_id
    return [] if known is None else list(known) if isinstance(known, list) else [known]
