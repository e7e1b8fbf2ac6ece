"""What a search may look at: calibration text and costs, never the tasks whose results are reported afterwards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multipruner.core.costs import COSTS
from multipruner.core.errors import ConfigError, did_you_mean

CONSENT = "I know this is test data"
TASK_FAMILIES = (
    "agieval", "anli", "arc", "bbh", "belebele", "blimp", "boolq", "ceval", "cmmlu", "copa", "coqa", "drop", "gpqa",
    "gsm8k", "hellaswag", "hendrycks", "humaneval", "ifeval", "lambada", "leaderboard", "logiqa", "mathqa", "mbpp",
    "mmlu", "nq", "openbookqa", "paloma", "pile", "piqa", "ppl", "pubmedqa", "qnli", "race", "sciq", "squadv2",
    "squad", "super", "swag", "triviaqa", "truthfulqa", "wikitext", "wikitext2", "winogrande", "wsc", "xnli",
)  # fmt: skip


def objectives() -> tuple[str, ...]:
    """Return what may be minimised without consent: the loss, and every cost."""
    return ("loss", *COSTS)


def is_known_task(name: str) -> bool:
    """Tell whether a name belongs to a well-known family of lm-eval tasks, such as ``arc_easy`` or ``mmlu_stem``."""
    return name.lower().replace("-", "_").split("_")[0] in TASK_FAMILIES


def check_objectives(
    names: Sequence[str], consent: str | None = None, is_task: Callable[[str], bool] = is_known_task
) -> tuple[str, ...]:
    """Return the objectives by their full names, tasks refused unless consent is typed.

    Args:
        names: what is to be minimised.
        consent: :data:`CONSENT`, word by word (upper and lower case do not matter), or ``None``.
        is_task: tells whether a name is an lm-eval task; by default from a list of families.

    Raises:
        ConfigError: for a task without consent, an unknown or repeated name, or when there is no loss to minimise.
    """
    known = objectives()
    words = {cost.word: cost.name for cost in COSTS.values()}
    found = tuple(words.get(name, name) for name in names)
    agreed = (consent or "").strip().lower() == CONSENT.lower()
    for name in found:
        if name in known or (agreed and is_task(name)):
            continue
        if is_task(name):
            raise ConfigError(
                f"{name} is an evaluation task: a search that minimises it picks the structure that does best on that "
                "very test, and the result reported for it is no longer a test of anything. Search on the calibration "
                f"loss, or consent with --consent {CONSENT!r}"
            )
        raise ConfigError(f"unknown objective {name!r}{did_you_mean(name, known)}; these are known: {', '.join(known)}")
    if len(set(found)) < len(found):
        raise ConfigError(f"objectives {', '.join(names)}: name each once")
    if "loss" not in found and not any(name not in known for name in found):
        raise ConfigError("loss must be among the objectives: by its costs alone the smallest model always wins")
    return found
