"""Evaluations of dense models on disk, so that ten pruned ones are set beside one run of theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multipruner.core.identity import digest
from multipruner.storage.cache import cache_folder
from multipruner.storage.files import whole_file, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "evaluations"
_FORMAT = 1
"""Raised when the same question gets another answer from this package."""
_PACKAGES = ("torch", "transformers", "lm-eval", "datasets", "tokenizers")


@dataclass(frozen=True)
class Kept:
    """What one model scored before.

    Attributes:
        model: all that its scores depend on beside the question: its fingerprint, the type it computes in, the device;
            ``None`` keeps nothing and finds nothing.
        found: names of what was taken from disk instead of measured.
    """

    model: Mapping[str, Any] | None = None
    found: list[str] = field(default_factory=list)

    def result(self, name: str, question: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the answer to a question, measured now where it is not on disk.

        Args:
            name: of the task or measure.
            question: all else that decides, as JSON.
            measure: gives the answer, as JSON.
        """
        if self.model is None:
            return measure()
        path = self._path(name, question, ".json")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            answer = dict(record["answer"])
        except (OSError, ValueError, KeyError, TypeError):
            answer = measure()
            write_atomically(path, json.dumps({"name": name, "question": question, "answer": answer}, default=str))
            return answer
        self.found.append(name)
        return answer

    def tensors(
        self, name: str, question: Mapping[str, Any], measure: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return tensors by name, as :meth:`result` does values."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file

        if self.model is None:
            return measure()
        path = self._path(name, question, ".safetensors")
        try:
            answer = load_file(path)
        except (OSError, SafetensorError):
            answer = measure()
            with whole_file(path) as aside:
                save_file({key: tensor.contiguous() for key, tensor in answer.items()}, aside)
            return answer
        self.found.append(name)
        return answer

    def _path(self, name: str, question: Mapping[str, Any], ending: str) -> Path:
        versions = {package: version(package) for package in _PACKAGES}
        key = digest([_FORMAT, name, question, self.model, versions], default=str)
        return cache_folder() / FOLDER / f"{key[:32]}{ending}"


def folder_digest(folder: str | Path | None) -> str | None:
    """Return what tells two folders of task files apart: names and contents of their YAML and Python files."""
    if folder is None:
        return None
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".yaml", ".yml", ".py"))
    return digest([(path.relative_to(folder).as_posix(), path.read_text(errors="replace")) for path in files])
