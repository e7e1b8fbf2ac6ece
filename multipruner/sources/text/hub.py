"""Data sets of the Hub, through ``datasets``."""

from __future__ import annotations

import re
from itertools import islice
from typing import Any

from multipruner.core.errors import CalibrationError
from multipruner.storage.hub import HubUnreachable, offline, repo_info

from .files import Table

_OTHER = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([^:]*))?(?::([^:]*))?(?::([^:]*))?")


def hub_request(source: str) -> tuple[dict[str, Any], str | None] | None:
    """Return what ``datasets`` is asked for, and the column that is named; ``None`` for what is no data set's name.

    ``owner/name[:config][:split][:column]``, where empty parts are the defaults: ``me/notes::train:body``.
    """
    if (parts := _OTHER.fullmatch(source)) is None:
        return None
    repo, config, split, column = parts.groups()
    named = {"name": config} if config else {}
    return {"path": repo, **named, "split": split or "train", "streaming": True}, column or None


def load(arguments: dict[str, Any], column: str | None, limit: int) -> Table:
    """Return the columns of a data set (or the one that is named), of the first ``limit`` rows where it is streamed.

    Without the Hub, what ``datasets`` has cached of it.

    Raises:
        CalibrationError: when there is no such data set, configuration or split, or it is damaged.
        HubUnreachable: when the Hub cannot be asked and the data set is not cached.
    """
    import datasets
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    repo = arguments["path"]
    try:
        repo_info(repo, "dataset")
        return _columns(datasets.load_dataset(**arguments), column, limit)
    except HubUnreachable as error:
        try:
            with offline():
                rows = datasets.load_dataset(**{**arguments, "streaming": False})
                some = rows.select(range(min(limit, len(rows)))) if arguments.get("streaming") else rows
                return _columns(some, column, limit)
        except Exception:  # whatever datasets meets without a network: it is not cached
            raise error from None
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise CalibrationError(
            f"there is no data set {repo} on the Hub that may be read, and no such local file: {_line(error)}"
        ) from error
    except Exception as error:  # datasets, its builders and the transport share no base class
        raise CalibrationError(f"cannot load {repo} from the Hub: {_line(error)}") from error


def _line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def _columns(rows: Any, column: str | None, limit: int) -> Table:
    import datasets

    if isinstance(rows, datasets.IterableDataset):
        found = list(islice(rows, limit))
        return {name: [row.get(name) for row in found] for name in dict.fromkeys(key for row in found for key in row)}
    return {name: list(rows[name]) for name in rows.column_names if name == column or column not in rows.column_names}
