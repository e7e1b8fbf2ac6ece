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

from multipruner.core.errors import ConfigError, OutputError
from multipruner.core.plan import PruningPlan
from multipruner.storage.partial import header_of
from multipruner.storage.run_report import check_numbers

REQUIRED = ("config.json", "plan.json", "report.json")
VOCABULARY = "vocabulary.json"
"""What ``multipruner vocabulary`` says of a model that it wrote."""
INDEX = "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json", "*.tiktoken", "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
)  # fmt: skip
"""What tokenizers of transformers are read from."""
PROCESSOR = "preprocessor_config.json"
"""What image processors of transformers are read from."""
_LATER = ("report.html", "report_files/*.png", "report_files/*.csv")
"""What ``multipruner report`` adds to a finished run."""
_KNOWN = (
    *REQUIRED, VOCABULARY, INDEX, *TOKENIZER, PROCESSOR, *_LATER, "README.md", "trajectory.jsonl", "measurements.jsonl",
    "search.jsonl", "front.json", "front.png", "convergence.png", "generation_config.json",
)  # fmt: skip
_OURS = ("*.safetensors", INDEX, "modeling_multipruner_*.py")
_SHARD = re.compile(r"[\w-][\w.-]{0,200}\.safetensors")
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
        OutputError: when it is no run, or an unfinished one, or a file is missing, cut short or damaged.
    """
    path = Path(folder)
    check_name(path)
    missing = [name for name in REQUIRED if not (path / name).is_file()]
    if missing:
        raise OutputError(_no_run(path, missing))
    config, report = read_json(path / "config.json"), read_json(path / "report.json")
    if report.get("format") != "multipruner-report":
        raise OutputError(f"{path}/report.json is not the report of a multipruner run")
    check_numbers(report, path / "report.json")
    weights = _weights(path)
    for name in weights:
        _check_whole(path / name)
    own = {*weights, *_code(path, config)}
    if "whole" in report:  # a model of several modalities brings its processor's files
        own |= set(map(str, report.get("files") or ()))
    names = sorted(_walk(path))
    files = [name for name in names if name in own or is_known(name)]
    outside = [name for name in files if not (path / name).resolve().is_relative_to(path.resolve())]
    if outside:
        raise OutputError(f"{path}/{outside[0]} is a link out of the folder; put the file itself there")
    foreign = tuple(name for name in names if name not in files)
    try:
        plan = PruningPlan.from_json((path / "plan.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ConfigError) as error:
        raise OutputError(f"{path}/plan.json cannot be read ({error}); make the run again") from error
    return RunFolder(path, tuple(files), foreign, plan, report, config)


def check_name(path: Path) -> None:
    """Refuse the name of a folder that no system call takes, or that may not be looked at.

    Raises:
        OutputError: naming it.
    """
    try:
        if "\0" in str(path):
            raise ValueError("it holds a NUL")
        if path.is_dir():
            next(path.iterdir(), None)
    except (OSError, ValueError) as error:  # too long, with NUL, or without permission
        raise OutputError(f"{str(path)[:200]!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def is_known(name: str) -> bool:
    """Tell whether a file of a run has this name, relative to its folder (weights and code apart)."""
    return any(fnmatch(name, known) for known in _KNOWN)


def is_written(folder: Path) -> bool:
    """Tell whether multipruner wrote into a folder: a plan, a report or a record says so itself, not by a name."""
    return any(header_of(folder / name) is not None for name in ("plan.json", "report.json", VOCABULARY))


def written(folder: Path) -> frozenset[str] | None:
    """Return the files that a run wrote into a folder, as its report lists them; ``None`` where it does not."""
    records = (header_of(folder / name) for name in ("report.json", VOCABULARY))
    names = next((record for record in records if record is not None), {}).get("files")
    return frozenset(map(str, names)) if isinstance(names, list) else None


def is_ours(name: str, listed: frozenset[str] | None) -> bool:
    """Tell whether a run, or a report about it, wrote a file of its folder.

    Args:
        name: relative to the folder.
        listed: what :func:`written` gives; without it, names decide.
    """
    if listed is not None:
        return name in listed or any(fnmatch(name, later) for later in _LATER)
    inside = "/" in name
    return is_known(name) or (not inside and name.endswith((".safetensors", ".py", ".index.json")))


def unwritten(folder: Path) -> list[str]:
    """Return files that the run in a folder did not write, by whose names the next one there would be misread."""
    listed = written(folder)
    if listed is None:
        return []
    misread = (name for name in _walk(folder) if is_known(name) or name == "model.safetensors")
    return sorted(name for name in misread if not is_ours(name, listed))


def left_over(names: set[str], files: set[str]) -> list[str]:
    """Return those of ``names`` that some run wrote and that are not among ``files``: stale weights would be loaded."""
    return sorted(name for name in names - files if any(fnmatch(name, ours) for ours in _OURS))


def _no_run(path: Path, missing: list[str]) -> str:
    partial = path.resolve().with_name(path.resolve().name + ".partial")
    if not path.is_dir() and not partial.exists():
        return f"there is no folder {path}; give the folder that a run wrote (--output, by default runs/NAME-RATIO)"
    if partial.exists():
        return f"{path} holds no finished run; give the command that began it again, and it goes on from {partial}"
    return f"{path} is not the folder of a finished multipruner run: it has no {' and no '.join(missing)}"


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a file of a run holds.

    Raises:
        OutputError: when it cannot be read, or holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read ({error}); run the same command again to write it anew") from error
    if not isinstance(record, dict):
        raise OutputError(f"{path} does not hold a JSON object")
    return record


def _walk(path: Path) -> Iterator[str]:
    for entry in path.rglob("*"):
        if not entry.is_dir() or entry.is_symlink():
            yield entry.relative_to(path).as_posix()


def _weights(path: Path) -> set[str]:
    """Return files with weights, as transformers would find them."""
    single = (path / "model.safetensors").exists()
    if single or not (path / INDEX).exists():
        return {"model.safetensors"}
    return check_index(path / INDEX)


def check_index(path: Path) -> set[str]:
    """Return the files that an index of weights names, all of them beside it.

    Raises:
        OutputError: when it cannot be read, or names something elsewhere.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise OutputError(f"{path} names no weights; write the run anew")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise OutputError(
                f"{path} names {str(name)[:100]!r} as a file of weights; only safetensors files beside it are read"
            )
    return set(weight_map.values())


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
    """Return Python files that the checkpoint needs: named by an ``auto_map``, and what those import from beside
    them.
    """
    maps = [config.get("auto_map")]
    if (path / "tokenizer_config.json").exists():
        maps.append(read_json(path / "tokenizer_config.json").get("auto_map"))
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
