"""Judge a model: perplexity and lm-eval tasks, dense against pruned."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if __name__ != "multipruner.eval":
    raise ImportError("import multipruner.eval: a bare `eval` would load every class twice")

if TYPE_CHECKING:
    from multipruner.eval.comparison import Comparison, Contrast, compare
    from multipruner.eval.evaluation import check_settings, evaluate
    from multipruner.eval.harness import run_tasks
    from multipruner.eval.results import Evaluation, MetricResult, Perplexity, TaskResult, TaskResults
    from multipruner.eval.scoring import perplexity
    from multipruner.eval.text import wikitext_text

# Lazy, because scoring and harness need torch. No file may bear the name of something exported here: importing the
# file would bind the module over the function.
_HOMES = {
    "Comparison": "comparison",
    "Contrast": "comparison",
    "Evaluation": "results",
    "MetricResult": "results",
    "Perplexity": "results",
    "TaskResult": "results",
    "TaskResults": "results",
    "check_settings": "evaluation",
    "compare": "comparison",
    "evaluate": "evaluation",
    "perplexity": "scoring",
    "run_tasks": "harness",
    "wikitext_text": "text",
}

__all__ = [
    "Comparison",
    "Contrast",
    "Evaluation",
    "MetricResult",
    "Perplexity",
    "TaskResult",
    "TaskResults",
    "check_settings",
    "compare",
    "evaluate",
    "perplexity",
    "run_tasks",
    "wikitext_text",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
