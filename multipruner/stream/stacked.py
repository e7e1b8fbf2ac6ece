"""A mixture of experts whose weights stay in files: of the checkpoint, and of stacks that were put together once.

Files hold experts one by one, transformers hold those of a layer as stacks of matrices. So that a layer's weights can
be views of a file, its stacks are written to the cache folder, one layer after the other, as transformers make them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from multipruner.checkpoint.save import check_space
from multipruner.core.errors import UnknownModelError
from multipruner.sources.dense import Accounted
from multipruner.sources.intake.accounting import reason_of
from multipruner.sources.intake.derived import digest
from multipruner.storage.cache import cache_folder, is_whole, keep_folder, work_folder
from multipruner.storage.files import output_errors
from multipruner.storage.memory import size_text
from multipruner.storage.tensor_bytes import write_parts

from .deferred import Deferred, Made, Read, Values
from .dense import deferred_model
from .write import part_of

STACKS = 1
"""Raised when what is written changes."""
_LAYER = re.compile(r"\.(\d+)\.")


def stacked_model(found: Accounted, trust: bool, say: Callable[[str], None]) -> PreTrainedModel:
    """Return the dense model with every weight a view of a file; what is no tensor of the checkpoint's files is written
    to the cache before, once.

    Args:
        found: the checkpoint.
        trust: whether code of its own may be run.
        say: told before what takes long.

    Raises:
        UnsupportedModelError, UnknownModelError: as :func:`.deferred_model`.
        OutputError: when the cache cannot be written; nothing half-written is left.
    """
    model = deferred_model(found, trust)
    made = {name: tensor for name, tensor in _tensors(model) if isinstance(tensor.origin, Made)}
    folder = _written(found, made, say)
    views = dict[Any, Tensor]()
    for name, tensor in _tensors(model):
        if (origin := tensor.origin) not in views:  # a tied tensor has one
            view = origin.read() if isinstance(origin, Read) else _view(folder, name)
            views[origin] = nn.Parameter(view, requires_grad=False) if isinstance(tensor, nn.Parameter) else view
    for module in model.modules():
        for own in (cast(dict[str, Any], module._parameters), cast(dict[str, Any], module._buffers)):
            own.update({key: views[tensor.origin] for key, tensor in own.items() if isinstance(tensor, Deferred)})
    return model


def _tensors(model: PreTrainedModel) -> list[tuple[str, Any]]:
    """Return the deferred tensors of a model by their names; a tied one has several."""
    found = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return [(name, tensor) for name, tensor in found if isinstance(tensor, Deferred)]


def _written(found: Accounted, made: dict[str, Any], say: Callable[[str], None]) -> Path:
    """Return the folder of what was put together: a file for every layer."""
    target = cache_folder() / "stacks" / digest(STACKS, found.folder, {one.file for one in found.stored.values()})
    if is_whole(target) or not made:
        return target
    size = sum(tensor.nbytes for tensor in made.values())
    check_space(target, size)
    say(f"putting the experts of {found.name} together on disk ({size_text(size)} in the cache, once)")
    files = defaultdict[str, dict[str, Any]](dict)
    for name, tensor in made.items():
        files[_file_of(name)][name] = tensor
    with output_errors(target), work_folder() as work:
        folder = work / "stacks"
        folder.mkdir()
        for file, tensors in files.items():
            values = Values(tensors.values())
            write_parts(folder / file, {name: part_of(name, each, values) for name, each in tensors.items()}, _quiet)
        keep_folder(folder, target, model=found.name)
    return target


def _quiet(done: int) -> None:
    """Tell nobody."""


def _file_of(name: str) -> str:
    layer = _LAYER.search(name)
    return f"layer-{int(layer[1]):05}.safetensors" if layer else "others.safetensors"


def _view(folder: Path, name: str) -> Tensor:
    try:
        with safe_open(folder / _file_of(name), "pt") as file:
            return file.get_tensor(name)
    except Exception as error:  # of every kind: somebody may clear the cache meanwhile
        raise UnknownModelError(f"cannot read {name} from {folder}: {reason_of(error)}; run it again") from error
