"""How the dense model is loaded and checked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, NumericsError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import spec_for

from .resolve import ResolvedModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAN_FILE = "plan.json"


def load_dense(resolved: ResolvedModel, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load model and tokenizer, in evaluation mode, on the recipe's device, every weight checked.

    Args:
        resolved: what :func:`resolve` found.
        recipe: its ``dtype``, ``device`` and ``trust_remote_code`` count.

    Raises:
        UnsupportedModelError: before any weight is read, for a family without a row, and for a checkpoint that is
            pruned or quantised already; after, when weights are missing.
        ConfigError: for an unusable device, or a model whose own code may not be run.
        NumericsError: naming the first weight that is not finite.
        UnknownModelError: when files are missing or damaged.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = device_of(recipe.device)
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": resolved.path_or_id,
        "revision": resolved.revision,
        "trust_remote_code": recipe.trust_remote_code,
    }
    try:
        _check_config(resolved, recipe)
        tokenizer = AutoTokenizer.from_pretrained(**where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **where, dtype=recipe.dtype, use_safetensors=True, device_map={"": device}, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        raise UnknownModelError(f"cannot load {resolved.name}: {' '.join(str(error).split())}") from error
    model, loading = loaded
    if loading["missing_keys"]:
        raise UnsupportedModelError(f"{resolved.name} lacks weights: {', '.join(sorted(loading['missing_keys'])[:5])}")
    check_finite(model)
    return model.eval(), tokenizer


def device_of(name: str) -> torch.device:
    """The device that a recipe names; ``auto`` is the GPU where there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}; give auto, cpu, cuda or cuda:N") from None
    return device


def _check_config(resolved: ResolvedModel, recipe: Recipe) -> None:
    """Refuse by the raw configuration alone: neither weights nor the model's own code are touched."""
    from transformers import PreTrainedConfig

    where, revision = resolved.path_or_id, resolved.revision
    config: dict[str, Any] = PreTrainedConfig.get_config_dict(where, revision=revision)[0]
    model_type = str(config.get("model_type"))
    pruned = "per_layer_config" in config or model_type.startswith("multipruner")
    if pruned or (Path(where) / PLAN_FILE).exists():
        raise UnsupportedModelError(f"{resolved.name} is pruned already; start from the dense model, at a higher ratio")
    spec = spec_for(SimpleNamespace(model_type=model_type))
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UnsupportedModelError(f"{resolved.name} is quantised ({method}); start from the unquantised model")
    if spec.remote_code and not recipe.trust_remote_code:
        raise ConfigError(
            f"{resolved.name} brings code of its own, which loading it runs; read it, then pass --trust-remote-code"
        )


def check_finite(model: torch.nn.Module) -> None:
    """Refuse weights with NaN or infinity.

    Raises:
        NumericsError: naming the first one.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise NumericsError(f"{name} holds NaN or infinity; the checkpoint is damaged")
