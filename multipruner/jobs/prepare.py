"""From a recipe to what every stage needs: model, text, moments, orders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from multipruner.checkpoint.rehearsal import Rehearsal
from multipruner.config.recipe import Recipe
from multipruner.console.progress import counting_display, named, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import NumericsError
from multipruner.core.plan import Ranking
from multipruner.engine.fingerprint import fingerprint
from multipruner.engine.moments import Statistics, seldom_routed
from multipruner.engine.precision import TYPES, Precision, name_of, product_rates
from multipruner.engine.processes import Team
from multipruner.engine.prunable import Prunable
from multipruner.eval import check_settings, evaluate, perplexity
from multipruner.repair.scoring import unrepaired
from multipruner.sources.calibration import CalibrationSet, CalibrationText, held_out_text
from multipruner.sources.dense import device_of, load_dense, stored_otherwise
from multipruner.sources.resolve import resolve

from .forecast.bounds import Fitting
from .forecast.run import Forecast, forecast, idle_of, say_forecast, unwritten_of
from .forecast.walks import layers_on_disk, said, together_in, walking
from .narrow import check_asked, narrowed, ordered
from .record import timed
from .setting import Setting

_TEXT_ONLY = (
    "note: the result is a text-only model; where its layers are alike (--layout uniform), `multipruner apply` with "
    "the run's folder puts it back into the whole"
)
"""What is said before the text tower of a model of several modalities is pruned."""
_ABSURD_LOSS = 1e6
"""Nats per token beyond which differences between candidates are lost in rounding; a uniform guess costs about 12."""


def prepared(
    recipe: Recipe,
    team: Team,
    console: Console,
    seconds: dict[str, float],
    output: Path | None = None,
    *,
    walks: bool = False,
) -> Setting:
    """Call :func:`prepare` in every process of a job: rank 0 first, for what lands in the cache; the same
    everywhere."""
    # what is fastest must be the same everywhere, so one process measures
    rates = None if team.size == 1 else team.told(lambda: product_rates(device_of(recipe.device), TYPES))
    work = partial(prepare, recipe, console, seconds, rates, first=not team.rank, output=output, walks=walks)
    setting = team.one_first(work, lambda found: json.dumps(found.identity))
    return replace(setting, team=team)


def prepare(
    recipe: Recipe,
    console: Console,
    seconds: dict[str, float],
    rates: Mapping[str, float] | None = None,
    *,
    first: bool = True,
    output: Path | None = None,
    stream: tuple[int, ...] | None = None,
    walks: bool = False,
) -> Setting:
    """Load model and calibration, rank the widths, refuse what cannot be reached before any search.

    Args:
        recipe: what to do.
        console: for messages and progress.
        seconds: how long each stage took is added here.
        rates: how fast this machine multiplies (:class:`.Precision`); default: measured now.
        first: whether this process writes the result, and so rehearses the writing.
        output: folder of a run whose stages are to be foretold.
        stream: the dimensions of the residual stream that stay, where a plan says so.
        walks: whether decoder layers may stay on disk, as the recipe says.
    """
    say = teller(console)
    check_settings(recipe.evaluation)
    with timed(seconds, "load"), waiting_display(console, "loading the model"):
        source = resolve(recipe, say)
        if source.wrapper is not None:
            say(_TEXT_ONLY)
        model, tokenizer = load_dense(source, recipe, mapped=walks and recipe.offload != "none")
        mark, precision = fingerprint(model), Precision.of(model, recipe.compute_dtype, rates)
        say(precision.line())
        prunable = Prunable.of(model, precision.stored)
        copied = partial(stored_otherwise, source, name_of(precision.stored))
        layers = layers_on_disk(recipe, prunable, precision.computed, walks=walks, copied=copied)
        if first and output is not None:
            recipe, layers = _fitting(prunable, tokenizer, precision.computed, walks, copied).fit(recipe, layers, say)
        if layers:
            recipe = walking(recipe)
            say(said(prunable, precision.computed))
        check_asked(recipe, prunable)
        if warning := unrepaired(recipe.repair, prunable):
            say(warning)
        held = precision.held(model, layers)
        prunable.on_disk = held.on_disk
        if further := getattr(model.config, prunable.spec.ahead or "-", 0):
            say(f"layers that predict further tokens ({prunable.spec.ahead} = {further}) are left out of the result")
        rehearsal = nullcontext()
        if first:
            uniform = recipe.layout == "uniform"
            rehearsal = Rehearsal(model, tokenizer, source.path_or_id, source.revision, uniform=uniform)
    expected = _foretold(recipe, prunable, tokenizer, output, console) if first and output is not None else None
    with rehearsal, counting_display(console, "text") as display:
        with timed(seconds, "text"):
            text = named(display, "text")
            texts = CalibrationText(recipe.text, tokenizer, model, say=say, progress=text)
            calibration, held_out = texts.part("calibration"), held_out_text(recipe, texts)
            _check_loss(recipe, prunable, tokenizer, calibration)
            more = _moments_text(recipe, texts, say)
            say(texts.line())
        setting = Setting(
            recipe, source, prunable, tokenizer, calibration, held_out, None, more, Ranking.identity(prunable.anatomy),
            None, mark, precision, held, texts.record(), forecast=expected,
        )  # fmt: skip
        hidden = len(stream) if stream is not None else recipe.hidden_size
        with timed(seconds, "moments"):
            setting = (
                narrowed(setting, hidden, display, stream) if isinstance(hidden, int) else ordered(setting, display)
            )
            _say_seldom_routed(setting.statistics, prunable, say)
    return setting


def _fitting(
    prunable: Prunable, tokenizer: Any, computed: torch.dtype, walks: bool, copied: Callable[[], Sequence[str]]
) -> Fitting:
    model = prunable.model
    idle = idle_of(model) if model.device.type == "cpu" else 0
    return Fitting(prunable, computed, idle, walks, copied, unwritten_of(model, tokenizer))


def _foretold(recipe: Recipe, prunable: Prunable, tokenizer: Any, output: Path, console: Console) -> Forecast:
    with waiting_display(console, "forecast"):
        found = forecast(recipe, prunable, output, tokenizer=tokenizer, on_disk=prunable.on_disk is not None)
    say_forecast(found, teller(console), console)
    return found


def _say_seldom_routed(statistics: Statistics | None, prunable: Prunable, say: Callable[[str], None]) -> None:
    if statistics is not None and (warning := seldom_routed(statistics, prunable.anatomy)):
        say(warning)


def _check_loss(recipe: Recipe, prunable: Prunable, tokenizer: Any, calibration: CalibrationSet) -> None:
    """Check that the dense model itself has a loss before any candidate is compared with it, or judged at the end.

    Raises:
        NumericsError: when it is not finite though every weight is.
    """
    spec = recipe.evaluation
    what, model = "the calibration text", prunable.model
    try:
        together = together_in(prunable, calibration.ids.shape[1])
        loss = max(perplexity(model, calibration.ids, batch_size=together).sequence_nll)
        if loss > _ABSURD_LOSS:
            raise NumericsError(
                f"a loss of {loss:.3g} nats per token is no language model's; the checkpoint is damaged"
            )
        if "ppl" in spec.tasks and spec.text is not None:
            what = spec.text
            evaluate(model, tokenizer, spec.model_copy(update={"tasks": ("ppl",), "max_tokens": spec.length}),
                     together=together_in(prunable, spec.length))  # fmt: skip
    except NumericsError as error:
        raise NumericsError(
            f"the dense model on {what}: {error}; give --compute-dtype float32 or --dtype bfloat16"
        ) from None


def _moments_text(recipe: Recipe, texts: CalibrationText, say: Callable[[str], None]) -> torch.Tensor | None:
    """Return more of the calibration text for the moments, where something needs them; token ids."""
    asked = recipe.text.moments_sequences
    if not asked:
        return None
    ids = texts.part("moments").ids
    if len(ids) < asked:
        say(
            f"moments of {len(ids)} sequences, not of {asked}: the text has no more of its own for them; order and "
            f"repair gain from more (a longer text, or --calibration {recipe.calibration.source}+self)"
        )
    return ids
