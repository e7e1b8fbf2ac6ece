"""The model card: README.md of a pruned checkpoint, written from a report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from .architecture import FAMILIES
from .plan import PruningPlan

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_REMOTE_CODE = (
    "The code of this family travels with the checkpoint and is written for older versions of transformers.\n"
    "multipruner has run it only with a tiny stand-in of the same shape, not with the official code:\n"
    "compare logits before you rely on this model."
)


def model_card(
    report: Mapping[str, Any],
    plan: PruningPlan,
    *,
    license: str | None = None,
    languages: tuple[str, ...] = (),
    name: str = "path/to/this/folder",
) -> str:
    """Markdown with the Hub's metadata; whatever the report does not know is left out.

    Args:
        report: what happened. Read when there: ``recipe parameters ratio backbone_ratio calibration perplexity
            tasks_markdown command versions picture``.
        plan: what was kept.
        license: the dense model's licence, as its own card names it.
        languages: the dense model's languages.
        name: what the loading example opens (a folder or Hub id).
    """
    model = plan.model
    parts = [
        _metadata(_base_model(report, model), license, languages),
        f"# {model.rstrip('/').rpartition('/')[2]}, pruned",
        _summary(report, model),
        _removed(plan, report.get("picture")),
        _loading(plan, name),
        _numbers(report),
        _reproduction(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base_model(report: Mapping[str, Any], model: str) -> str | None:
    """The Hub id of the dense model: what was loaded, or what a fallback stood in for."""
    recipe = report.get("recipe") or {}
    if isinstance(recipe, Mapping) and recipe.get("fallback"):
        return recipe["model"]
    return model if _HUB_ID.fullmatch(model) else None


def _metadata(base_model: str | None, license: str | None, languages: tuple[str, ...]) -> str:
    # the Hub knows adapters, merges, quantisations and fine-tunes as relations of a base model, not pruning
    known: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "multipruner"],
    }
    if base_model:
        known["base_model"] = base_model
    if license:
        known["license"] = license
    if languages:
        known["language"] = list(languages)
    return f"---\n{yaml.safe_dump(known, sort_keys=True)}---"


def _summary(report: Mapping[str, Any], model: str) -> str:
    counts = report.get("parameters") or {}
    text = f"A smaller `{model}`, made with multipruner from calibration text alone: no weight was trained."
    if counts.get("before") and counts.get("after"):
        text += f" {counts['after'] / 1e6:,.1f} of {counts['before'] / 1e6:,.1f} million parameters are left"
        shares = [
            f"{report[key]:.1%} of {what} removed"
            for key, what in (("ratio", "all parameters"), ("backbone_ratio", "the decoder layers"))
            if report.get(key) is not None
        ]
        text += f" ({', '.join(shares)})." if shares else "."
    return text


def _removed(plan: PruningPlan, picture: Any) -> str:
    dense, kept = plan.dense, plan.structure
    rows = [
        ("attention blocks", dense.count("attention"), kept.count("attention")),
        ("MLP blocks", dense.count("mlp"), kept.count("mlp")),
        ("query heads", sum(s.query_heads for s in dense), sum(s.query_heads for s in kept)),
        ("KV heads", sum(s.kv_heads for s in dense), sum(s.kv_heads for s in kept)),
        ("MLP channels", sum(s.channels for s in dense), sum(s.channels for s in kept)),
    ]
    table = "\n".join(f"| {what} | {before:,} | {after:,} |" for what, before, after in rows)
    text = f"## What was removed\n\n| | dense | here |\n|---|---:|---:|\n{table}"
    text += "\n\n`plan.json` lists every kept head and channel in the dense model's numbering."
    return f"{text}\n\n```\n{str(picture).rstrip()}\n```" if picture else text


def _loading(plan: PruningPlan, name: str) -> str:
    remote = plan.model_type in FAMILIES and FAMILIES[plan.model_type].remote_code
    option = ", trust_remote_code=True" if remote else ""
    return f"""\
## How to load it

Layers differ in size, so the checkpoint brings its modelling code (it needs torch and transformers>=5.14):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}"{option})
```

{"With" if remote else "Or, running no code from the checkpoint, with"} `pip install multipruner`:

```python
import multipruner

model = multipruner.load("{name}"{option})
```{chr(10) * 2 + _REMOTE_CODE if remote else ""}"""


def _numbers(report: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {_number(both.get('dense'))} | {_number(both.get('pruned'))} |"
        for name, both in (report.get("perplexity") or {}).items()
    ]
    parts = ["| perplexity | dense | here |\n|---|---:|---:|\n" + "\n".join(rows)] if rows else []
    if report.get("tasks_markdown"):
        parts.append(str(report["tasks_markdown"]).strip())
    return "\n\n".join(["## Numbers", *parts]) if parts else ""


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, (int, float)) else "–"


def _reproduction(report: Mapping[str, Any]) -> str:
    lines = []
    if report.get("command"):
        lines.append(f"```sh\n{report['command']}\n```")
    calibration = report.get("calibration") or {}
    if calibration.get("name"):
        size = f", {calibration['tokens']:,} tokens" if isinstance(calibration.get("tokens"), int) else ""
        digest = f", hash `{calibration['hash']}`" if calibration.get("hash") else ""
        lines.append(f"Calibration text: {calibration['name']}{size}{digest}.")
    recipe = report.get("recipe")
    if recipe:
        text = recipe if isinstance(recipe, str) else yaml.safe_dump(dict(recipe), sort_keys=False).rstrip()
        lines.append(f"Recipe: `{text}`." if "\n" not in text else f"Recipe:\n\n```yaml\n{text}\n```")
    versions = report.get("versions") or {}
    if versions:
        lines.append("Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".")
    lines.append("`plan.json` and the dense weights give these weights again, bit for bit.")
    return "\n\n".join(["## How it was made", *lines])
