"""Long contexts: whether a cache gives what computing without one gives, and whether what was read is found."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from multipruner.core.families import cache_argument
from multipruner.eval.results import MetricResult
from multipruner.eval.suite.subject import Subject

_NAMES = ("Aldermoor", "Brightwater", "Castlebeck", "Dunholm", "Eastmere", "Fernhill", "Greywick", "Harrowgate")
_NUMBERS = (48213, 70956, 13587, 92641, 35078, 61429, 27860, 84395)


def long_inference(
    subject: Subject, *, length: int, steps: int, haystack: int, needles: int, places: int
) -> dict[str, MetricResult]:
    """Return what becomes of long contexts.

    Args:
        subject: the model; its prose is read.
        length: tokens that are read with a cache and without; at most the model's context.
        steps: of them, at the end, that go through the cache one by one.
        haystack: tokens of text in which a sentence is hidden.
        needles: sentences that are hidden, one at a time.
        places: where each of them is hidden, evenly from the beginning (0 %) to the end (100 %).

    Returns:
        ``same choice with cache``, ``cache apart`` (difference of the loss in nats), and for every place the share of
        ``needle found`` (each token of the answer is the likeliest one), and the loss of the answers.
    """
    text = subject.texts["prose"].flatten()
    found = _cached(subject, text[: min(length, subject.context)], steps)
    return found | _needles(subject, text, min(haystack, subject.context), needles, places)


def _cached(subject: Subject, ids: Tensor, steps: int) -> dict[str, MetricResult]:
    """Compare the last predictions of one pass with those of a cache that grows token by token."""
    model, ids = subject.model, ids[None].to(subject.model.device)
    steps = min(steps, ids.shape[1] // 2)
    first = ids.shape[1] - steps - 1
    whole = model(input_ids=ids, use_cache=False, **_last(model, steps + 1)).logits[0, -steps - 1 : -1]
    whole = whole.float().log_softmax(-1)
    half = first // 2 + 1  # in two parts, so that a second prompt behind a first one is tried as well
    name = cache_argument(model)
    out = model(input_ids=ids[:, :half], use_cache=True, **_last(model, 1))
    cache = getattr(out, name)
    out = model(input_ids=ids[:, half : first + 1], use_cache=True, **{name: cache}, **_last(model, 1))
    same, apart = {}, {}
    for step in range(steps):
        logs, wanted = out.logits[0, -1].float().log_softmax(-1), ids[0, first + step + 1]
        same[str(step)] = float(logs.argmax() == whole[step].argmax())
        apart[str(step)] = float((logs[wanted] - whole[step, wanted]).abs())
        subject.progress(step + 1, steps)
        if step + 1 < steps:
            out = model(input_ids=wanted.view(1, 1), use_cache=True, **{name: getattr(out, name)})
    return {"same choice with cache": MetricResult.of(same), "cache apart": MetricResult.of(apart)}


def _last(model: Any, count: int) -> dict[str, int]:
    """Return the option by which a model computes logits for its last positions alone, where it has one."""
    return {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}


def _needles(subject: Subject, text: Tensor, size: int, needles: int, places: int) -> dict[str, MetricResult]:
    """Put numbers into a text at every place, and ask for them at its end."""
    found, losses = {}, {}
    for place in range(places):
        share = place / max(1, places - 1)
        hits = {}
        for number in range(needles):
            subject.progress(place * needles + number, places * needles)
            ids, answer = _haystack(subject.tokenizer, text, size, share, number)
            batch, last = ids[None].to(subject.model.device), _last(subject.model, answer + 1)
            logits = subject.model(input_ids=batch, use_cache=False, **last).logits[0, -answer - 1 : -1]
            logs = logits.float().log_softmax(-1).cpu()
            wanted = ids[-answer:]
            hits[str(number)] = float(bool((logs.argmax(-1) == wanted).all()))
            losses[f"{place}/{number}"] = float(-logs.gather(1, wanted[:, None]).mean())
        found[f"needle found at {share:.0%}"] = MetricResult.of(hits)
    return {**found, "loss of the needles": MetricResult.of(losses)}


def _haystack(tokenizer: Any, text: Tensor, size: int, share: float, number: int) -> tuple[Tensor, int]:
    """Return a text with a sentence hidden at a share of it, a question at its end and the answer; and the latter's
    length in tokens.
    """
    name, value = _NAMES[number % len(_NAMES)], _NUMBERS[number % len(_NUMBERS)]
    said, asked, answer = (
        torch.tensor(tokenizer(part, add_special_tokens=False)["input_ids"])
        for part in (f"\nThe secret number of {name} is {value}.\n", f"\nThe secret number of {name} is", f" {value}")
    )
    room = max(0, min(size - len(said) - len(asked) - len(answer), len(text)))
    hay, place = text[:room], int(room * share)
    return torch.cat([hay[:place], said, hay[place:], asked, answer]), len(answer)
