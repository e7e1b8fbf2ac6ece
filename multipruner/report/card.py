"""The model card: README.md of a pruned checkpoint, written from a report."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from multipruner.config.spellings import respelled
from multipruner.core.axes import BLOCK_KINDS, STREAM
from multipruner.core.errors import ConfigError
from multipruner.core.families.tasks import CAUSAL_LM, Task
from multipruner.core.plan import PruningPlan
from multipruner.eval import Comparison

from .markup import code, command_without_places, fenced, front_matter, one_line, plain, without_places
from .words import UNREPAIRED, finite, loading, measured, task_named, tokens_of, whole_loading

LOCAL_NAME = "path/to/this/folder"
"""What the loading example opens as long as the checkpoint has no address."""
REFITTED = "`plan.json` says what was cut; the output projections of what stays were then refitted in closed form."
SAME_BITS = "`plan.json` and the dense weights give these weights again, bit for bit."
_WORKED_OUT = (
    "`plan.json` says what was cut; bases and gains that the run worked out of its text are in the weights alone."
)
_SEAL = re.compile(r"\n<!-- multipruner wrote this card: ([0-9a-f]{16}) -->\n\Z")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(
    report: Mapping[str, Any],
    plan: PruningPlan,
    *,
    license: str | Mapping[str, str] | None = None,
    languages: tuple[str, ...] = (),
    name: str = LOCAL_NAME,
    figure: str | None = None,
    stock: bool = False,
) -> str:
    """Return Markdown with the Hub's metadata; whatever the report does not know is left out.

    Args:
        report: what happened. Read when there: ``recipe parameters ratio backbone_ratio calibration perplexity tasks
            tasks_markdown evaluations command versions picture``.
        plan: what was kept.
        license: the dense model's licence, as its own card names it (with ``license_name`` and ``license_link``
            where it has them).
        languages: the dense model's languages.
        name: what the loading example opens (a folder or Hub id).
        figure: path of a picture of the model's shape, relative to the card.
        stock: whether a stock class of transformers opens the checkpoint (all layers alike)."""
    report = respelled("report", report)
    base = base_model(report, plan)
    short = one_line(plan.model.rstrip("/").rpartition("/")[2])
    task = task_named(plan.model_type)
    pipeline = "image-text-to-text" if "whole" in report else task.name
    title = name.rpartition("/")[2] if _HUB_ID.fullmatch(name) else f"{short}, pruned"
    parts = [
        _metadata(base, license, languages, model_index(report, title, task.name), pipeline),
        f"# {plain(title)}",
        # a folder on somebody's disk is nobody else's business
        _summary(report, base or short, task.data),
        _removed(plan, report.get("picture"), figure),
        whole_loading(name) if "whole" in report else loading(plan.model_type, name, stock=stock),
        _numbers(report),
        _limits(report, task),
        _reproduction(report, plan),
    ]
    return _sealed("\n\n".join(part for part in parts if part) + "\n")


def _sealed(text: str) -> str:
    return f"{text}\n<!-- multipruner wrote this card: {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_untouched(card: str) -> bool:
    """Tell whether a card is as :func:`model_card` wrote it, not a letter changed since."""
    seal = _SEAL.search(card)
    return seal is not None and seal[1] == _digest(card[: seal.start()])


def addressed(card: str, generated: str, name: str) -> str:
    """Return a card that somebody has edited, with its loading example and metadata made fit for the Hub.

    Args:
        card: the edited card; its words and its metadata stay.
        generated: what :func:`model_card` gives now; its metadata fills the gaps.
        name: the address that takes the place of the local folder.

    Raises:
        ConfigError: when the card's metadata is not YAML."""
    known = yaml.safe_load(front_matter(generated)[0] or "")
    own, body = front_matter(_SEAL.sub("", card))
    if own is not None:
        try:
            known |= yaml.safe_load(own) or {}
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ConfigError(f"README.md: its metadata is not YAML ({str(error).splitlines()[0]}); mend it") from error
    body = body.replace(LOCAL_NAME, name).lstrip("\n")
    return f"---\n{yaml.safe_dump(known, sort_keys=True)}---\n\n{body}"


def base_model(report: Mapping[str, Any], plan: PruningPlan) -> str | None:
    """Return the Hub id of the dense model: what was loaded, or what a fallback stood in for; ``None`` for a local
    folder."""
    recipe = report.get("recipe") or {}
    if isinstance(recipe, Mapping) and recipe.get("fallback"):
        return recipe["model"]
    is_id = _HUB_ID.fullmatch(plan.model) and not Path(plan.model).exists()
    return plan.model if is_id else None


