"""A model of several modalities with a pruned text tower: its other tensors and files as they are, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING

from multipruner.checkpoint.config import pruned_config
from multipruner.checkpoint.run_folder import TOKENIZER
from multipruner.core.errors import ConfigError, OutputError, UnsupportedModelError
from multipruner.core.families import Family
from multipruner.core.families.towers import Tower
from multipruner.core.plan import PruningPlan
from multipruner.sources.intake.accounting import reason_of
from multipruner.sources.towers import every_key, text_config
from multipruner.storage.memory import free_memory
from multipruner.storage.tensor_bytes import Part, parts_of, write_index, write_parts
from multipruner.storage.tensor_headers import INDEX, json_object, stored_tensors, weight_files

from .dense import shell_of
from .written import check_opens

CURE = "or write the text model alone, with --text-only"
_CARRIED = (*TOKENIZER, "*config.json", "*.jinja", "LICENSE*", "NOTICE*", "SYSTEM_PROMPT.txt")
"""What goes along: files of tokenizer and processor, settings of generation, the licence."""


@dataclass(frozen=True, slots=True)
class Whole:
    """A model of several modalities whose text tower is to be a pruned one.

    Attributes:
        wrapper: its folder.
        tower: its row.
        spec: the family of its tower.
        record: its ``config.json`` with the sizes of the pruned tower.
        shapes: of the pruned tower's tensors, by the names that they have as a model.
    """

    wrapper: Path
    tower: Tower
    spec: Family
    record: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    def nbytes(self, text: Mapping[str, Part]) -> int:
        """Return bytes of all tensors, with these of the tower."""
        names = self.names()
        others = (part.nbytes for path in weight_files(self.wrapper) for name, part in parts_of(path).items()
                  if name not in names)  # fmt: skip
        return sum(others) + sum(part.nbytes for part in text.values())

    def names(self) -> dict[str, str]:
        """Return the tower's tensors in the wrapper's files: name there -> name as a model."""
        return self.tower.names(stored_tensors(self.wrapper), self.spec)


def whole_of(plan: PruningPlan, wrapper: Path, name: str) -> Whole:
    """Return what a plan of a wrapper's text tower makes of the wrapper; ``config.json`` alone is read.

    Args:
        plan: what stays of the tower.
        wrapper: the folder.
        name: what to call it in errors.

    Raises:
        ConfigError: when the plan is of another model.
        UnsupportedModelError: when the stock class has no words for what stays, or something of a picture would enter
            behind another layer than it does; it names the cure.
    """
    tower, config, spec = text_config(wrapper, name)
    pruned = pruned_config(config, plan)
    if plan.stream is not None:
        raise UnsupportedModelError(
            f"{name}: pictures enter its text tower as wide as the dense one, and the plan's is narrower; make a plan "
            f"without --hidden-size, {CURE}"
        )
    if type(pruned) is not type(config) and _alike(plan):
        raise _no_words(name, tower, " (most classes want a number of heads that divides the hidden size)")
    if type(pruned) is not type(config):
        raise UnsupportedModelError(
            f"{name}: what the plan leaves is not alike in all layers, which {tower.class_name} has no words for; make "
            f"a plan with --layout uniform, {CURE}"
        )
    whole: Any = CONFIG_MAPPING[tower.model_type]
    written = json_object(wrapper / "config.json")
    entered = tower.enters(every_key(whole.from_dict(written)))
    if list(plan.layers[:entered]) != list(range(entered)):
        raise UnsupportedModelError(
            f"{name}: something of every picture enters behind each of the first {entered} layers, and the plan leaves "
            f"one of them out; make a plan with another --ratio, {CURE}"
        )
    record = tower.merged(written, spec, every_key(config), every_key(pruned))
    shapes = _shapes(shell_of(pruned, spec, trust=False))
    _check_class(name, tower, spec, whole, record, shapes)
    return Whole(wrapper, tower, spec, record, shapes)


def _alike(plan: PruningPlan) -> bool:
    """Tell whether the layers that stay are, block by block of a kind."""
    kept = [(place.kind, size) for place, size in zip(plan.anatomy, plan.structure, strict=True)
            if place.layer in plan.layers]  # fmt: skip
    return len(set(kept)) == len({kind for kind, _ in kept}) and all(size for _, size in kept)


def _no_words(name: str, tower: Tower, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name}: {tower.class_name} has no words for the sizes that the plan leaves{reason}; make a plan that keeps "
        f"all heads (--kv-group-step with the number of KV groups), {CURE}"
    )


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def _check_class(
    name: str, tower: Tower, spec: Family, config: Any, record: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that the stock class of a configuration has a tower of these very shapes, without memory for it."""
    try:
        with torch.device("meta"):
            found = _shapes(getattr(transformers, tower.class_name)(config.from_dict(record)))
        reason = ""
    except Exception as error:  # of every kind: the class meets sizes that nobody tried
        found, reason = {}, f" ({reason_of(error)})"
    own = {text: found[key] for key, text in tower.names(found, spec).items()}
    if own != shapes:
        raise _no_words(name, tower, reason)


