"""Before anything is measured: everything but the weights of a smaller model is written, and opened again.

What a configuration, a tokenizer or a machine does not allow is found in seconds instead of after the search. The files
are opened in this process each time, and once per kind of model and versions in a new one that knows nothing of us.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils.hub import HF_MODULES_CACHE

from multipruner.core.errors import ConfigError, MultiprunerError, OutputError
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.identity import digest
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import GONE, Anatomy, Place, Size, Structure
from multipruner.storage.cache import cache_folder

from .carry import SAMPLES, folder_of, ids_of, opens_as
from .classes import family_of, model_class, task_of
from .config import pruned_config
from .save import write_model

_ELSEWHERE = """
import json, sys
sys.modules["multipruner"] = None
import torch, transformers
from transformers import AutoConfig
task = json.load(sys.stdin)
opener, reader = (getattr(transformers, name) for name in task["classes"])
for folder, parameters in task["folders"].items():
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = opener.from_config(config, trust_remote_code=True)
    assert model.num_parameters() == parameters, "another number of parameters"
    tokenizer = reader.from_pretrained(folder, trust_remote_code=task["trust"])
    assert [tokenizer(text)["input_ids"] for text in task["texts"]] == task["ids"], "another tokenizer"
"""
"""What a stock program does with a folder; weights, which are not there, stay on the meta device."""


class Rehearsal:
    """A smaller model of a kind, written without weights and opened again; entered, and left before the search.

    Entering does what this process can, and starts the new process; leaving waits for that.

    Args:
        model, tokenizer: the dense ones, or an image classifier and its image processor.
        path_or_id, revision: where they were loaded from.
        uniform: whether all layers of the result are to be alike.
        along: the axes that sizes name besides those that every size does.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, path_or_id: str, revision: str | None, *, uniform: bool,
        along: Collection[str] = (),
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._uniform, self._along = model, tokenizer, uniform, along
        self._task = task_of(model.config)
        self._source = folder_of(path_or_id, revision)
        self._work = tempfile.TemporaryDirectory(prefix="multipruner-rehearsal-")
        self._process: subprocess.Popen[str] | None = None
        self._known: Path | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether a new process opens the files too; one that did so before for this kind of model is enough."""
        return self._process is not None

    def __enter__(self) -> Rehearsal:
        """Write and open.

        Raises:
            ConfigError: naming what of the model cannot be written or opened.
            OutputError: when the module cache of transformers cannot be written.
        """
        try:
            folders = {}
            anatomy = anatomy_of(self._model.config, self._along)
            for number, structure in enumerate(structures(anatomy, uniform=self._uniform)):
                folder = Path(self._work.name, f"structure-{number}")
                folders[str(folder)] = self._rehearse(folder, structure)
            self._begin_elsewhere(folders)
        except BaseException:
            self._work.cleanup()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Wait for the new process.

        Raises:
            ConfigError: with the last line that it said, if it failed.
        """
        try:
            if self._process is None:
                return
            if kind is not None:
                self._process.kill()
            _, said = self._process.communicate()
            if kind is None and self._process.returncode:
                raise ConfigError(
                    _unopened("a new process cannot open the smaller model", (said.splitlines() or [""])[-1][:400])
                )
            if kind is None and self._known is not None:
                self._known.parent.mkdir(parents=True, exist_ok=True)
                self._known.touch()
        finally:
            self._work.cleanup()

    def _rehearse(self, folder: Path, structure: Structure) -> int:
        """Write a model of a structure without its weights and open it here; its number of parameters."""
        folder.mkdir()
        with self._explained(structure):
            empty, count = self._attempt(self._model, structure, folder)
        if count != empty.num_parameters():
            raise ConfigError(_unopened("the smaller configuration says another size when read again", ""))
        if self._task.reads_text and not opens_as(folder, self._tokenizer) and not self._own_code(folder):
            raise ConfigError(_unopened("the tokenizer is another one when it is read again", str(self._source)))
        return count

    def _attempt(self, model: PreTrainedModel, structure: Structure, folder: Path) -> tuple[PreTrainedModel, int]:
        """Make and write a smaller model without weights, and return it and the number of parameters when opened."""
        empty: Any = empty_model(model, structure, self._along)
        write_model(folder, empty, self._tokenizer, self._source, state_dict={})
        again = type(empty).config_class.from_pretrained(folder)
        with torch.device("meta"):
            return empty, type(empty)(again).num_parameters()

    def _works(self, model: PreTrainedModel, structure: Structure) -> bool:
        try:
            with tempfile.TemporaryDirectory(dir=self._work.name) as folder:
                self._attempt(model, structure, Path(folder))
        except Exception:  # whatever it is
            return False
        return True

    @contextmanager
    def _explained(self, structure: Structure) -> Iterator[None]:
        """Turn whatever goes wrong within into one line that names the key at fault, where one is, and the way out."""
        try:
            yield
        except MultiprunerError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise OutputError(
                    f"cannot write {error.filename}: {error.strerror}; transformers keep modules in "
                    f"{HF_MODULES_CACHE}: make that writable, or name another folder with HF_MODULES_CACHE"
                ) from error
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise ConfigError(_unopened(self._culprit(structure), reason) + self._cure(structure)) from error

    def _culprit(self, structure: Structure) -> str:
        """Return the key of the configuration without which a smaller model can be made, written and opened."""
        config: Any = self._model.config
        record = config.to_dict()
        for key in sorted(set(config.to_diff_dict()) - {"model_type", "transformers_version", "architectures"}):
            try:
                with torch.device("meta"):
                    other = getattr(transformers, self._task.auto_class).from_config(
                        type(config)(**{name: value for name, value in record.items() if name != key})
                    )
            except Exception:  # no model without it
                continue
            if self._works(other, structure):
                said = json.dumps(record[key], default=str)[:120]
                return f"config.json: {key} = {said} does not go with a smaller model"
        return "the configuration of a smaller model cannot be made"

    def _cure(self, structure: Structure) -> str:
        """Return what would work, if something does."""
        anatomy = anatomy_of(self._model.config, self._along)
        if all(structure) and len(set(zip((place.kind for place in anatomy), structure, strict=True))) == len(
            anatomy.kinds
        ):
            return ""
        if all(self._works(self._model, other) for other in structures(anatomy, uniform=True)):
            return "; --layout uniform (equal layers) goes with it"
        return "; take it out of config.json if the model does not need it"

    def _own_code(self, folder: Path) -> bool:
        """Tell whether the tokenizer brings code, which only the process that trusts it may run."""
        path = folder / "tokenizer_config.json"
        return path.is_file() and "auto_map" in json.loads(path.read_text(encoding="utf-8"))

    def _begin_elsewhere(self, folders: dict[str, int]) -> None:
        self._known = cache_folder() / "rehearsals" / self._kind(list(map(Path, folders)))
        if self._known.exists():
            return
        trust = any(self._own_code(Path(folder)) for folder in folders)
        texts = SAMPLES if self._task.reads_text else ()
        task = {"folders": folders, "texts": texts, "ids": ids_of(self._tokenizer, texts), "trust": trust,
                "classes": (self._task.auto_class, self._task.reader)}  # fmt: skip
        modules = {"HF_MODULES_CACHE": str(Path(self._work.name, "modules")), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ELSEWHERE], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, env={**os.environ, **modules}, cwd=self._work.name,
        )  # fmt: skip
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task))
        self._process.stdin.close()
        self._process.stdin = None

    def _kind(self, folders: Sequence[Path]) -> str:
        """Return what a new process can find at fault: code, the keys of the settings, the tokenizer's class; not
        sizes.
        """
        texts = [path.read_text(encoding="utf-8") for folder in folders for path in sorted(folder.glob("*.py"))]
        configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in folders]
        versions = {name: version(name) for name in ("torch", "transformers", "tokenizers", "huggingface_hub")}
        settings, tokenizer = [_sizeless(config) for config in configs], type(self._tokenizer).__name__
        kind = {"code": texts, "configs": settings, "tokenizer": tokenizer, "versions": versions,
                "python": sys.version, "program": _ELSEWHERE}  # fmt: skip
        return digest(kind)[:32]