def _metadata(
    base_model: str | None,
    license: str | Mapping[str, str] | None,
    languages: tuple[str, ...],
    index: list[dict[str, Any]],
    pipeline: str,
) -> str:
    known: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": pipeline,
        "tags": ["pruned", "multipruner"],
    }
    if base_model:
        known["base_model"] = base_model
        # the Hub knows adapters, merges, quantisations and fine-tunes, not pruning: this is a whole set of other
        # weights, which is what it takes a fine-tune to be
        known["base_model_relation"] = "finetune"
    if license:
        known |= {"license": license} if isinstance(license, str) else license
    if languages:
        known["language"] = list(languages)
    if index:
        known["model-index"] = index
    return f"---\n{yaml.safe_dump(known, sort_keys=True)}---"


def model_index(report: Mapping[str, Any], name: str, task: str = CAUSAL_LM.name) -> list[dict[str, Any]]:
    """Return a report's evaluation results as the Hub's ``model-index``: one result per text and per task; the last one
    of several measurements of the same thing counts. Empty without results.

    Every metric's ``args`` hold its standard error, the dense model's value and the number of examples.
    Format: https://github.com/huggingface/hub-docs/blob/main/modelcard.md"""
    results: dict[str, dict[str, Any]] = {}
    for entry in (report, *report.get("evaluations", ())):
        limit = _settings(entry).get("limit")
        texts = {text: {"perplexity": both} for text, both in (entry.get("perplexity") or {}).items()}
        for data, metrics in (*texts.items(), *(entry.get("tasks") or {}).items()):
            rows = [_metric(metric, both) for metric, both in metrics.items() if finite(both.get("pruned"))]
            if rows:
                dataset = {"type": re.sub(r"[^\w.-]+", "-", data), "name": one_line(data)}
                known = {**dataset, "args": {"limit": limit}} if limit and data not in texts else dataset
                results[data] = {"task": {"type": task}, "dataset": known, "metrics": rows}
    return [{"name": one_line(name), "results": list(results.values())}] if results else []


def _metric(name: str, both: Mapping[str, Any]) -> dict[str, Any]:
    facts = {"stderr": both.get("pruned_stderr"), "dense": both.get("dense"), "examples": both.get("examples")}
    known = {key: value for key, value in facts.items() if finite(value)}
    row = {"type": name, "name": name, "value": both["pruned"]}
    return {**row, "args": known} if known else row


