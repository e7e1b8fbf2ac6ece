"""The files of a model as a folder on this machine: a Hub id's small files first, its weights when these are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from multipruner.core.errors import UnknownModelError
from multipruner.storage.tensor_headers import INDEX, SINGLE, json_object

_SMALL = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.tiktoken")
"""Configuration, tokenizer, chat templates, and code that is read only where it is trusted."""
_NOT = ("*/*.json", "*/*.txt", "*/*.py", "*/*.model")


def small_files(model: str, revision: str | None) -> Path:
    """Return the folder of a model; of a Hub id everything but the weights is fetched into the Hub's cache.

    Args:
        model: a folder, or a Hub id.
        revision: the commit on the Hub.

    Raises:
        UnknownModelError: when the Hub does not give them.
    """
    if (folder := Path(model)).is_dir():
        return folder
    return _snapshot(model, revision, _SMALL, _NOT)


def weights(model: str, revision: str | None, folder: Path) -> None:
    """Fetch the weights of a Hub id into its folder; nothing where the model was a folder already.

    Args:
        model, revision: as for :func:`small_files`.
        folder: that it gave.

    Raises:
        UnknownModelError: when the Hub does not give them, or the index is damaged.
    """
    if Path(model).is_dir():
        return
    table = json_object(folder / INDEX).get("weight_map") if (folder / INDEX).exists() else None
    names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else [SINGLE]
    _snapshot(model, revision, names, ())


def _snapshot(model: str, revision: str | None, patterns: Sequence[str], without: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(without))
        )
    except Exception as error:  # the transport's own classes differ between versions of huggingface_hub
        raise UnknownModelError(f"cannot fetch {model} from the Hub: {' '.join(str(error).split())}") from error
