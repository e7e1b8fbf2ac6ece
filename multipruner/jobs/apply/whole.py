"""A plan of a text tower made into the whole model of several modalities, with the tower that it leaves in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from multipruner.checkpoint.run_folder import read_run
from multipruner.checkpoint.save import check_space, save
from multipruner.core.families.towers import Tower
from multipruner.core.plan import PruningPlan
from multipruner.report.card import model_card
from multipruner.report.words import UNREPAIRED
from multipruner.storage.files import path_of
from multipruner.storage.tensor_bytes import Part
from multipruner.storage.tensor_headers import INDEX, SINGLE
from multipruner.stream.deferred import Values
from multipruner.stream.whole import Whole, check_whole, run_parts, write_whole
from multipruner.stream.write import part_of, saved_tensors


@dataclass(frozen=True)
class TextTower:
    """The tower that goes into a wrapper.

    Attributes:
        parts: its tensors, by the names that they have as a model.
        note: what is said of them.
        report: what the report of the run says that they are of; ``None`` where a plan alone made them.
    """

    parts: Mapping[str, Part]
    note: str
    report: Mapping[str, Any] | None = None


def text_tower(plan_name: str, pruned: PreTrainedModel, whole: Whole, *, any_weights: bool) -> TextTower:
    """Return what goes into a wrapper: the weights of the run that the plan was named by, with their repair, else the
    cut dense ones.

    Args:
        plan_name: as it was given.
        pruned: the cut model, its weights deferred.
        whole: the wrapper.
        any_weights: whether other weights than the run's were meant.

    Raises:
        OutputError: when the run's folder is damaged.
        ConfigError: when it holds another model than its plan leaves.
    """
    folder = path_of(plan_name)
    if not any_weights and any((folder / name).is_file() for name in (SINGLE, INDEX)):
        run = read_run(folder)
        return TextTower(run_parts(folder, whole), f"the text tower is that of {folder}, as it is there", run.report)
    tensors = saved_tensors(pruned)
    values = Values(tensors.values())
    return TextTower({name: part_of(name, tensor, values) for name, tensor in tensors.items()}, UNREPAIRED)


def about(tower: Tower, report: Mapping[str, Any], text: TextTower) -> dict[str, Any]:
    """Return what ``report.json`` holds of a whole model.

    Args:
        tower: the wrapper's row.
        report: of the cut tower.
        text: what goes into the wrapper.
    """
    own = {key: report[key] for key in ("model", "command", "versions")}
    whole = {"model_type": tower.model_type, "class": tower.class_name}
    return {**(text.report or report), **own, "whole": whole}


def save_whole(
    output: Path,
    pruned: PreTrainedModel,
    tick: Callable[[int], object],
    *,
    plan: PruningPlan,
    report: Callable[[], dict[str, Any]],
    overwrite: bool,
    reopen: bool,
    whole: Whole,
    text: TextTower,
) -> None:
    """Write the whole model's folder; it appears only when everything is there.

    Args:
        output: the folder.
        pruned: the cut tower.
        tick: called with the bytes of every tensor that was written.
        plan: what stayed of the tower.
        report: gives what ``report.json`` holds.
        overwrite: whether an earlier run in the folder may be replaced.
        reopen: whether the stock class opens it at the end, where memory allows that.
        whole: the wrapper.
        text: the tower that goes into it.

    Raises:
        OutputError: when the folder cannot be written, or does not hold what it should.
    """
    check_space(output.absolute().resolve(), whole.nbytes(text.parts))
    save(
        output, pruned, None, plan=plan, report=report, card=model_card(report(), plan), replace=overwrite,
        source=whole.wrapper,
        weights=lambda folder: write_whole(folder, whole, text.parts, tick),
        check=lambda folder: check_whole(folder, whole, text.parts, reopen=reopen),
    )  # fmt: skip
