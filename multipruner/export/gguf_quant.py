"""K-quants of GGUF files: made by llama.cpp's own quantiser, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from gguf import GGUFReader, LlamaFileType

from multipruner.core.errors import ConfigError, OutputError

from .gguf_tensors import TensorJob

BINARY = "llama-quantize"
WITHOUT = (
    f"K-quants are made by llama.cpp's own quantiser, which is not here: put {BINARY} on the PATH (it comes with "
    "llama.cpp), or pip install llama-cpp-python; --outtype q8_0 needs neither"
)
_WHOLE, _PART = 256, 32
"""Numbers of a row that K-quants take together, and the types that they fall back on."""
_CALL = """\
import ctypes, sys, llama_cpp
how = llama_cpp.llama_model_quantize_default_params()
how.ftype, how.nthread = int(sys.argv[3]), int(sys.argv[4])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(how)))
"""


@dataclass(frozen=True, slots=True)
class Share:
    """What one type has of a file.

    Attributes:
        kind: the type's name.
        tensors: how many are of it.
        nbytes: their size.
    """

    kind: str
    tensors: int
    nbytes: int

    def __str__(self) -> str:
        return f"{self.kind} {self.nbytes / 1e6:,.1f} MB ({self.tensors})"


def quantiser() -> list[str]:
    """Return the command that takes an input, an output, llama.cpp's number of a type and a number of threads.

    Raises:
        ConfigError: when there is none.
    """
    binary = shutil.which(BINARY)
    if binary:
        return [binary]
    if find_spec("llama_cpp") is None:
        raise ConfigError(WITHOUT)
    return [sys.executable, "-c", _CALL]


def quantised(exact: Path, target: Path, quant: str) -> list[Share]:
    """Make a K-quant of a GGUF file, and look at what came out.

    Args:
        exact: a file with matrices of 32 bits.
        target: the new one.
        quant: such as ``q4_k_m``.

    Returns:
        What each type has of the new file, the largest share first.

    Raises:
        OutputError: when the quantiser fails, or leaves out a tensor; with the last that it said.
    """
    number = int(LlamaFileType[f"MOSTLY_{quant.upper()}"])
    line = [*quantiser(), str(exact), str(target), str(number), str(os.cpu_count() or 1)]
    done = subprocess.run(line, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode or not target.is_file():
        said = " ".join((done.stderr or done.stdout).split())[-200:]
        raise OutputError(f"llama.cpp's quantiser failed ({quant}, exit code {done.returncode}): {said}")
    before, after = ({t.name: tuple(t.shape) for t in GGUFReader(path).tensors} for path in (exact, target))
    if before != after:
        raise OutputError(f"llama.cpp's quantiser left {len(before)} tensors as {len(after)}, or of other shapes")
    counts, sizes = Counter[str](), Counter[str]()
    for tensor in GGUFReader(target).tensors:
        counts[tensor.tensor_type.name] += 1
        sizes[tensor.tensor_type.name] += int(tensor.n_bytes)
    return [Share(kind, counts[kind], size) for kind, size in sizes.most_common()]


def fallbacks(jobs: Iterable[TensorJob], hidden: int, quant: str) -> list[str]:
    """Return what is to be said of rows that a K-quant does not fit, before anything is written.

    Args:
        jobs: the tensors.
        hidden: the width of the residual stream, which pruning does not change.
        quant: the type.
    """
    rows = Counter(job.shape[-1] for job in jobs if len(job.shape) > 1 and job.sources)
    wrong = {width: number for width, number in sorted(rows.items()) if width % _WHOLE}
    if not wrong:
        return []
    named = ", ".join(f"{width} ({number}{', f16' if width % _PART else ''})" for width, number in wrong.items())
    said = [
        f"{quant} wants rows of a multiple of {_WHOLE}; {sum(wrong.values())} of {sum(rows.values())} matrices have "
        f"others, and take a larger type (of blocks of {_PART}, or f16 where that does not divide them either): {named}"
    ]
    if set(wrong) - {hidden}:
        said.append(f"pruned with --align {_WHOLE}, the widths that pruning chooses fit")
    return said
