"""Folders that ``multipruner.load`` and plain transformers open: written whole or not at all, safetensors only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from multipruner.core.errors import OutputError
from multipruner.core.plan import PruningPlan
from multipruner.storage.files import open_to_others, whole_folder
from multipruner.storage.partial import header_of

from .carry import write_generation, write_processor, write_tokenizer
from .classes import task_of
from .run_folder import is_ours, is_written, written

PLAN_FILE = "plan.json"
REPORT_FILE = "report.json"
CARD = "README.md"
SHARD_SIZE = "5GB"
"""Weights above this are split over several files."""
_OVERHEAD = 1.05  # tokenizer, plan and report beside the weights


def save(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: Any | None,
    *,
    plan: PruningPlan,
    report: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
    trajectory: Path | None = None,
    card: str,
    replace: bool = False,
    source: Path | None = None,
    extra: Mapping[str, bytes] | None = None,
    check: Callable[[Path], None] | None = None,
    weights: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint folder: weights, configuration, tokenizer, plan, report and model card.

    The modelling code comes with it where layers differ; a model of a stock class needs none. Everything goes to a
    sibling folder first and takes its name at the end, so that ``folder`` is whole or absent.

    Args:
        plan, report: written as ``plan.json`` and ``report.json``; the latter also lists all files, and is asked for
            last where it is a function.
        trajectory: a file with the search's steps, copied under its own name.
        card: text of ``README.md``.
        replace: whether an earlier run in ``folder`` may be replaced (after the new one is complete).
        source: the dense model's folder, whose tokenizer and generation settings are taken over as they are.
        extra: further files, contents by name.
        check: called with the folder before it takes its name; what raises an ``OutputError`` there is kept beside
            it, as ``FOLDER.differs``.
        weights: writes the weights into the folder, where transformers shall not.

    Raises:
        OutputError: when the folder is taken, cannot be written, or the disk is full; nothing is left behind.
    """
    target = Path(folder).absolute().resolve()  # what a link names is replaced, not the link
    check_target(target, replace)
    check_space(target, weight_bytes(model))
    with whole_folder(target, keep_others) as partial:
        write_model(partial, model, tokenizer, source, **({} if weights is None else {"state_dict": {}}))
        if weights is not None:
            weights(partial)
        if trajectory is not None:
            shutil.copyfile(trajectory, partial / trajectory.name)
        for name, content in (extra or {}).items():
            (partial / name).write_bytes(content)
        _write_texts(partial, plan, report() if callable(report) else report, card)
        open_to_others(partial)
        if check is not None:
            _checked(partial, target, check)
    return target


def _write_texts(folder: Path, plan: PruningPlan, report: Mapping[str, Any], card: str) -> None:
    """Write plan, card and, last, the report, which lists every file and knows the card that was written."""
    for name, text in {PLAN_FILE: plan.to_json(), CARD: card}.items():
        (folder / name).write_text(text, encoding="utf-8")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    listed = {"files": sorted(names | {REPORT_FILE}), "card_hash": _hash(folder / CARD)}
    record = json.dumps({**report, **listed}, indent=1, default=str) + "\n"
    (folder / REPORT_FILE).write_text(record, encoding="utf-8")


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _checked(partial: Path, target: Path, check: Callable[[Path], None]) -> None:
    """Let what was written be checked; keep it under a name that says so if it is not right."""
    try:
        check(partial)
    except OutputError as error:
        names = (f"{target.name}.differs{more}" for more in ("", *(f"-{number}" for number in range(2, 1000))))
        kept = next(place for place in map(target.with_name, names) if not place.exists())
        partial.rename(kept)
        raise OutputError(f"{error}; it is not {target.name}, but kept as {kept}") from error


def weight_bytes(model: PreTrainedModel) -> int:
    """Return size of a model's weights in bytes, tied tensors counted once."""
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
    if not is_written(target):
        raise OutputError(f"{target} is not a folder that multipruner wrote and will not be replaced; choose another")


def check_space(target: Path, weights: int) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OutputError: naming what is needed and what is free.
    """
    existing = next(parent for parent in target.parents if parent.exists())
    need, free = int(weights * _OVERHEAD), shutil.disk_usage(existing).free
    if need > free:
        raise OutputError(f"{target} needs {need / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free")


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: Any | None, source: Path | None, **options: Any
) -> None:
    """Write weights, configuration, code, generation settings and tokenizer.

    Args:
        folder: that is there already.
        model, tokenizer: what is written (of an image classifier its image processor); no tokenizer is written where
            there is none.
        source: the dense model's folder, see :func:`save`.
        options: for transformers' ``save_pretrained``.
    """
    with _saveable(model):
        model.save_pretrained(folder, max_shard_size=SHARD_SIZE, **options)
    path = folder / "config.json"
    record = with_older_words(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_generation(folder, model, source)
    if tokenizer is not None:
        write = write_tokenizer if task_of(model.config).reads_text else write_processor
        write(folder, tokenizer, source)


@contextmanager
def _saveable(model: Any) -> Iterator[None]:
    """Put generation settings that can be saved in the place of the model's own, which may be none that can."""
    own, model.generation_config = getattr(model, "generation_config", None), GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def keep_others(old: Path, new: Path) -> None:
    """Carry over what somebody else put into the folder, links as links. What a run, its search or its report wrote is
    replaced, or goes: a tokenizer's file or a figure of another model would be taken for this one's."""
    listed = written(old)
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old)
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                (new / name).mkdir(parents=True, exist_ok=True)
        elif not is_ours(name.as_posix(), listed) and not os.path.lexists(new / name):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, new / name, follow_symlinks=False)
    _keep_edited_card(old, new)


def _keep_edited_card(old: Path, new: Path) -> None:
    """Carry over a card that somebody has written on since, under another name."""
    known = (header_of(old / REPORT_FILE) or {}).get("card_hash")
    if known is not None and (old / CARD).is_file() and _hash(old / CARD) != known:
        names = (f"README.old{more}.md" for more in ("", *(f"-{number}" for number in range(2, 1000))))
        shutil.copy2(old / CARD, next(place for place in map(new.joinpath, names) if not place.exists()))


def with_older_words(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration that says its rotary embeddings in the words of transformers 4 as well.

    Most other readers know no others, and take the defaults without a word. transformers 5 read the same out of both,
    but for the bare configuration that they fall back on where code is not to be run: what comes with code stays.
    """
    rope = record.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope or "auto_map" in record:
        return dict(record)
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    older: dict[str, Any] = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    if scaling.get("rope_type", "default") != "default":
        older["rope_scaling"] = scaling
    return {**record, **older}
