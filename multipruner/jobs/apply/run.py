"""A plan and a dense checkpoint made into the pruned one without loading either: shapes first, then bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from multipruner.checkpoint.classes import family_of
from multipruner.checkpoint.config import pruned_config
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import SHARD_SIZE, check_target, save, weight_bytes
from multipruner.config.precedence import trusts
from multipruner.config.recipe import Recipe
from multipruner.console.events import tell
from multipruner.console.progress import bytes_display, waiting_display
from multipruner.console.say import Say, teller
from multipruner.core.errors import ConfigError
from multipruner.core.families import Family
from multipruner.core.plan import PruningPlan
from multipruner.engine.prunable import Prunable
from multipruner.jobs.record import described, place_of
from multipruner.report.card import model_card
from multipruner.report.summary import next_commands
from multipruner.report.words import UNREPAIRED
from multipruner.sources.dense import Accounted, accounted
from multipruner.sources.resolve import ResolvedModel, resolve
from multipruner.stream.dense import deferred_model, dtype_of, has_fingerprint, shell_of
from multipruner.stream.plans import find_plan
from multipruner.stream.whole import Whole, whole_of
from multipruner.stream.write import write_weights
from multipruner.stream.written import check_written

from .whole import about, save_whole, text_tower


@dataclass(frozen=True)
class Applied:
    """A pruned checkpoint that a plan was made into.

    Attributes:
        folder: where it is.
        plan: what of the dense model stayed.
        report: what ``report.json`` holds.
    """

    folder: Path
    plan: PruningPlan
    report: dict[str, Any]


def stream_plan(
    plan_name: str,
    recipe: Recipe,
    output: Path,
    *,
    console: Console | None = None,
    command: str | None = None,
    overwrite: bool = False,
    any_weights: bool = False,
    reopen: bool = True,
    text_only: bool = False,
    shard_size: str = SHARD_SIZE,
) -> Applied:
    """Write the model that a plan leaves of a dense checkpoint, tensor by tensor.

    Of a model of several modalities that is the whole, with the text tower that the plan leaves.

    Args:
        plan_name: see :func:`.find_plan`.
        recipe: its ``model``, ``revision``, ``fallback`` and ``trust_remote_code`` count.
        output: the folder; it appears only when everything is there.
        console: where progress goes; default: nowhere.
        command: the command line, for the record.
        overwrite: whether an earlier run in ``output`` may be replaced.
        any_weights: take weights of the same shapes that are not those that the plan was made of.
        reopen: open what was written where memory allows that; names, shapes and types are compared all the same.
        text_only: whether of a model of several modalities the text model alone is meant.
        shard_size: the most that one file of weights holds; a whole model of several modalities keeps its files.

    Raises:
        ConfigError: when the plan is none, or one of another model.
        UnsupportedModelError: before any work, when a whole model of several modalities cannot have such a text tower.
        OutputError: when the folder cannot be written, or does not hold what it should.
        MultiprunerError: for a dense model that cannot be pruned, as for a run; nothing half-written is left.
    """
    console = console or Console(quiet=True)
    say, began, trust = teller(console), time.perf_counter(), trusts(recipe.trust_remote_code)
    _check_output(output, overwrite)
    plan = _of_dense(find_plan(plan_name), plan_name)
    wholes: list[Whole] = []
    put_back = (lambda wrapper, name: None) if text_only else (lambda *it: wholes.append(whole_of(plan, *it)))
    source = resolve(recipe, say, put_back)
    with waiting_display(console, "checking"):
        found = accounted(source, recipe, partial(_check_fits, plan, trust))
        dense = deferred_model(found, trust)
    same = _check_weights(plan, source, dense, any_weights, console)
    if any_weights:  # what comes out is of these
        plan = replace(plan, model=source.name, revision=source.revision, fingerprint=None)
    pruned = apply_plan(dense, plan)
    text = text_tower(plan_name, pruned, wholes[0], any_weights=any_weights) if wholes else None
    say(f"note: {text.note if text else UNREPAIRED}")
    _say_types(found, say)
    report = _report(source, recipe, plan, Prunable.of(dense, along=plan.along), same, command)
    report["model"] |= place_of(recipe.model, output)
    report = about(wholes[0].tower, report, text) if text else report

    def ended() -> dict[str, Any]:
        return {**report, "seconds": {"all": time.perf_counter() - began}}

    write = partial(_save, found=found, shard_size=shard_size, trust=trust)
    size = weight_bytes(pruned)
    if text is not None:
        write, size = partial(save_whole, whole=wholes[0], text=text), wholes[0].nbytes(text.parts)
    with bytes_display(console, "writing", size) as tick:
        write(output, pruned, tick=tick, plan=plan, report=ended, overwrite=overwrite, reopen=reopen)
    before, after = report["parameters"].values()
    say(f"parameters: {before:,} -> {after:,} (-{report['ratio']:.2%}); written to {output}")
    say(next_commands(output, whole=text is not None))
    tell(console, "result", folder=str(output), **{key: report[key] for key in ("ratio", "parameters")})
    return Applied(output, plan, report)


def _of_dense(plan: PruningPlan, name: str) -> PruningPlan:
    """Return a plan whose units are those of the dense weights.

    Raises:
        ConfigError: for one of a run that turned its values, or its stream, into bases of its own.
    """
    if plan.bases:
        raise ConfigError(
            f"{name}: its {plan.turned} are those of bases that the run worked out of its calibration text; "
            "take the run's own folder, or prune with --plan and the run's recipe"
        )
    return plan


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that is no folder for a model, or may not be replaced."""
    if output.suffix == ".gguf":
        raise ConfigError(
            f"{output}: of a model that is no .gguf file a folder of safetensors is written; name one, then make the "
            "file of it with `multipruner export FOLDER --format gguf`"
        )
    check_target(output.absolute().resolve(), overwrite)


