"""From what a search found to the folder: repair, surgery, evaluation, checkpoint, report, card."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from multipruner.checkpoint.carry import folder_of
from multipruner.checkpoint.classes import family_of
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.reopen import check_reopened
from multipruner.checkpoint.save import SHARD_SIZE, save, weight_bytes
from multipruner.console.events import tell
from multipruner.console.progress import counting_display, judging_display, named, waiting_display
from multipruner.console.say import Say, teller
from multipruner.core.plan import PruningPlan
from multipruner.engine.prunable import Outputs
from multipruner.eval import Comparison, Evaluation, compare, evaluate
from multipruner.eval.accuracy import classes_of, judged
from multipruner.repair.write import repair_outputs, write_outputs, write_values
from multipruner.report import notebook
from multipruner.report.card import model_card
from multipruner.report.summary import next_commands, render
from multipruner.sources.pictures import PictureFiles
from multipruner.storage.memory import free_memory
from multipruner.storage.tensors_on_disk import mapped
from multipruner.stream.write import write_weights
from multipruner.stream.written import check_written

from .forecast.run import outcome
from .forecast.walks import together_in
from .last_repair import repair_all, scored_with_repair
from .record import latency_record, place_of, record, result_of, timed
from .setting import Found, Setting
from .workspace import Workspace


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where the pruned model is.
        plan: what of the dense model stayed.
        report: what ``report.json`` holds.
        model, tokenizer: the pruned model in memory; of an image classifier with its image processor.
    """

    folder: Path
    plan: PruningPlan
    report: dict[str, Any]
    model: Any = field(repr=False)
    tokenizer: Any = field(repr=False)

    def __repr__(self) -> str:
        return notebook.line(self)

    def _repr_html_(self) -> str:
        """Return what a notebook shows."""
        return notebook.html(self)


