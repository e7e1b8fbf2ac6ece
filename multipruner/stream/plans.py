"""Where a plan comes from: its file, a folder that holds one, or a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from multipruner.checkpoint.save import PLAN_FILE
from multipruner.core.errors import ConfigError, UnknownModelError
from multipruner.core.plan import PruningPlan
from multipruner.sources.resolve import hub_refusals
from multipruner.storage.files import path_of
from multipruner.storage.hub import HubUnreachable, repo_info


def read_plan(path: Path) -> PruningPlan:
    """Read a plan's file.

    Raises:
        ConfigError: when it cannot be read, or is no plan.
    """
    try:
        return PruningPlan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"cannot read the plan {path}: {reason}") from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def find_plan(name: str) -> PruningPlan:
    """Return the plan that a name stands for: a file, a folder with a ``plan.json``, or ``owner/name[@revision]``, of
    which that file alone is downloaded.

    Raises:
        ConfigError: when there is none, or it cannot be read.
        UnknownModelError: when the Hub does not give it.
    """
    path = path_of(name)
    if path.is_dir():
        if not (path / PLAN_FILE).is_file():
            raise ConfigError(f"{path} holds no {PLAN_FILE}; give the folder of a finished run, or a plan's file")
        return read_plan(path / PLAN_FILE)
    if path.exists():
        return read_plan(path)
    repo, _, revision = name.partition("@")
    if path.is_absolute() or name.startswith(".") or repo.count("/") != 1 or repo.endswith(".json"):
        raise ConfigError(f"there is no {path}; give a plan's file, a folder with one, or a Hub id such as owner/name")
    return read_plan(_downloaded(repo, revision or None))


def _downloaded(repo: str, revision: str | None) -> Path:
    """Fetch a repository's plan, or find it in the Hub's cache where the Hub is out of reach."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    try:
        with hub_refusals(repo, revision, PLAN_FILE):
            info = repo_info(repo, revision=revision)
            if PLAN_FILE not in {sibling.rfilename for sibling in info.siblings or ()}:
                raise UnknownModelError(f"{repo} has no {PLAN_FILE}: it is no model that multipruner pushed")
            return Path(hf_hub_download(repo, PLAN_FILE, revision=revision, etag_timeout=5))
    except HubUnreachable as error:
        cached = try_to_load_from_cache(repo, PLAN_FILE, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        raise UnknownModelError(
            f"cannot reach the Hub for the plan of {repo} ({error}), and it is not cached; nor is there such a folder"
        ) from None
