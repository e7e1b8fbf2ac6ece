"""Exported models, opened by the programs that serve them and timed side by side."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from transformers import PreTrainedModel

from multipruner.checkpoint.save import save
from multipruner.config.choices import EXPORTS, RUNTIMES, Runtime, loaded, row_of
from multipruner.core.errors import ConfigError, OutputError, UnsupportedModelError
from multipruner.core.latency_table import Workload
from multipruner.core.plan import PruningPlan
from multipruner.latency.environment import device_name

WORKER = Path(__file__).with_name("worker.py")
_ROOM = 64
"""Tokens of context beyond the longest workload: what is decoded, and a little."""


def row_for(name: str, outtype: str | None) -> tuple[Runtime, str]:
    """Return a runtime's row, and the type of the matrices that are exported for it.

    Args:
        name: of the runtime.
        outtype: as asked for; the row's first where nothing was.

    Raises:
        ConfigError: when its packages are not installed, or it is not measured with this type.
    """
    row = row_of(RUNTIMES, name, "runtime")
    missing = [one for one in row.packages if find_spec(one.replace("-", "_")) is None]
    if missing:
        raise ConfigError(f"{name} is measured through {', '.join(row.packages)}; pip install {' '.join(missing)}")
    chosen = outtype or row.outtypes[0]
    if chosen not in row.outtypes:
        raise ConfigError(f"{name} is measured with the types {', '.join(row.outtypes)}, not {chosen}")
    return row, chosen


def environment_in(name: str, outtype: str, threads: int) -> dict[str, Any]:
    """Return machine, software and settings that times of a runtime depend on, as latency tables record them."""
    return {
        "runtime": name,
        "device": "cpu",
        "device_name": device_name(torch.device("cpu")),
        "cpu_count": os.cpu_count(),
        "threads": threads,
        "dtype": outtype,
        **{package: version(package) for package in RUNTIMES[name].packages},
        "platform": platform.platform(terse=True),
    }


def exported(model: PreTrainedModel, plan: PruningPlan, tokenizer: Any, place: Path, name: str, outtype: str) -> Path:
    """Write a model as a runtime opens it.

    Args:
        model: dense or pruned, in memory.
        plan: what it keeps of the dense one.
        tokenizer: its tokenizer, without which servers open nothing.
        place: a new folder, for this model alone.
        name: of the runtime.
        outtype: of the matrices.

    Raises:
        UnsupportedModelError: when the format does not know the model.
        OutputError: when something cannot be written.
    """
    folder = save(place / "folder", model, tokenizer, plan=plan, report={}, card="")
    row = EXPORTS[RUNTIMES[name].export]
    path: Path = loaded(row.by)(folder, place / "exported", outtype=outtype).path
    rmtree(folder)
    return path


class Served:
    """An exported model in a process of its own, to be asked one thing after the other.

    Args:
        line: the command: an interpreter, a script that speaks as :mod:`.worker` does, and the runtime's name.
        path: what was exported.
        settings: for the script.

    Raises:
        UnsupportedModelError: when the runtime does not open it; with the last that it said.
    """

    def __init__(self, line: Sequence[str], path: Path, settings: Mapping[str, int]) -> None:
        self._name = line[-1]
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*line, str(path), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True, encoding="utf-8",
        )  # fmt: skip
        try:
            self._answer(UnsupportedModelError)
        except BaseException:
            self.close()
            raise

    @classmethod
    def opened(cls, name: str, path: Path, settings: Mapping[str, int]) -> Served:
        """Open an export by a runtime of :data:`RUNTIMES`."""
        return cls([sys.executable, str(WORKER), name], path, settings)

    def sample(self, workload: Workload) -> float:
        """Return milliseconds of one pass.

        Raises:
            OutputError: when the runtime fails.
        """
        return float(self._asked({"phase": workload.phase, "batch": workload.batch, "tokens": workload.tokens}))

    def choices(self, ids: Sequence[int], begin: int) -> list[tuple[int, float]]:
        """Return the likeliest token after every beginning of so many tokens and more, and its log-probability.

        Raises:
            OutputError: when the runtime fails.
        """
        found = self._asked({"ids": list(ids), "begin": begin})
        return [(int(token), float(value)) for token, value in found]

    def _asked(self, question: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # what it said at its end is told
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._answer(OutputError)

    def _answer(self, kind: type[Exception]) -> Any:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        code = self._process.wait()
        self._said.seek(0)
        last = " ".join(self._said.read().split())[-300:]
        raise kind(f"{self._name} failed on this model (exit code {code}): {last or 'it said nothing'}")

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def settings_for(
    workloads: Sequence[Workload], vocabulary: int, threads: int, *, exact: bool = False
) -> dict[str, int]:
    """Return what :mod:`.worker` needs to know before it opens a model.

    Args:
        workloads: that it will be asked for.
        vocabulary: token ids are below it.
        threads: of the program.
        exact: whether it computes in 32 bits where the program, left alone, would take fewer on this processor.
    """
    return {
        "exact": int(exact),
        "threads": threads,
        "batch": max(workload.batch for workload in workloads),
        "context": max(workload.tokens for workload in workloads) + _ROOM,
        "vocabulary": vocabulary,
    }