def finish(
    setting: Setting,
    found: Found,
    workspace: Workspace,
    console: Console,
    command: str | None,
    seconds: dict[str, float],
    *,
    about_search: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> Run:
    """Make the folder of what a search found: repair, surgery, evaluation, checkpoint, report, card.

    Args:
        setting: what :func:`prepare` gave.
        found: the structure to make.
        workspace: of the output folder, entered.
        console: for progress and the summary.
        command: the command line, for the record.
        seconds: how long the stages before took; those of the ones here are added.
        about_search: what else the report says about the search.
        files: what else goes into the folder, contents by name.

    Raises:
        OutputError: when the folder cannot be written, or does not hold the model in memory when it is opened again.
    """
    recipe, say, output = setting.recipe, teller(console), workspace.output
    if setting.repairs_all:
        with timed(seconds, "repair"), counting_display(console, "repair") as display:
            found = repair_all(setting, found, say, named(display, "repair"))
    elif setting.repair is not None and setting.search_repair is None:
        with waiting_display(console, "loss"):
            found = scored_with_repair(setting, found)
    plan = setting.plan_of(found.structure)
    tell(console, "loss", what="calibration", loss=found.loss, before_repair_of_all=found.loss_before_outputs)
    with timed(seconds, "surgery"), waiting_display(console, "surgery"), setting.held.released():
        pruned = cut_model(setting, plan, found.outputs, found.gain)
    with timed(seconds, "evaluation"):
        comparison = _evaluate(setting, pruned, console)
    report = record(setting, plan, found, comparison, seconds, command)
    report["model"] |= place_of(recipe.model, output)
    report["search"] |= dict(about_search or {})
    if (on_disk := setting.prunable.on_disk) is not None:
        report["offload"] = {"layers": "disk", "walks": round(on_disk.walks, 1)}
        say(f"the dense model was read {on_disk.walks:.0f} times, layer by layer")
    if recipe.latency_table is not None:
        with waiting_display(console, "latency"):
            report["latency"] = latency_record(setting, plan, pruned, say)
    card = model_card(report, plan, stock=family_of(pruned.config.to_dict()) is None)
    journal = workspace.journal_path
    began = time.perf_counter()

    def ended() -> dict[str, Any]:
        """Return the report at the very end, where what the writing took is known."""
        taken = {**seconds, "writing": time.perf_counter() - began}
        report.update(seconds=taken, **outcome(setting.forecast, taken, pruned.device.type))
        return report

    with timed(seconds, "writing"), waiting_display(console, "saving"):
        save(
            output, pruned, setting.tokenizer, plan=plan, report=ended, trajectory=journal, card=card, replace=True,
            source=folder_of(setting.source.path_or_id, setting.source.revision), extra=files,
            **_written_and_checked(setting, pruned),
        )  # fmt: skip
    console.print(render(report, output, comparison.table()))
    peak = report.get("forecast", {}).get("memory", {}).get("peak_bytes")
    if setting.forecast is not None and peak and (beyond := setting.forecast.beyond(peak)):
        say(beyond)
    say(next_commands(output, task=setting.prunable.spec.task))
    tell(console, "result", **result_of(report, output))
    return Run(output, plan, report, pruned, setting.tokenizer)


def _written_and_checked(setting: Setting, pruned: Any) -> dict[str, Any]:
    """Return how weights are written, and held against the model: experts of layers on disk one layer at a time, and
    opened again only where memory has room for them all.
    """
    reopened = {"check": lambda folder: check_reopened(folder, pruned, setting.calibration.ids)}
    prunable = setting.prunable
    if prunable.on_disk is None or not prunable.spec.routes(prunable.anatomy.kinds):
        return reopened
    weights = {"weights": lambda folder: write_weights(folder, pruned, SHARD_SIZE, lambda done: None)}
    if 2 * weight_bytes(pruned) <= free_memory():
        return weights | reopened
    return weights | {"check": lambda folder: check_written(folder, pruned, trust=True, reopen=False)}


def cut_model(setting: Setting, plan: PruningPlan, outputs: Outputs, gain: torch.Tensor | None = None) -> Any:
    """Return the pruned model in memory, with these output projections and this gain of the last norm, or repaired
    block by block where there are no projections.
    """
    prunable = setting.prunable
    own = torch.clone if prunable.on_disk is None else mapped
    pruned = apply_plan(prunable.original.model, plan, None if prunable.wider is None else prunable.model, own)
    write_values(pruned, prunable, plan, outputs)
    if outputs:  # they cover every block that stays
        write_outputs(pruned, setting.prunable, plan, setting.ranking, outputs, gain)
    elif setting.repair is not None and setting.statistics is not None:
        repair_outputs(pruned, setting.prunable, plan, setting.statistics, setting.recipe.ridge, setting.repair.how)
    return pruned


def _evaluate(setting: Setting, pruned: Any, console: Console) -> Comparison:
    """Evaluate dense and pruned model on the same text and tasks, or pictures."""
    if setting.pictures is not None:
        return _right_answers(setting, setting.pictures, pruned, console)
    ids, name = (setting.held_out.ids, f"held-out {setting.held_out.name}") if setting.held_out else (None, "")

    def judge(model: Any, who: str, say: Say) -> Evaluation:
        spec = setting.recipe.evaluation
        with judging_display(console, who) as display:
            return evaluate(
                model, setting.tokenizer, spec, fallback_ids=ids, fallback_name=name, say=say, progress=display,
                together=together_in(setting.prunable, spec.length),
            )  # fmt: skip

    family = setting.prunable.spec
    layers = pruned.get_submodule(f"{family.decoder}.{family.layers}") if setting.prunable.on_disk else ()
    with setting.precision.computing(pruned, layers):
        dense = judge(setting.prunable.original.model, "dense", teller(console))
        return compare(dense, judge(pruned, "pruned", lambda text: None))


def _right_answers(setting: Setting, pictures: PictureFiles, pruned: Any, console: Console) -> Comparison:
    """Return how many pictures dense and pruned model get right."""
    answers = {}
    with setting.precision.computing(pruned):
        for who, model in (("dense", setting.prunable.original.model), ("pruned", pruned)):
            with judging_display(console, who) as display:
                answers[who] = classes_of(model, pictures.pixels, len(pictures), display)
    name, dense = f"pictures of {pictures.name}", answers["dense"]
    before, after = (judged(name, answers[who], pictures.labels, dense) for who in ("dense", "pruned"))
    return compare(before, after)
