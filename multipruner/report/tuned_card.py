"""The model card of a pruned model that was trained afterwards: the run's own, mended where it is no longer true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from multipruner.core.plan import PruningPlan

from .card import REFITTED, SAME_BITS, model_card
from .markup import code, command_without_places, fenced, plain

_SEAL = "\n<!-- multipruner wrote this card"
_UNTRAINED = "from calibration text alone: no weight was trained."
_LIMIT = (
    "Nothing was trained after the cut. The model knows less than the dense one and may be wrong more often, also "
    "where the dense one is right; further training can win some of that back."
)
_UNMEASURED = "- It has not been evaluated.\n"


def tuned_card(report: Mapping[str, Any], plan: PruningPlan, *, stock: bool) -> str:
    """Return Markdown with the Hub's metadata. It bears no seal: a push brings it as it stands, its address filled in.

    Args:
        report: with the section ``tuned``.
        plan: what was kept.
        stock: whether a stock class of transformers opens the checkpoint.
    """
    tuned = report["tuned"]
    card = model_card(report, plan, stock=stock).partition(_SEAL)[0]
    trained_on = f"{tuned['tokens']:,} tokens of {_text_name(tuned['data'])}"
    changes = {
        _UNTRAINED: f"from calibration text, and then {_how(tuned)} on {trained_on} (see Training).",
        _LIMIT: (
            f"It was trained after the cut, on {trained_on} only. It still knows less than the dense model, and may "
            "have taken on the style, the errors and the licence terms of that text."
        ),
        _UNMEASURED: "",
        SAME_BITS: "`plan.json` and the dense weights give the weights before the training, bit for bit.",
        REFITTED: f"{REFITTED[:-1]}, before the training.",
    }
    for before, after in changes.items():
        card = card.replace(before, after)
    body, limits, rest = card.partition("## Limits\n")
    return f"{body}{_training(tuned)}\n\n{limits}{rest}"


def _text_name(data: Mapping[str, Any]) -> str:
    return "text that the dense model wrote itself" if data["name"] == "self" else code(data["name"])


def _how(tuned: Mapping[str, Any]) -> str:
    """Return what was done to it, in words."""
    lora = " with LoRA" if tuned.get("lora") else ""
    return f"distilled from the dense model{lora}" if tuned.get("teacher") else f"trained{lora}"


def _training(tuned: Mapping[str, Any]) -> str:
    """Return what was done, and what it changed."""
    lora, losses, teacher = tuned.get("lora"), tuned["losses"], tuned.get("teacher")
    learned = tuned.get("learned", "all weights of the norms and of the output projections")  # earlier ones say nothing
    if lora:
        learned = f"LoRA on every linear layer but the head, rank {lora['rank']}, alpha {lora['alpha']}; merged"
    whole = "its whole distribution at every position"
    rows = [
        ("text", f"{_text_name(tuned['data'])}, hash `{tuned['data']['hash'][:16]}`"),
        ("steps", f"{tuned['steps']:,} of {tuned['batch']} sequences of {tuned['length']} tokens"),
        ("tokens", f"{tuned['tokens']:,} ({tuned['passes']:.2f} passes over the text)"),
        ("loss", tuned.get("loss", "negative log-likelihood of the text")),
        ("adapters" if lora else "weights", learned),
        ("optimizer", f"AdamW, learning rate {tuned['lr']:g}, 5 % warm-up, cosine; seed {tuned['seed']}"),
        ("training loss", f"{losses[0][1]:.3f} -> {losses[-1][1]:.3f} nats per token"),
        ("time", f"{tuned['seconds']['training']:,.0f} s on {tuned['device']}"),
    ]
    if teacher:
        top = teacher.get("top_k")
        rows.insert(1, ("teacher", f"the dense model, {f'its {top} likeliest tokens and the rest' if top else whole}"))
    table = "\n".join(f"| {what} | {value} |" for what, value in rows)
    numbers = "\n".join(
        f"| {plain(name)} | {both['before']:.3f} | {both['after']:.3f} |" for name, both in tuned["perplexity"].items()
    )
    text = f"## Training\n\nUnlike the cut, this step changed weights by training.\n\n| | |\n|---|---|\n{table}\n\n"
    text += f"| perplexity | pruned | pruned and trained |\n|---|---:|---:|\n{numbers}"
    return f"{text}\n\n{fenced(command_without_places(tuned['command']), 'sh')}" if tuned.get("command") else text
