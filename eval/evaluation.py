"""Evaluate one model on what an :class:`~multipruner.config.recipe.EvaluationSpec` asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from multipruner.config.recipe import EvaluationSpec
from multipruner.core.errors import CalibrationError, ConfigError
from multipruner.eval.harness import resolve_tasks, run_tasks
from multipruner.eval.kept import Kept, folder_digest
from multipruner.eval.results import Evaluation, Perplexity, TaskResult, TaskResults
from multipruner.eval.scoring import context_length, perplexity
from multipruner.eval.suite.texts import text_digest
from multipruner.eval.text import wikitext_text

PERPLEXITY = "ppl"
"""The name in ``spec.tasks`` that is no lm-eval task."""


def check_settings(spec: EvaluationSpec) -> None:
    """Find out before a long run whether its evaluation can begin at all: text file, task names, include path.

    Raises:
        ConfigError: for an unknown task or a wrong path.
        CalibrationError: when the text file is missing or empty.
    """
    if PERPLEXITY in spec.tasks and spec.text is not None:
        wikitext_text(spec)
    if names := tuple(name for name in spec.tasks if name != PERPLEXITY):
        resolve_tasks(names, spec.include_path)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    *,
    fallback_ids: torch.Tensor | None = None,
    fallback_name: str = "held-out calibration text",
    say: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    kept: Kept | None = None,
    optional: Mapping[str, bool] | None = None,
    together: int = 1,
) -> Evaluation:
    """Measure perplexity and lm-eval tasks of one model; evaluate dense and pruned alike and :func:`compare` the two.

    Args:
        model: a causal language model on the device to run on; its training flags are as before afterwards.
        tokenizer: its tokenizer; the text is tokenised once, as a whole.
        spec: what to evaluate on.
        fallback_ids: token ids, [sequences, tokens], for perplexity when WikiText-2 cannot be had.
        fallback_name: what they are called in the result.
        say: told when the fallback is used, or the length is beyond the model's context.
        progress: called with (``"perplexity"`` or ``"requests"``, done, in all); in all is 0 until it is known.
        kept: what the model scored before; each name of ``spec.tasks`` is then a question of its own.
        optional: further tasks, and whether with the chat template; what cannot be had is left out, and said.
        together: sequences of a perplexity in one pass.

    Raises:
        ConfigError: for an unknown task or a wrong path.
        CalibrationError: when a text is too short, or cannot be had and there is no fallback.
        NumericsError: for NaN or infinite losses.
    """
    texts, names = {}, [name for name in spec.tasks if name != PERPLEXITY]
    if PERPLEXITY in spec.tasks:
        progress("perplexity", 0, 0)
        name, ids = _perplexity_ids(tokenizer, spec, fallback_ids, fallback_name, say)
        if ids.ndim == 1 and spec.length > (context := context_length(model.config)):
            say(f"evaluation.length = {spec.length}: cut to {context:,} tokens, the context of the model")
        settings = {"length": spec.length, "max_tokens": spec.max_tokens}
        run = partial(perplexity, model, ids, **settings, batch_size=together, progress=partial(progress, "perplexity"))
        found = (kept or Kept()).result("ppl", {**settings, "text": text_digest(ids)}, lambda: run().to_json())
        texts[name] = Perplexity.from_json(found)
    tasks: dict[str, TaskResult] = {}
    options = {"include_path": spec.include_path, "limit": spec.limit, "batch_size": spec.batch_size}
    ask = partial(run_tasks, model, tokenizer, **options, progress=partial(progress, "requests"))
    if names:
        progress("requests", 0, 0)
    if names and kept is None:
        tasks |= ask(names)
    elif kept is not None:
        about = {**options, "include_path": folder_digest(spec.include_path)}
        for name in names:
            tasks |= _asked(kept, ask, name, about, False)
        for name, chat in (optional or {}).items():
            progress("requests", 0, 0)
            try:
                tasks |= _asked(kept, ask, name, about, chat)
            except (CalibrationError, ConfigError, ImportError) as error:
                say(f"left out: {error}")
    return Evaluation(texts, tasks)


def _asked(
    kept: Kept, ask: Callable[..., TaskResults], name: str, about: Mapping[str, Any], chat: bool
) -> dict[str, TaskResult]:
    """Return the results of one task, group or pattern, from disk where they are there."""

    def run() -> dict[str, Any]:
        return {task: result.to_json() for task, result in ask([name], chat=chat).items()}

    found = kept.result(name, {**about, "chat": chat}, run)
    return {task: TaskResult.from_json(row) for task, row in found.items()}


def _perplexity_ids(
    tokenizer: PreTrainedTokenizerBase,
    spec: EvaluationSpec,
    fallback_ids: torch.Tensor | None,
    fallback_name: str,
    say: Callable[[str], None],
) -> tuple[str, torch.Tensor]:
    """Return the name of a text and its token ids."""
    try:
        name, text = wikitext_text(spec)
    except CalibrationError as error:
        # a file that was asked for by name must not be swapped for another text
        if spec.text is not None or fallback_ids is None:
            raise
        say(f"{error}. Perplexity is measured on {fallback_name} instead: do not set it beside published numbers.")
        return fallback_name, fallback_ids
    # not verbose: "longer than the model's maximum" is no news for a text that is cut afterwards
    return name, tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
