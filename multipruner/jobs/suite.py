"""A suite of ``multipruner eval``: its texts, and one model after another by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from multipruner.config.recipe import EvaluationSpec, Recipe
from multipruner.core.errors import CalibrationError
from multipruner.core.identity import digest
from multipruner.engine.fingerprint import configuration, fingerprint
from multipruner.engine.precision import Precision
from multipruner.eval import Evaluation
from multipruner.eval.evaluation import PERPLEXITY
from multipruner.eval.kept import Kept
from multipruner.eval.scoring import context_length
from multipruner.eval.suite.run import measures, references
from multipruner.eval.suite.subject import Subject
from multipruner.eval.suite.table import INSTRUCT_PARAMETERS, KINDS, Suite, suite_of, tokens_of
from multipruner.eval.suite.texts import beginning, library_code
from multipruner.eval.text import wikitext_text
from multipruner.sources.calibration import CalibrationSet
from multipruner.sources.sampled_text import self_text

_SEED = 90_001
"""Of the text that the dense model writes: not that of any calibration with a small seed."""


@dataclass
class SuiteRun:
    """A suite, the texts that it reads, and what is known of the dense model.

    Attributes:
        name: of the suite.
        texts: token ids by kind.
        instruct: whether the tasks for instruct models are run.
    """

    name: str
    texts: Mapping[str, Tensor]
    instruct: bool
    _dense: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def suite(self) -> Suite:
        """Its row."""
        return suite_of(self.name)

    @classmethod
    def of(
        cls,
        name: str,
        model: Any,
        tokenizer: Any,
        spec: EvaluationSpec,
        held_out: CalibrationSet | None,
        progress: Callable[[int, int], None],
    ) -> SuiteRun:
        """Gather the texts of a suite.

        Args:
            name: of the suite.
            model, tokenizer: the dense model.
            spec: whose text is the prose.
            held_out: the prose where that cannot be had.
            progress: of the text that the dense model writes: called with (tokens done, in all).
        """
        wanted = tokens_of(suite_of(name))
        context = context_length(model.config)
        own = wanted["own"][0], min(wanted["own"][1], context)
        by_kind = {
            "prose": lambda: _prose(tokenizer, spec, wanted["prose"][1], held_out),
            "code": lambda: beginning(tokenizer, library_code(), wanted["code"][1]),
            "own": lambda: self_text(model, tokenizer, *own, _SEED, progress),
        }
        parameters = sum(weight.numel() for weight in model.parameters())
        chats = bool(getattr(tokenizer, "chat_template", None)) and parameters >= INSTRUCT_PARAMETERS
        return cls(name, {kind: by_kind[kind]() for kind in KINDS}, chats)

    def tasks(self, spec: EvaluationSpec) -> tuple[EvaluationSpec, dict[str, bool]]:
        """Return settings with the perplexity of the suite, if it has one, and its lm-eval tasks, each with whether it
        takes the chat template.
        """
        own = tuple(name for name in self.suite.tasks if name == PERPLEXITY)
        others = dict.fromkeys((name for name in self.suite.tasks if name != PERPLEXITY), False)
        chat = dict.fromkeys(self.suite.instruct, True) if self.instruct else {}
        return spec.model_copy(update={"tasks": own}), others | chat

    def measured(
        self, model: Any, tokenizer: Any, found: Evaluation, kept: Kept, progress: Callable[[str, int, int], None]
    ) -> Evaluation:
        """Return an evaluation with the measures of the suite; the first model is the dense one.

        Args:
            model, tokenizer: that are judged.
            found: what was evaluated already.
            kept: what the model scored before.
            progress: called with (measure, done, in all).
        """
        subject = Subject(model, tokenizer, self.texts, context_length(model.config))
        first = not self._dense
        if first:
            self._dense = {"": {}, **references(subject, self.suite, kept, progress)}
        beside = None if first else self._dense
        return replace(found, measures=measures(subject, self.suite, kept, progress, beside))


def with_prose(recipe: Recipe) -> Recipe:
    """Return a recipe whose evaluation needs running text, whatever its tasks."""
    evaluation = recipe.evaluation.model_copy(update={"tasks": (PERPLEXITY,)})
    return recipe.model_copy(update={"evaluation": evaluation})


def suite_settings(name: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which the suite's own stand where nothing was typed: documents per task.

    Raises:
        ConfigError: when there is no such suite.
    """
    if name is None:
        return dict(settings)
    evaluation = dict(settings.get("evaluation", {}))
    limit = suite_of(name).limit
    if limit is not None:
        evaluation.setdefault("limit", limit)
    return {**settings, "evaluation": evaluation}


def kept_scores(model: Any, tokenizer: Any, precision: Precision, *, fresh: bool = False) -> Kept:
    """Return what the dense model scored before, by all that its scores depend on.

    Args:
        model: its weights as they are stored.
        tokenizer: its tokenizer.
        precision: what it computes in.
        fresh: whether everything is to be measured anew; nothing is kept then.
    """
    if fresh:
        return Kept()
    template = getattr(tokenizer, "chat_template", None)
    words = digest([sorted(tokenizer.get_vocab().items()), template, tokenizer("A b\n c1")["input_ids"]], default=str)
    about = {"weights": fingerprint(model), "configuration": configuration(model), "tokenizer": words}
    return Kept({**about, "computed": str(precision.computed), "device": model.device.type})


def _prose(tokenizer: Any, spec: EvaluationSpec, tokens: int, held_out: CalibrationSet | None) -> Tensor:
    try:
        return beginning(tokenizer, wikitext_text(spec)[1], tokens)
    except CalibrationError:
        if spec.text is not None or held_out is None:
            raise
        return held_out.ids.flatten()