def _settings(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the evaluation settings of a report, or of one of its later evaluations."""
    recipe = entry.get("recipe")
    return entry.get("settings") or (recipe.get("evaluation") if isinstance(recipe, Mapping) else None) or {}


def _summary(report: Mapping[str, Any], model: str, data: str) -> str:
    counts = report.get("parameters") or {}
    text = f"A smaller {code(model)}, made with multipruner from calibration {data} alone: no weight was trained."
    if counts.get("before") and counts.get("after"):
        text += f" {counts['after'] / 1e6:,.1f} of {counts['before'] / 1e6:,.1f} million parameters are left"
        shares = [
            f"{report[key]:.1%} of {what} removed"
            for key, what in (("ratio", "all parameters"), ("backbone_ratio", "the decoder layers"))
            if report.get(key) is not None
        ]
        text += f" ({', '.join(shares)})." if shares else "."
    return text


def _removed(plan: PruningPlan, picture: Any, figure: str | None) -> str:
    anatomy, both = plan.anatomy, (plan.dense, plan.structure)
    rows = [(f"{BLOCK_KINDS[kind].label} blocks", *(anatomy.count(s, kind) for s in both)) for kind in anatomy.kinds]
    axes = [axis for kind in anatomy.kinds for axis in reversed(anatomy.axes(kind))]
    rows += [(axis.label, *(anatomy.total(s, axis.name) for s in both)) for axis in axes]
    if plan.stream is not None:
        rows.append((STREAM.axes[0].label, plan.hidden, len(plan.stream)))
    table = "\n".join(f"| {what} | {before:,} | {after:,} |" for what, before, after in rows)
    text = f"## What was removed\n\n| | dense | here |\n|---|---:|---:|\n{table}\n\n"
    text += "`plan.json` lists every kept head and channel in the dense model's numbering."
    text += f" Its {plan.turned} are those of bases that the run worked out of its text." if plan.bases else ""
    if sizes := tensor_parallel_sizes(plan):
        text += (
            f" The KV groups and MLP channels of every layer divide by {', '.join(map(str, sizes))}, as servers need "
            "that split layers over so many devices (tensor parallelism)."
        )
    if figure:
        text += f"\n\n![What every layer keeps]({figure})"
    return f"{text}\n\n{fenced(str(picture).rstrip())}" if picture else text


def tensor_parallel_sizes(plan: PruningPlan) -> list[int]:
    """Return the numbers of devices, from 2 on, that the KV groups and the MLP channels of every layer divide by.

    Where groups divide, so do their query heads. None for models with blocks of other kinds, such as experts, which
    servers split in other ways, and for image classifiers, which nobody splits.
    """
    if set(plan.anatomy.kinds) != {"attention", "mlp"} or not task_named(plan.model_type).reads_text:
        return []
    common = math.gcd(*(size[0] for size in plan.structure.blocks if size))
    return [count for count in range(2, common + 1) if common % count == 0]


def _numbers(report: Mapping[str, Any]) -> str:
    rows = [
        f"| {plain(name)} | {measured(both.get('dense'))} | {measured(both.get('pruned'))} |"
        for name, both in (report.get("perplexity") or {}).items()
    ]
    parts = ["| perplexity | dense | here |\n|---|---:|---:|\n" + "\n".join(rows)] if rows else []
    if report.get("tasks_markdown"):
        parts.append(str(report["tasks_markdown"]).strip())
    # of several evaluations with the same settings the last one counts
    later = {json.dumps(_settings(entry), sort_keys=True): entry for entry in report.get("evaluations", ())}
    for entry in later.values():
        limit = _settings(entry).get("limit")
        heading = f"Evaluated later, {limit} documents per task:" if limit else "Evaluated later:"
        parts.append(f"{heading}\n\n{Comparison.from_json(entry).markdown(perplexity=True)}")
    return "\n\n".join(["## Numbers", *parts]) if parts else ""


def _limits(report: Mapping[str, Any], task: Task) -> str:
    judged = report.get("perplexity") or report.get("tasks") or report.get("evaluations")
    calibration = (report.get("calibration") or {}).get("name")
    text = code(calibration) if calibration else "a small calibration text" if task.reads_text else "a few pictures"
    others = "other languages and domains" if task.reads_text else "other kinds of pictures"
    text = "text that the dense model wrote itself" if calibration == "self" else text
    lines = [
        "Nothing was trained after the cut. The model knows less than the dense one and may be wrong more often, also "
        "where the dense one is right; further training can win some of that back.",
        f"What could go was decided on {text}: {others} may have lost more than the numbers show.",
        "Whatever the dense model's card says about bias, safety and intended use holds here too, and refusals learned "
        "by the dense model may be weaker.",
        "Fewer parameters mean less memory; how much faster it is depends on the device, so measure it there.",
    ]
    if not judged:
        lines.insert(0, "It has not been evaluated.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _reproduction(report: Mapping[str, Any], plan: PruningPlan) -> str:
    lines = []
    if report.get("command"):
        lines.append(fenced(command_without_places(report["command"]), "sh"))
    if (calibration := report.get("calibration") or {}).get("name"):
        digest = f", hash `{calibration['hash']}`" if calibration.get("hash") else ""
        data = "pictures" if "pictures" in calibration else "text"
        lines.append(f"Calibration {data}: {plain(calibration['name'])}{tokens_of(calibration)}{digest}.")
    recipe = report.get("recipe")
    seed = (recipe.get("calibration") or {}).get("seed") if isinstance(recipe, Mapping) else None
    if seed is not None:
        lines.append(f"Seed: {seed}.")
    if recipe:
        said = recipe if isinstance(recipe, str) else yaml.safe_dump(without_places(recipe), sort_keys=False).rstrip()
        lines.append(f"Recipe: {code(said)}." if "\n" not in said else f"Recipe:\n\n{fenced(said, 'yaml')}")
    if versions := report.get("versions"):
        lines.append("Made with " + ", ".join(f"{package} {version}" for package, version in versions.items()) + ".")
    repaired = isinstance(recipe, Mapping) and recipe.get("repair", "none") != "none"
    gain = " So was the gain of the last norm." if (report.get("search") or {}).get("last_norm_refitted") else ""
    whole = report.get("applied") or (plan.stream is None and not plan.bases)
    again = SAME_BITS if whole else _WORKED_OUT
    lines += [REFITTED + gain if repaired else again, *([f"Note: {UNREPAIRED}."] if report.get("applied") else ())]
    return "\n\n".join(["## How it was made", *lines])
