"""What is said of a model with fewer tokens: on the screen, in ``vocabulary.json``, in its card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from multipruner.checkpoint.run_folder import VOCABULARY
from multipruner.config.recipe import Recipe
from multipruner.core import __version__
from multipruner.report.markup import code, command_without_places, fenced, plain, without_places
from multipruner.sources.resolve import ResolvedModel
from multipruner.vocabulary.choice import Choice

from .text import Fit


@dataclass(frozen=True)
class Sizes:
    """What a choice saves and costs.

    Attributes:
        before, after: rows of the embeddings.
        parameters_before, parameters_after: of the whole model, tied matrices counted once.
        fit: how held-out text is told.
    """

    before: int
    after: int
    parameters_before: int
    parameters_after: int
    fit: Fit

    @property
    def saved(self) -> float:
        """Share of all parameters that go."""
        return 1 - self.parameters_after / self.parameters_before

    def row(self) -> str:
        """Return a line of a table."""
        fit = self.fit
        more = fit.after / max(fit.before, 1) - 1
        return (
            f"{self.after:>9,}{self.parameters_after / 1e6:>12,.1f} M{self.saved:>8.1%}"
            f"{fit.bytes / max(fit.after, 1):>15.2f}{more:>+13.1%}{fit.same / max(fit.before, 1):>11.1%}"
        )

    def line(self) -> str:
        """Return what a person is told of it."""
        fit = self.fit
        return (
            f"tokens: {self.before:,} -> {self.after:,}; parameters: {self.parameters_before / 1e6:,.1f} -> "
            f"{self.parameters_after / 1e6:,.1f} million (-{self.saved:.1%}); held-out text: "
            f"{fit.bytes / max(fit.before, 1):.2f} -> {fit.bytes / max(fit.after, 1):.2f} bytes a token, "
            f"{fit.same / max(fit.before, 1):.1%} of its tokens are what they were"
        )


@dataclass(frozen=True)
class Result:
    """All that is known of a model with fewer tokens.

    Attributes:
        source, recipe: the dense model.
        sizes, choice: what stayed.
        asked: what was asked.
        bits: bits per byte of the dense model and of this one, by text; empty where nothing was measured.
        command: the command line, if any.
    """

    source: ResolvedModel
    recipe: Recipe
    sizes: Sizes
    choice: Choice
    asked: Mapping[str, Any]
    bits: Mapping[str, tuple[float, float]]
    command: str | None

    def lines(self) -> Iterator[str]:
        """Yield what a person is told of the losses, and whether they are worth it."""
        for name, (before, after) in self.bits.items():
            yield f"{name}: {before:.4f} -> {after:.4f} bits per byte ({after / before - 1:+.1%})"
        worst = max((after / before - 1 for before, after in self.bits.values()), default=0.0)
        if worst > self.sizes.saved:
            yield (
                f"note: this may not pay: bits per byte rise by {worst:.1%} for {self.sizes.saved:.1%} of the "
                "parameters; keep more tokens, or cut blocks, channels and heads instead"
            )


def record_of(result: Result, folder: Path, seconds: float) -> dict[str, Any]:
    """Return what ``vocabulary.json`` holds.

    Args:
        result: what is known.
        folder: where everything else is written.
        seconds: that it took.
    """
    sizes, choice, source = result.sizes, result.choice, result.source
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {
        "format": "multipruner-vocabulary",
        "version": 1,
        "model": {"name": source.name, "revision": source.revision, "description": source.description},
        "asked": without_places(dict(result.asked)),
        "command": None if result.command is None else command_without_places(result.command),
        "tokens": {"before": sizes.before, "after": sizes.after, "needed": choice.needed, "seen": choice.seen},
        "parameters": {"before": sizes.parameters_before, "after": sizes.parameters_after},
        "ratio": sizes.saved,
        "held_out": sizes.fit.to_json(),
        "bits_per_byte": {name: {"before": one, "after": two} for name, (one, two) in result.bits.items()},
        "kept": list(choice.ids),
        "seconds": seconds,
        "versions": {"multipruner": __version__},
        "files": sorted(names | {VOCABULARY}),
    }


def card_of(result: Result) -> str:
    """Return the text of ``README.md``."""
    sizes, name = result.sizes, result.source.name.rstrip("/").rpartition("/")[2]
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [multipruner, pruned-vocabulary]\n---",
        f"# {plain(name)}, {sizes.after:,} tokens",
        f"The model {code(name)} with {sizes.after:,} of its {sizes.before:,} tokens; parameters: "
        f"{sizes.parameters_before:,} -> {sizes.parameters_after:,} (-{sizes.saved:.1%}). No weight was changed: rows "
        "of embeddings and head were left out, and the tokenizer knows the others alone. Any text can still be told; "
        "text unlike that which tokens were counted in takes more of them.",
    ]
    if result.bits:
        rows = "\n".join(f"| {plain(text)} | {a:.4f} | {b:.4f} |" for text, (a, b) in result.bits.items())
        parts.append(f"| bits per byte | dense | this model |\n| --- | --- | --- |\n{rows}")
    if result.command:
        parts.append(fenced(command_without_places(result.command)))
    return "\n\n".join(parts) + "\n"
