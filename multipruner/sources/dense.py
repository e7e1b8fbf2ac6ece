"""How the dense model is loaded: one strict step for folders, Hub ids and what was unpacked from GGUF files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.config.precedence import trusts
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, UnknownModelError
from multipruner.core.errors import UnsupportedModelError as Unsupported
from multipruner.core.families import Family, anatomy_of
from multipruner.storage.memory import check_memory, free_memory, memory_shortage
from multipruner.storage.tensor_headers import TORCH_NAMES, StoredTensor, stored_tensors

from .intake.accounting import account, build_config, needed_bytes, read_config, reason_of
from .intake.fetch import small_files, weights
from .intake.finite import check_finite
from .intake.processor import load_processor, shape_of
from .intake.spare import spare_names
from .intake.tokenizer import check_rows, load_tokenizer
from .resolve import ResolvedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_TRIAL_TOKENS = 8


def load_dense(
    resolved: ResolvedModel,
    recipe: Recipe,
    *,
    mapped: bool = False,
    pictures: bool = False,
    stack: Stack = lambda found: None,
) -> tuple[PreTrainedModel, Any]:
    """Load model and tokenizer, in evaluation mode, on the recipe's device, every tensor accounted for.

    Args:
        resolved: what :func:`resolve` found.
        recipe: its ``dtype``, ``device`` and ``trust_remote_code`` count.
        mapped: whether memory for all weights is not needed: on a CPU those that have their type on disk are views of
            their file.
        pictures: whether the job at hand can do with an image classifier; then the second is its image processor.
        stack: gives a mixture of experts whose weights are views of files, where that is wanted; asked on a CPU alone.

    Raises:
        UnsupportedModelError: before any weight is loaded, for what cannot be pruned as it is: a family without a row,
            another task, code of the model's own, pruned or quantised weights, a tensor without a place, a place
            without a tensor.
        ConfigError: for an unusable device or configuration, or a model whose own code may not be run.
        NumericsError: naming the first weight that is not finite.
        MemoryShortError: when the weights do not fit.
        UnknownModelError: when files are missing or damaged.
    """
    device = device_of(recipe.device)
    found = accounted(resolved, recipe, pictures=pictures)
    cpu = device.type == "cpu"
    stacked = found.spec.routes(anatomy_of(found.config).kinds)
    if stacked and cpu and (model := stack(found)) is not None:
        return _checked(found, model), found.tokenizer
    views = mapped and cpu and not stacked
    wanted = str(found.config.dtype).removeprefix("torch.") if recipe.dtype == "auto" else recipe.dtype
    copied = [tensor for tensor in found.stored.values() if not (views and TORCH_NAMES.get(tensor.dtype) == wanted)]
    _check_room(found.name, needed_bytes(copied, recipe.dtype), device)
    return _checked(found, _load(found, recipe.dtype, device)), found.tokenizer


def _checked(found: Accounted, model: PreTrainedModel) -> PreTrainedModel:
    check_finite(model)
    _check_computes(found, model)
    return model.eval()


def stored_otherwise(resolved: ResolvedModel, dtype: str) -> list[str]:
    """Return the names of matrices whose type on disk is not the one that they were loaded in, so that they are copies
    in memory and no views of their file.

    Args:
        resolved: what was loaded.
        dtype: by torch's name.
    """
    stored = stored_in(resolved)
    return [key for key, one in stored.items() if len(one.shape) > 1 and TORCH_NAMES.get(one.dtype) != dtype]


def stored_in(resolved: ResolvedModel) -> dict[str, StoredTensor]:
    """Return the tensors in the files of a model that was loaded, by name."""
    return stored_tensors(small_files(resolved.path_or_id, resolved.revision))


@dataclass(frozen=True, slots=True)
class Accounted:
    """A dense checkpoint whose every tensor has its place, and every place its tensor; no weight is loaded.

    Attributes:
        name: what to call it in errors.
        folder: where its files lie.
        spec: its family.
        config: its configuration.
        how: what transformers are told when they open it.
        tokenizer: what lies beside it; of an image classifier its image processor.
        stored: its tensors on disk, by the names that they have in the model's class or in the family's checkpoints.
    """

    name: str
    folder: Path
    spec: Family
    config: Any
    how: Mapping[str, Any]
    tokenizer: Any
    stored: Mapping[str, StoredTensor]


Stack = Callable[[Accounted], "PreTrainedModel | None"]
"""Gives the model of a checkpoint in another way than transformers load it, or ``None``."""


def accounted(
    resolved: ResolvedModel,
    recipe: Recipe,
    before: Callable[[Any, Family], object] = lambda config, spec: None,
    *,
    pictures: bool = False,
) -> Accounted:
    """Check a dense checkpoint as far as that is possible without loading a weight.

    Args:
        resolved, recipe, pictures: as for :func:`load_dense`.
        before: called with configuration and family before weights are fetched from the Hub, to refuse them.

    Raises:
        MultiprunerError: as :func:`load_dense`.
    """
    name, trust = resolved.name, trusts(recipe.trust_remote_code)
    folder = small_files(resolved.path_or_id, resolved.revision)
    spec = read_config(folder, name, trust, pictures=pictures)
    how = {"trust_remote_code": trust} if spec.remote_code else {"attn_implementation": attention_of(spec)}
    config = build_config(name, folder, **how)
    reads = spec.task.reads_text
    tokenizer = load_tokenizer(folder, name, config, trust) if reads else load_processor(folder, name)
    before(config, spec)
    weights(resolved.path_or_id, resolved.revision, folder)
    stored = account(folder, name, config, spec)
    if reads:
        check_rows(name, tokenizer, stored, spec)
    return Accounted(name, folder, spec, config, how, tokenizer, stored)


def attention_of(spec: Family) -> str:
    """Return how a stock class attends: by PyTorch's own function where it can."""
    import transformers

    return "sdpa" if getattr(transformers, spec.class_name)._supports_sdpa else "eager"