def run_parts(folder: Path, whole: Whole) -> dict[str, Part]:
    """Return the tensors of a finished run, with its repair, where they are those of a plan that was given.

    Raises:
        ConfigError: when the folder holds another model.
        UnknownModelError: when a file is missing or damaged.
    """
    parts = {name: part for path in weight_files(folder) for name, part in parts_of(path).items()}
    wrong = sorted(name for name, part in parts.items() if whole.shapes.get(name) != part.shape)
    if wrong:
        raise ConfigError(
            f"{folder}: {wrong[0]} is not what its plan leaves of the text tower; name the plan's own run"
        )
    return parts


def write_whole(folder: Path, whole: Whole, text: Mapping[str, Part], tick: Callable[[int], object]) -> None:
    """Write a wrapper with another text tower: file by file as it was, every tensor of the tower replaced or gone.

    Args:
        folder: that is there already.
        whole: the wrapper.
        text: the tower's tensors, by the names that they have as a model.
        tick: called with the bytes of every tensor that was written.

    Raises:
        OutputError: when a tensor of the tower has no place in the wrapper's files.
        OSError: when the disk does not take it.
    """
    for path in _carried(whole.wrapper):
        target = folder / path.relative_to(whole.wrapper)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    (folder / "config.json").write_text(json.dumps(whole.record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    names, files = whole.names(), {}
    for path in weight_files(whole.wrapper):
        kept = {name: text.get(names[name]) if name in names else part for name, part in parts_of(path).items()}
        files[path.name] = {name: part for name, part in kept.items() if part is not None}
    lost = set(text) - {names[name] for parts in files.values() for name in parts if name in names}
    if lost:
        raise OutputError(f"{whole.wrapper}: none of its files has a place for {min(lost)}")
    files = {file: parts for file, parts in files.items() if parts}
    for file, parts in files.items():
        write_parts(folder / file, parts, tick)
    if (whole.wrapper / INDEX).exists():
        write_index(folder / INDEX, files)


def _carried(wrapper: Path) -> list[Path]:
    """Return the files of a wrapper that hold no weights and say nothing of the dense tower."""
    found = {path for each in _CARRIED for path in wrapper.glob(each) if path.is_file()}
    return sorted(found - {wrapper / "config.json"})


def check_whole(folder: Path, whole: Whole, text: Mapping[str, Part], *, reopen: bool) -> None:
    """Hold a folder against what should be in it; where memory allows, and it is asked for, the stock class opens it,
    and a few tokens go through.

    Raises:
        OutputError: naming what differs.
    """
    names = whole.names()
    wanted = {key: (part.dtype, part.shape) for key, own in names.items() if (part := text.get(own)) is not None}
    wanted |= {key: (one.dtype, one.shape) for key, one in stored_tensors(whole.wrapper).items() if key not in names}
    there = {key: (one.dtype, one.shape) for key, one in stored_tensors(folder).items()}
    if differ := sorted(set(wanted.items()) ^ set(there.items()), key=str):
        raise OutputError(f"what was written differs from what the plan leaves: {differ[0][0]}")
    if not reopen or 2 * sum(path.stat().st_size for path in weight_files(folder)) > free_memory():
        return

    def opened() -> Any:
        cls: Any = getattr(transformers, whole.tower.class_name)
        again, told = cls.from_pretrained(folder, use_safetensors=True, output_loading_info=True)
        lost = sorted(str(each) for key in ("missing_keys", "mismatched_keys") for each in told.get(key) or ())
        if lost:
            raise ValueError(f"{lost[0]} is not there, or of another shape")
        return again

    check_opens(opened)
