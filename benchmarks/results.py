"""Results of benchmarks as JSON: the numbers with commit, machine, versions and command, and their Markdown tables.

A benchmark adds :func:`flag` to its parser and calls :func:`record` at the end. What lies in ``benchmarks/results/`` is
shown by the documentation (``<!-- results: NAME -->`` in a page; ``docs/generated.py`` makes the table).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results"
FORMAT, VERSION = "multipruner-benchmark", 1
UNKNOWN = "not recorded"
"""Stands for a fact that nobody wrote down at the time."""
PACKAGES = ("multipruner", "torch", "transformers", "numpy", "scipy")
SETS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
"""Instruction sets that products of matrices depend on, as Linux calls them."""
Cell = str | float | None | list[float]


def flag(parser: argparse.ArgumentParser) -> None:
    """The flag that asks for a file."""
    parser.add_argument("--record", type=Path, default=None, metavar="FILE",
                        help="write the numbers with commit, machine, versions and command as JSON")  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, its instruction sets for products of matrices, and threads; the GPU where there is one."""
    import torch

    facts: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    there = set((facts.get("flags") or facts.get("Features", "")).split())
    found: dict[str, Any] = {
        "processor": facts.get("model name") or platform.processor() or platform.machine(),
        "isa": [name for name in SETS if name in there] or UNKNOWN,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def versions() -> dict[str, str]:
    """Of Python and what numbers and times depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = UNKNOWN
    return found


def commit() -> str:
    """Of the checkout, with ``+`` where tracked files differ from it; unknown outside of one."""
    git = ("git", "-C", str(ROOT))
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN
    return head + ("+" if changed.stdout.strip() else "")


def record(
    path: Path | None, name: str, columns: Sequence[Sequence[str]], rows: Sequence[Sequence[Cell]], **more: Any
) -> None:
    """Write a result; nothing where no file was asked for.

    Args:
        path: of the file.
        name: of the benchmark.
        columns: (heading, format) of every column, a format of :meth:`str.format`, such as ``{:.2f} ± {:.2f}``.
        rows: cells: a number, or several where the format takes several; text as it is; ``None`` for nothing.
        more: further facts, such as the setting.
    """
    if path is None:
        return
    found = {
        "format": FORMAT, "version": VERSION, "name": name,
        "command": shlex.join(["python", *sys.argv]), "commit": commit(), "machine": machine(), "versions": versions(),
        **more, "columns": [list(column) for column in columns], "rows": [list(row) for row in rows],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.aside-{os.getpid()}")
    aside.write_text(text_of(found), encoding="utf-8")
    aside.replace(path)


def text_of(result: Mapping[str, Any]) -> str:
    """A result as JSON that people can read: a line for every column, row and cell."""
    lines = []
    for key, value in result.items():
        if key in ("columns", "rows", "cells"):
            inner = ",\n".join(f"  {json.dumps(one, ensure_ascii=False)}" for one in value)
            lines.append(f" {json.dumps(key)}: [\n{inner}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: Path) -> dict[str, Any]:
    """A result.

    Raises:
        ValueError: when the file is no result, or of a later version.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path} is no result of a benchmark of version {VERSION}; --record writes one")
    return found


def markdown(columns: Sequence[Sequence[str]], rows: Sequence[Sequence[Cell]]) -> str:
    """The table of a result."""
    lines = [_line([heading for heading, _ in columns]), _line(["---"] * len(columns))]
    return "\n".join([*lines, *(line(columns, row) for row in rows)])


def line(columns: Sequence[Sequence[str]], row: Sequence[Cell]) -> str:
    """One row of the table."""
    return _line([shown(cell, form) for cell, (_, form) in zip(row, columns, strict=True)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def shown(cell: Cell, form: str) -> str:
    """One cell as text."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    return form.format(*cell) if isinstance(cell, list) else form.format(cell)