def _say_types(found: Accounted, say: Say) -> None:
    """Say it where the weights on disk are of several types."""
    if len(types := sorted({tensor.dtype for tensor in found.stored.values()})) > 1:
        say(f"note: weights are stored as {', '.join(types)}; all become {dtype_of(found)}, as when they are loaded")


def _save(
    output: Path,
    pruned: PreTrainedModel,
    tick: Callable[[int], object],
    *,
    plan: PruningPlan,
    report: Callable[[], dict[str, Any]],
    overwrite: bool,
    reopen: bool,
    found: Accounted,
    shard_size: str,
    trust: bool,
) -> None:
    """Write a language model's folder."""
    card = model_card(report(), plan, stock=family_of(pruned.config.to_dict()) is None)
    save(
        output, pruned, found.tokenizer, plan=plan, report=report, card=card, replace=overwrite, source=found.folder,
        weights=lambda folder: write_weights(folder, pruned, shard_size, tick),
        check=lambda folder: check_written(folder, pruned, trust, reopen),
    )  # fmt: skip


def _check_fits(plan: PruningPlan, trust: bool, config: Any, spec: Family) -> None:
    """Refuse a plan of another model before any weight of this one is fetched."""
    pruned_config(config, plan, shell_of(config, spec, trust))


def _check_weights(
    plan: PruningPlan, source: ResolvedModel, dense: PreTrainedModel, any_weights: bool, console: Console
) -> bool | None:
    """Tell whether the weights are those that the plan was made of; ``None`` where that is not known.

    Raises:
        ConfigError: when they are others and nobody asked for that.
    """
    if plan.fingerprint is None or any_weights:
        return None
    with bytes_display(console, "comparing", weight_bytes(dense)) as tick:
        if has_fingerprint(dense, plan.fingerprint, tick):
            return True
    revision = f" at revision {plan.revision}" if plan.revision else ""
    raise ConfigError(
        f"the plan was made for {plan.model}{revision}, and the weights of {source.name} differ from those it was made "
        f"of (fingerprint {plan.fingerprint[:12]}); name that model, or pass --any-weights to cut these, such as those "
        "of a fine-tuned model, all the same"
    )


def _report(
    source: ResolvedModel, recipe: Recipe, plan: PruningPlan, dense: Prunable, same: bool | None, command: str | None
) -> dict[str, Any]:
    """Return what ``report.json`` holds of a model that nobody searched for here and nobody has evaluated."""
    return {
        **described(source, recipe, dense.costs, plan, plan.fingerprint if same else None, command),
        "applied": {"weights_compared": same, "note": UNREPAIRED},
        "search": {"method": "given plan"},
        "perplexity": {},
        "tasks": {},
    }