def _sizeless(value: Any) -> Any:
    """Return a value of a configuration without its numbers: they make no other kind of model."""
    if isinstance(value, dict):
        return {key: _sizeless(inner) for key, inner in value.items() if key != "per_layer_config"}
    if isinstance(value, list):
        return sorted({json.dumps(_sizeless(inner), sort_keys=True) for inner in value})
    return value if value is None or isinstance(value, (str, bool)) else "a number"


Choice = Callable[[int, str], bool]
"""Whether something holds for the block of a layer and kind."""


def structures(anatomy: Anatomy, *, uniform: bool) -> list[Structure]:
    """Return small structures of the kind that a search may find: narrower everywhere in layers that are all alike,
    or layers that differ in widths and blocks.
    """
    kinds = anatomy.kinds

    def of(
        narrow: Callable[[int, str], bool], gone: Callable[[int, str], bool] = lambda layer, kind: False
    ) -> Structure:
        return Structure(
            tuple(
                GONE if gone(place.layer, place.kind) else
                _narrow(place, anatomy)
                if narrow(place.layer, place.kind) else place.dense
                for place in anatomy
            )
        )  # fmt: skip

    if uniform:
        return [of(lambda layer, kind: kind == kinds[-1]), of(lambda layer, kind: True)]
    turns = len(kinds) + 2  # all narrow, all whole, then each kind missing once
    return [
        of(
            lambda layer, kind: layer % turns == 0,
            lambda layer, kind: layer % turns >= 2 and kinds[layer % turns - 2] == kind,
        )
    ]


def _narrow(place: Place, anatomy: Anatomy) -> Size:
    """Return fewer units of the first axis, and of those that a token goes through some of: half, or one less where
    there are few; no fewer than may stay. Of axes that not every size names, half.
    """
    found = []
    for axis, count in zip(place.axes, place.dense, strict=True):
        fewer = count // 2 if count > 16 else count - 1
        same = -(-count // 2) if axis.unsaid else count
        found.append(max(anatomy.least(axis.name), fewer) if not found or axis.active else same)
    return tuple(found)


def empty_model(model: PreTrainedModel, structure: Structure, along: Collection[str] = ()) -> PreTrainedModel:
    """Return a smaller model of some structure without weights, on the meta device, in the dense model's type."""
    anatomy = anatomy_of(model.config, along)
    plan = PruningPlan.from_structure(
        structure, Ranking.identity(anatomy), anatomy, model="", model_type=spec_for(model.config).model_type
    )
    config = pruned_config(model.config, plan, model)
    cls: Any = model_class(spec_for(model.config), model) if family_of(config) else type(model)
    with torch.device("meta"):
        empty = cls(config).to(model.dtype)
    empty.generation_config = getattr(model, "generation_config", None)
    return empty


def _unopened(what: str, reason: str) -> str:
    return f"{what}, so no result could be used; nothing was measured" + (f" ({reason})" if reason else "")
