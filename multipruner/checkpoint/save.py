"""Folders that ``multipruner.load`` and plain transformers open: written whole or not at all, safetensors only."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from multipruner.core.errors import OutputError
from multipruner.core.plan import PruningPlan
from multipruner.storage.files import whole_folder

from .run_folder import is_known

PLAN_FILE = "plan.json"
REPORT_FILE = "report.json"
SHARD_SIZE = "5GB"
"""Weights above this are split over several files."""
_OVERHEAD = 1.05  # tokenizer, plan and report beside the weights


def save(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: Any | None,
    *,
    plan: PruningPlan,
    report: Mapping[str, Any],
    trajectory: Path | None = None,
    card: str,
    replace: bool = False,
) -> Path:
    """Write a checkpoint folder: weights, configuration, tokenizer, plan, report and model card.

    The modelling code comes with it where layers differ; a model of a stock class needs none. Everything goes to a
    sibling folder first and takes its name at the end, so that ``folder`` is whole or absent.

    Args:
        plan, report: written as ``plan.json`` and ``report.json``.
        trajectory: a file with the search's steps, copied under its own name.
        card: text of ``README.md``.
        replace: whether an existing checkpoint in ``folder`` may be replaced (after the new one is complete).

    Raises:
        OutputError: when the folder is taken, cannot be written, or the disk is full; nothing is left behind.
    """
    target = Path(folder).absolute().resolve()  # what a link names is replaced, not the link
    check_target(target, replace)
    check_space(target, weight_bytes(model))
    with whole_folder(target, _keep_others) as partial:
        _write_model(partial, model, tokenizer)
        _write_texts(partial, plan, report, card)
        if trajectory is not None:
            shutil.copyfile(trajectory, partial / trajectory.name)
    return target


def _write_texts(folder: Path, plan: PruningPlan, report: Mapping[str, Any], card: str) -> None:
    record = json.dumps(report, indent=1, default=str) + "\n"
    for name, text in {PLAN_FILE: plan.to_json(), REPORT_FILE: record, "README.md": card}.items():
        (folder / name).write_text(text, encoding="utf-8")


def weight_bytes(model: PreTrainedModel) -> int:
    """Size of a model's weights in bytes, tied tensors counted once."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def check_target(target: Path, replace: bool) -> None:
    """Refuse a folder that may not, or can not, be replaced.

    Raises:
        OutputError: naming what is there.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not replace:
        raise OutputError(f"{target} exists already; choose another folder or allow it to be replaced")
    if not (target / "config.json").is_file():
        raise OutputError(f"{target} is not a model's folder (no config.json) and will not be replaced")


def check_space(target: Path, weights: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OutputError: naming what is needed and what is free.
    """
    existing = next(parent for parent in target.parents if parent.exists())
    need, free = int(weights * _OVERHEAD), shutil.disk_usage(existing).free
    if need > free:
        raise OutputError(f"{target} needs {need / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free")


def _write_model(folder: Path, model: PreTrainedModel, tokenizer: Any | None) -> None:
    settings = model.generation_config
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:  # such as a temperature without sampling, as many dense models have; not saved otherwise
            settings.do_sample = True
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _keep_others(old: Path, new: Path) -> None:
    """Carry over what somebody else put into the folder. What a run, its search or its report writes is replaced, or
    goes: a tokenizer's file or a figure of another model would be taken for this one's."""
    for path in old.iterdir():
        ours = path.suffix in (".safetensors", ".py") or path.name.endswith(".index.json") or is_known(path.name)
        if ours or (new / path.name).exists():
            continue
        if not path.is_dir():
            shutil.copy2(path, new / path.name)
            continue
        copy = Path(shutil.copytree(path, new / path.name))
        known = [inner for inner in copy.iterdir() if inner.is_file() and is_known(f"{copy.name}/{inner.name}")]
        for inner in known:
            inner.unlink()
        if known and not any(copy.iterdir()):
            copy.rmdir()
