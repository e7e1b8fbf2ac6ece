"""The suites of ``eval --suite`` and their measures: rows. Listing them loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from multipruner.config.choices import row_of

FIVE = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")
INSTRUCT_PARAMETERS = 500_000_000
"""Smaller models answer next to nothing of GSM8K and IFEval, dense or pruned."""


@dataclass(frozen=True, slots=True)
class Measure:
    """A measure of our own.

    Attributes:
        by: (subject, settings) -> metrics by name, as ``"module:function"``.
        about: what it tells, in a few words; tables use it.
        version: raised when the same settings give other numbers.
        reference: (subject, settings) -> tensors of the dense model that ``by`` sets others beside.
        digits: behind the point, in tables.
    """

    by: str
    about: str
    version: int = 1
    reference: str | None = None
    digits: int = 3


@dataclass(frozen=True, slots=True)
class Suite:
    """What is measured together.

    Attributes:
        about: what it is for.
        measures: rows of :data:`MEASURES` with their settings.
        tasks: of lm-eval, and ppl; one whose documents cannot be had is left out, and said.
        instruct: further ones, with the chat template, for models that have one and ``INSTRUCT_PARAMETERS``.
        limit: documents per task; ``None``: all.
    """

    about: str
    measures: Mapping[str, Mapping[str, Any]]
    tasks: tuple[str, ...] = ()
    instruct: tuple[str, ...] = ()
    limit: int | None = None


KINDS = {
    "prose": "the text of perplexity: WikiText-2, or --eval-text",
    "code": "Python's own standard library, which is wherever this runs",
    "own": "sampled from the dense model",
}
"""The kinds of text that models are compared on, and where each comes from."""
_HERE = "multipruner.eval.suite"
MEASURES: dict[str, Measure] = {
    "text": Measure(f"{_HERE}.positions:positions", "bits per byte, and loss by position"),
    "agreement": Measure(
        f"{_HERE}.agreement:agreement", "distance from the dense model", reference=f"{_HERE}.agreement:reference"
    ),
    "generation": Measure(f"{_HERE}.generation:generation", "what it writes"),
    "long": Measure(f"{_HERE}.long_inference:long_inference", "long contexts"),
}
SUITES: dict[str, Suite] = {
    "quick": Suite(
        "a first look: short texts, a dozen prompts, few documents",
        {
            "text": {"length": 1024, "sequences": 3},
            "agreement": {"length": 256, "sequences": 3, "top": 64},
            "generation": {"prompts": 12, "tokens": 64},
            "long": {"length": 1024, "steps": 16, "haystack": 512, "needles": 2, "places": 3},
        },
        ("lambada_openai", "piqa"),
        limit=32,
    ),
    "standard": Suite(
        "for a decision: longer texts, more tasks, a hundred documents of each",
        {
            "text": {"length": 4096, "sequences": 6, "beyond": 1.25},
            "agreement": {"length": 512, "sequences": 8, "top": 128},
            "generation": {"prompts": 24, "tokens": 192},
            "long": {"length": 4096, "steps": 64, "haystack": 2048, "needles": 4, "places": 5},
        },
        ("ppl", "lambada_openai", "blimp", *FIVE, "mmlu"),
        instruct=("gsm8k", "ifeval"),
        limit=100,
    ),
    "full": Suite(
        "for a publication: every document, the whole context",
        {
            "text": {"length": 32768, "sequences": 8, "beyond": 1.25},
            "agreement": {"length": 2048, "sequences": 16, "top": 256},
            "generation": {"prompts": 24, "tokens": 512},
            "long": {"length": 8192, "steps": 256, "haystack": 8192, "needles": 8, "places": 11},
        },
        ("ppl", "lambada_openai", "blimp", *FIVE, "mmlu"),
        instruct=("gsm8k", "ifeval"),
    ),
}


def suite_of(name: str) -> Suite:
    """Return a suite by its name.

    Raises:
        ConfigError: naming the closest, and all that there are.
    """
    return row_of(SUITES, name, "suite")


def tokens_of(suite: Suite) -> dict[str, tuple[int, int]]:
    """Return the sequences and the tokens of each that a suite's measures read, by kind of text."""
    agreement, text = suite.measures.get("agreement", {}), suite.measures.get("text", {})
    both = (agreement.get("sequences", 1), agreement.get("length", 2))
    long = int(text.get("length", 2) * max(1.0, text.get("beyond", 1.0)))
    haystack = suite.measures.get("long", {})
    most = max(text.get("sequences", 1) * long, haystack.get("length", 2), haystack.get("haystack", 2) * 2)
    return {"prose": (1, max(most, both[0] * both[1])), "code": (1, both[0] * both[1]), "own": both}
