"""How the dense model is loaded: one strict step for folders, Hub ids and what was unpacked from GGUF files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.config.precedence import trusts
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, UnknownModelError
from multipruner.core.errors import UnsupportedModelError as Unsupported
from multipruner.core.families import Family
from multipruner.storage.memory import check_memory, free_memory, memory_shortage

from .intake.accounting import account, build_config, needed_bytes, read_config, reason_of
from .intake.fetch import small_files, weights
from .intake.finite import check_finite
from .intake.spare import spare_names
from .intake.tokenizer import check_rows, load_tokenizer
from .resolve import ResolvedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TRIAL_TOKENS = 8


def load_dense(resolved: ResolvedModel, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, in evaluation mode, on the recipe's device, every tensor accounted for.

    Args:
        resolved: what :func:`resolve` found.
        recipe: its ``dtype``, ``device`` and ``trust_remote_code`` count.

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
    trust = trusts(recipe.trust_remote_code)
    folder = small_files(resolved.path_or_id, resolved.revision)
    spec = read_config(folder, resolved.name, trust)
    how = {"trust_remote_code": trust} if spec.remote_code else {"attn_implementation": _attention_of(spec)}
    config = build_config(resolved.name, folder, **how)
    tokenizer = load_tokenizer(folder, resolved.name, config, trust)
    weights(resolved.path_or_id, resolved.revision, folder)
    stored = account(folder, resolved.name, config, spec)
    check_rows(resolved.name, tokenizer, stored, spec)
    _check_room(resolved.name, needed_bytes(stored.values(), recipe.dtype), device)
    model = _load(folder, resolved.name, spec, {**how, "config": config, "dtype": recipe.dtype}, device)
    check_finite(model)
    _check_computes(resolved.name, model)
    return model.eval(), tokenizer


def _attention_of(spec: Family) -> str:
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


def _load(folder: Path, name: str, spec: Family, how: Mapping[str, Any], device: torch.device) -> PreTrainedModel:
    """Load the weights, and believe nothing that transformers does not say of them."""
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, device_map={"": device}, output_loading_info=True, **how
        )
    except Exception as error:  # of every kind: transformers meets files that nobody checked
        if shortage := memory_shortage(error):
            raise shortage from error
        raise UnknownModelError(f"cannot load {name}: {reason_of(error)}") from error
    model, told = loaded
    _check_told(name, told, spare_names(model.config, spec))
    if type(model).__name__ != spec.class_name:
        raise Unsupported(f"{name} loads as {type(model).__name__}, not as {spec.class_name}")
    return model


def _check_told(name: str, told: Mapping[str, Any], spare: re.Pattern[str]) -> None:
    """Hold transformers' own account of a loading against what was promised."""
    for key, what in (("missing_keys", "lacks weights"), ("unexpected_keys", "has tensors without a place")):
        names = sorted(each for each in told.get(key) or () if not spare.search(str(each)))
        if names:
            raise Unsupported(f"{name} {what}: {', '.join(names[:5])}")
    if told.get("mismatched_keys"):
        raise Unsupported(f"{name} has tensors of other shapes: {sorted(map(str, told['mismatched_keys']))[:3]}")


def _check_computes(name: str, model: PreTrainedModel) -> None:
    """Run a few tokens through the model: what a configuration says wrongly shows here, not after an hour.

    Raises:
        ConfigError: with what the forward pass says.
    """
    import torch

    ids = torch.arange(_TRIAL_TOKENS, device=model.device)[None] % model.config.vocab_size
    try:
        with torch.inference_mode():
            shape = tuple(model(input_ids=ids).logits.shape)
    except Exception as error:  # of every kind: any value of the configuration may be at fault
        if shortage := memory_shortage(error):
            raise shortage from error
        raise ConfigError(f"{name} cannot compute with its config.json: {reason_of(error)}") from error
    if shape != (1, _TRIAL_TOKENS, model.config.vocab_size):
        raise ConfigError(f"{name} gives logits of shape {list(shape)}, not one for each of its tokens")