def device_of(name: str) -> torch.device:
    """Return the device that a recipe names; ``auto`` is the GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device without numbers, such as meta, has none to give back
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}; give auto, cpu, cuda or cuda:N") from None
    return device


def _check_room(name: str, needed: int, device: torch.device) -> None:
    """Refuse weights that do not fit where they go."""
    import torch

    if device.type == "cuda":
        check_memory(f"the weights of {name}", needed, torch.cuda.mem_get_info(device)[0], f"on {device}")
    else:
        check_memory(f"the weights of {name}", needed, free_memory())


def _load(found: Accounted, dtype: str, device: torch.device) -> PreTrainedModel:
    """Load the weights, and believe nothing that transformers does not say of them."""
    import transformers

    how: dict[str, Any] = {**found.how, "config": found.config, "dtype": dtype}
    try:
        loaded: Any = getattr(transformers, found.spec.task.auto_class).from_pretrained(
            found.folder, use_safetensors=True, device_map={"": device}, output_loading_info=True, **how
        )
    except Exception as error:  # of every kind: transformers meets files that nobody checked
        if shortage := memory_shortage(error):
            raise shortage from error
        raise UnknownModelError(f"cannot load {found.name}: {reason_of(error)}") from error
    return check_told(found.name, found.spec, *loaded)


def check_told(name: str, spec: Family, model: PreTrainedModel, told: Mapping[str, Any]) -> PreTrainedModel:
    """Hold transformers' own account of a loading against what was promised, and return the model.

    Raises:
        UnsupportedModelError: naming weights that are missing, too many or of other shapes, or another class.
    """
    spare = spare_names(model.config, spec)
    for key, what in (("missing_keys", "lacks weights"), ("unexpected_keys", "has tensors without a place")):
        names = sorted(each for each in told.get(key) or () if not spare.search(str(each)))
        if names:
            raise Unsupported(f"{name} {what}: {', '.join(names[:5])}")
    if told.get("mismatched_keys"):
        raise Unsupported(f"{name} has tensors of other shapes: {sorted(map(str, told['mismatched_keys']))[:3]}")
    if type(model).__name__ != spec.class_name:
        raise Unsupported(f"{name} loads as {type(model).__name__}, not as {spec.class_name}")
    return model


def _check_computes(found: Accounted, model: PreTrainedModel) -> None:
    """Run a few tokens, or a blank picture, through the model: what a configuration says wrongly shows here, not after
    an hour.

    Raises:
        ConfigError: with what the forward pass says.
    """
    import torch

    name, task = found.name, found.spec.task
    outputs = getattr(model.config, task.outputs)
    if task.reads_text:
        rows, right = torch.arange(_TRIAL_TOKENS, device=model.device)[None] % outputs, (1, _TRIAL_TOKENS, outputs)
    else:
        shape = shape_of(name, model.config, found.tokenizer)
        rows, right = torch.zeros(1, *shape, device=model.device), (1, outputs)
    try:
        with torch.inference_mode():
            shape = tuple(model(**{task.inputs: rows}).logits.shape)
    except Exception as error:  # of every kind: any value of the configuration may be at fault
        if shortage := memory_shortage(error):
            raise shortage from error
        raise ConfigError(f"{name} cannot compute with its config.json: {reason_of(error)}") from error
    if shape != right or not right[-1]:
        raise ConfigError(f"{name} gives logits of shape {list(shape)}, not one for each of its tokens or classes")
