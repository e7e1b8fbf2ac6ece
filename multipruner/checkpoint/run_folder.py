"""Which files of a folder belong to a finished run. Reads no tensor and runs no code."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from multipruner.core.errors import OutputError
from multipruner.core.plan import PruningPlan

REQUIRED = ("config.json", "plan.json", "report.json")
INDEX = "model.safetensors.index.json"
_KNOWN = (
    *REQUIRED, INDEX, "README.md", "trajectory.jsonl", "measurements.jsonl", "search.jsonl", "front.json", "front.png",
    "convergence.png", "generation_config.json",
    # what tokenizers of transformers write
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "additional_chat_templates/*.jinja",
    # what reports are made of
    "report.html", "report_files/*.png", "report_files/*.csv",
)  # fmt: skip
_OURS = ("*.safetensors", INDEX, "modeling_multipruner_*.py")
_IMPORT = re.compile(r"^\s*(?:from\s+\.(\w+)\s+import|from\s+\.\s+import\s+(\w+))", re.MULTILINE)


@dataclass(frozen=True)
class RunFolder:
    """A finished run on disk.

    Attributes:
        path: the folder.
        files: what belongs to the run, relative and sorted, with ``/`` between folders.
        foreign: what else is there.
        plan, report, config: what ``plan.json``, ``report.json`` and ``config.json`` hold.
    """

    path: Path
    files: tuple[str, ...]
    foreign: tuple[str, ...]
    plan: PruningPlan
    report: dict[str, Any]
    config: dict[str, Any]


def read_run(folder: str | Path) -> RunFolder:
    """Look at a folder and make sure that it holds a whole run.

    Raises:
        OutputError: when it is no run, or an unfinished one, or a file is missing or cut short.
        ConfigError: when ``plan.json`` is no plan.
    """
    path = Path(folder)
    missing = [name for name in REQUIRED if not (path / name).is_file()]
    if missing:
        raise OutputError(_no_run(path, missing))
    config, report = _json(path / "config.json"), _json(path / "report.json")
    if report.get("format") != "multipruner-report":
        raise OutputError(f"{path}/report.json is not the report of a multipruner run")
    weights = _weights(path)
    for name in weights:
        _check_whole(path / name)
    own = {*weights, *_code(path, config)}
    names = sorted(_walk(path))
    files = [name for name in names if name in own or is_known(name)]
    outside = [name for name in files if not (path / name).resolve().is_relative_to(path.resolve())]
    if outside:
        raise OutputError(f"{path}/{outside[0]} is a link out of the folder; put the file itself there")
    foreign = tuple(name for name in names if name not in files)
    plan = PruningPlan.from_json((path / "plan.json").read_text(encoding="utf-8"))
    return RunFolder(path, tuple(files), foreign, plan, report, config)


def is_known(name: str) -> bool:
    """Whether a file of a run has this name, relative to its folder (weights and code apart)."""
    return any(fnmatch(name, known) for known in _KNOWN)


def left_over(names: set[str], files: set[str]) -> list[str]:
    """Those of ``names`` that some run wrote and that are not among ``files``: stale weights would be loaded."""
    return sorted(name for name in names - files if any(fnmatch(name, ours) for ours in _OURS))


def _no_run(path: Path, missing: list[str]) -> str:
    partial = path.resolve().with_name(path.resolve().name + ".partial")
    if not path.is_dir() and not partial.exists():
        return f"there is no folder {path}; give the folder that a run wrote (--output, by default runs/NAME-RATIO)"
    if partial.exists():
        return f"{path} holds no finished run; give the command that began it again, and it goes on from {partial}"
    return f"{path} is not the folder of a finished multipruner run: it has no {' and no '.join(missing)}"


def _json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{path} cannot be read ({error}); run the same command again to write it anew") from error
    if not isinstance(record, dict):
        raise OutputError(f"{path} does not hold a JSON object")
    return record


def _walk(path: Path) -> Iterator[str]:
    for entry in path.rglob("*"):
        if not entry.is_dir() or entry.is_symlink():
            yield entry.relative_to(path).as_posix()


def _weights(path: Path) -> set[str]:
    """Files with weights, as transformers would find them."""
    single = (path / "model.safetensors").exists()
    if single or not (path / INDEX).exists():
        return {"model.safetensors"}
    return {str(name) for name in _json(path / INDEX).get("weight_map", {}).values()}


def _check_whole(path: Path) -> None:
    """Compare a safetensors file's size with what its header announces."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is cut short")
            tensors = json.loads(stream.read(length))
        end = max((row["data_offsets"][1] for name, row in tensors.items() if name != "__metadata__"), default=0)
        if 8 + length + end != path.stat().st_size:
            raise ValueError("the tensors are cut short")
    except FileNotFoundError:
        raise OutputError(f"{path.parent} has no {path.name}: the weights are not all there") from None
    except (OSError, ValueError, KeyError, struct.error, AttributeError) as error:
        raise OutputError(f"{path} is no whole safetensors file ({error}); write the run anew") from error


def _code(path: Path, config: dict[str, Any]) -> set[str]:
    """Python files that the checkpoint needs: named by an ``auto_map``, and what those import from beside them."""
    maps = [config.get("auto_map")]
    if (path / "tokenizer_config.json").exists():
        maps.append(_json(path / "tokenizer_config.json").get("auto_map"))
    values = [value for each in maps if isinstance(each, dict) for value in each.values()]
    flat = [name for value in values for name in (value if isinstance(value, list) else [value])]
    waiting = [str(name).rpartition("--")[2].partition(".")[0] for name in flat if name]
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        source = path / f"{name}.py"
        if source.name in found or not source.is_file():
            continue
        found.add(source.name)
        waiting += [first or second for first, second in _IMPORT.findall(source.read_text(encoding="utf-8"))]
    return found
