"""The Hugging Face Hub: whether it answers, asked once, briefly and without retries."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

TIMEOUT = 3.0
"""Seconds that the Hub has to answer the first question; the Hub library's own retries take 23 s to give up."""


class HubUnreachable(Exception):
    """The Hub cannot be asked; the text says why."""


def repo_info(
    repo: str, repo_type: Literal["model", "dataset"] = "model", revision: str | None = None, *, sizes: bool = False
) -> Any:
    """Return what the Hub says about a repository: one request with a short timeout.

    Args:
        repo: its id, ``owner/name``.
        repo_type: what it holds.
        revision: branch, tag or commit.
        sizes: whether to ask for those of its files.

    Returns:
        huggingface_hub's ``ModelInfo`` or ``DatasetInfo``.

    Raises:
        HubUnreachable: when offline mode is set, or the Hub does not answer.
        RepositoryNotFoundError, RevisionNotFoundError, HFValidationError: when the Hub says no.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise HubUnreachable("HF_HUB_OFFLINE is set")
    more: dict[str, Any] = {"files_metadata": True} if sizes else {}
    try:
        return HfApi().repo_info(repo, repo_type=repo_type, revision=revision, timeout=TIMEOUT, **more)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        raise
    except Exception as error:  # the transport's own classes differ between versions of huggingface_hub
        raise HubUnreachable(" ".join(str(error).split()) or type(error).__name__) from error


@cache
def hub_answers() -> bool:
    """Tell whether the Hub is allowed (``HF_HUB_OFFLINE``) and answers at all; asked once per process.

    Once, so that the dense and the pruned model of a run are judged on the same text.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=TIMEOUT)
    except Exception:  # the transport's own classes differ between versions of huggingface_hub
        return False
    return True


@contextmanager
def offline_unless_hub_answers() -> Iterator[None]:
    """Let an unreachable Hub fail at once and use caches, as with ``HF_HUB_OFFLINE=1``."""
    import datasets  # noqa: F401  (imported within, it would take the flag for good)

    with nullcontext() if hub_answers() else offline():
        yield


@contextmanager
def offline() -> Iterator[None]:
    """Let the Hub's libraries use what they have cached, without asking the network."""
    from huggingface_hub import constants

    holders: list[Any] = [constants]
    if "datasets" in sys.modules:
        holders.append(sys.modules["datasets"].config)
    before = [holder.HF_HUB_OFFLINE for holder in holders]
    try:
        for holder in holders:
            holder.HF_HUB_OFFLINE = True
        yield
    finally:
        for holder, value in zip(holders, before, strict=True):
            holder.HF_HUB_OFFLINE = value


def cached_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """Return the folder of a model that the Hub's cache holds whole (configuration and every safetensors shard)."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    index = folder / "model.safetensors.index.json"
    shards = {"model.safetensors"}
    if index.exists():
        shards = set(json.loads(index.read_text())["weight_map"].values())
    return folder if all((folder / shard).exists() for shard in shards) else None
