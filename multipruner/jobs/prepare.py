"""From a recipe to what every stage needs: model, text, moments, orders."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from multipruner.checkpoint.rehearsal import Rehearsal
from multipruner.config.recipe import Recipe
from multipruner.console.progress import Show, counting_display, named, waiting_display
from multipruner.console.say import teller
from multipruner.core.errors import NumericsError
from multipruner.core.plan import Ranking
from multipruner.engine.fingerprint import fingerprint
from multipruner.engine.moments import Statistics, positions_of, seldom_routed
from multipruner.engine.precision import TYPES, Precision, product_rates
from multipruner.engine.processes import Team
from multipruner.engine.prunable import Prunable
from multipruner.eval import check_settings, evaluate, perplexity
from multipruner.repair.scoring import unrepaired
from multipruner.sources.calibration import CalibrationSet, CalibrationText, held_out_text
from multipruner.sources.dense import device_of, load_dense, stored_in
from multipruner.sources.intake.processor import shape_of
from multipruner.sources.intake.spare import ahead_in
from multipruner.sources.pictures import PictureFiles, pictures_of
from multipruner.sources.resolve import ResolvedModel, resolve

from .forecast.bounds import Fitting
from .forecast.run import Forecast, forecast, idle_of, say_forecast, unwritten_of
from .forecast.walks import Experts, layers_on_disk, said, together_in, walking
from .narrow import check_asked, narrowed, ordered, unturned
from .record import timed
from .setting import Setting, along_in

_TEXT_ONLY = (
    "note: the result is a text-only model; where its layers are alike (--layout uniform), `multipruner apply` with "
    "the run's folder puts it back into the whole"
)
"""What is said where the text tower of a model of several modalities is pruned."""
_SEARCH = ("text", "moments", "search")
"""The stages of a job that finds structures and makes none."""
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
    pictures: bool = False,
) -> Setting:
    """Call :func:`prepare` in every process of a job: rank 0 first, for what lands in the cache; the same
    everywhere."""
    # what is fastest must be the same everywhere, so one process measures
    rates = None if team.size == 1 else team.told(lambda: product_rates(device_of(recipe.device), TYPES))
    work = partial(prepare, recipe, console, seconds, rates, first=not team.rank, output=output, walks=walks,
                   pictures=pictures)  # fmt: skip
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
    pictures: bool = False,
    searches: bool = False,
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
        pictures: whether the job at hand can do with an image classifier.
        searches: whether losses of structures alone are wanted, and memory for nothing else.
    """
    say = teller(console)
    check_text(recipe)
    with timed(seconds, "load"), waiting_display(console, "loading the model"):
        source = resolve(recipe, say)
        experts, mapped = Experts(recipe, rates, say, walks=walks), walks and recipe.offload != "none"
        model, tokenizer = load_dense(source, recipe, mapped=mapped, pictures=pictures, stack=experts.stacked)
        mark, precision = fingerprint(model), Precision.of(model, recipe.compute_dtype, rates)
        say(precision.line())
        prunable = Prunable.of(model, precision.stored, along_in(recipe))
        copied = partial(experts.copied, source, precision.stored)
        layers = layers_on_disk(recipe, prunable, precision.computed, walks=walks, copied=copied)
        text = prunable.spec.task.reads_text
        if first and text:
            fitting = _fitting(prunable, tokenizer, precision.computed, walks, copied)
            recipe, layers = replace(fitting, stages=_SEARCH if searches else ()).fit(recipe, layers, say)
        if layers:
            recipe = walking(recipe)
            say(said(prunable, precision.computed))
        check_asked(recipe, prunable)
        for note in _notes(recipe, prunable, source):
            say(note)
        held = precision.held(model, layers)
        prunable.on_disk = held.on_disk
        uniform, about = recipe.layout == "uniform", (source.path_or_id, source.revision)
        rehearsal = nullcontext()
        if first:
            rehearsal = Rehearsal(model, tokenizer, *about, uniform=uniform, along=along_in(recipe))
    expected = _foretold(recipe, prunable, tokenizer, output, console) if first and text and output else None
    with rehearsal, counting_display(console, "text") as display:
        with timed(seconds, "text" if text else "pictures"):
            parts = _read(recipe, prunable, tokenizer, source.name, say, display)
        setting = Setting(
            recipe, source, prunable, tokenizer, parts.calibration, parts.held_out, None, parts.moments,
            Ranking.identity(prunable.anatomy), None, mark, precision, held, parts.record, forecast=expected,
            pictures=parts.pictures,
        )  # fmt: skip
        hidden = len(stream) if stream is not None else recipe.hidden_size
        with timed(seconds, "moments"):
            setting = (
                narrowed(setting, hidden, display, stream) if isinstance(hidden, int) else ordered(setting, display)
            )
            _say_seldom_routed(setting.statistics, prunable, say)
    return setting


def _notes(recipe: Recipe, prunable: Prunable, source: ResolvedModel) -> Iterator[str]:
    """Yield what a recipe asks for, and a model has, that the result will not have."""
    if source.wrapper is not None:
        yield _TEXT_ONLY
    yield from filter(None, (unturned(recipe, prunable), unrepaired(recipe.repair, prunable)))
    if further := ahead_in(prunable.model.config, prunable.spec, partial(stored_in, source)):
        yield f"layers that predict further tokens ({further}) are left out of the result"


class _Parts(NamedTuple):
    """What a run reads: for scores, for the comparison at the end, for the moments; and what the report says of it."""

    calibration: CalibrationSet
    held_out: CalibrationSet | None
    moments: torch.Tensor | None
    record: Mapping[str, Any]
    pictures: PictureFiles | None = None


def _read(
    recipe: Recipe, prunable: Prunable, tokenizer: Any, name: str, say: Callable[[str], None], display: Show
) -> _Parts:
    """Return the text of a recipe, or the pictures; ``tokenizer`` then is the image processor, ``name`` the model's."""
    if not prunable.spec.task.reads_text:
        return _pictures(recipe, prunable, tokenizer, name, say)
    check_settings(recipe.evaluation)
    texts = CalibrationText(recipe.text, tokenizer, prunable.model, say=say, progress=named(display, "text"))
    calibration, held_out = texts.part("calibration"), held_out_text(recipe, texts)
    _check_loss(recipe, prunable, tokenizer, calibration)
    more = _moments_text(recipe, texts, say)
    say(texts.line())
    return _Parts(calibration, held_out, more, texts.record())


def _pictures(recipe: Recipe, prunable: Prunable, processor: Any, name: str, say: Callable[[str], None]) -> _Parts:
    config = prunable.model.config
    blank = torch.zeros(1, *shape_of(name, config, processor))
    found = pictures_of(recipe, config, processor, name, positions_of(prunable, blank))
    say(found.line())
    return _Parts(found.calibration, None, found.moments, found.record(), found.held_out)


def check_text(recipe: Recipe) -> None:
    """Check what the evaluation reads; a folder may be one of pictures, for an image classifier."""
    text = recipe.evaluation.text
    if text is None or not Path(text).expanduser().is_dir():
        check_settings(recipe.evaluation)


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
