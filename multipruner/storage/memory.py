"""How much memory there is, and what to say when it does not suffice."""

from __future__ import annotations

import re
from pathlib import Path

import psutil

from multipruner.core.errors import MemoryShortError

_CONTROL_GROUP = Path("/sys/fs/cgroup")
_GROUPS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Limit and use of a container's memory, by the second and the first version of Linux control groups."""
_ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|[KMG]iB)?", re.IGNORECASE)
_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|unable to allocate", re.IGNORECASE)


def free_memory() -> int:
    """Return bytes that this process can still allocate: what the machine has, swap included, or the container's
    rest.
    """
    machine = psutil.virtual_memory().available + psutil.swap_memory().free
    rests = [machine]
    for limit, use in _GROUPS:
        try:
            rests.append(int((_CONTROL_GROUP / limit).read_text()) - int((_CONTROL_GROUP / use).read_text()))
        except (OSError, ValueError):  # no control group, or "max"
            continue
    return max(min(rests), 0)


def peak_memory(device: str = "cpu") -> int:
    """Return the most bytes that this process has had at once so far; of the fullest GPU's memory, on one.

    Args:
        device: its type, as torch names it.
    """
    if device != "cpu":
        import torch

        gpus = range(torch.cuda.device_count()) if device == "cuda" else ()
        return max((torch.cuda.max_memory_allocated(number) for number in gpus), default=0)
    if (most := getattr(psutil.Process().memory_info(), "peak_wset", None)) is not None:  # Windows
        return int(most)
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check_memory(what: str, needed: int, free: int, where: str = "in memory") -> None:
    """Refuse what cannot fit, before it is tried.

    Args:
        what: that needs the memory.
        needed: bytes.
        free: bytes that are there.
        where: whose memory it is.

    Raises:
        MemoryShortError: naming both amounts.
    """
    if needed > free:
        raise MemoryShortError(
            f"{what} need {size_text(needed)} {where}, {size_text(free)} are free; take a smaller model, a narrower "
            "--dtype, or a machine with more memory"
        )


def size_text(size: int) -> str:
    """Return an amount of bytes for people: ``3.2 GiB``."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def memory_shortage(error: BaseException, cure: str = "") -> MemoryShortError | None:
    """Return what an allocation that failed has to say in one line, or ``None`` where the error is of another kind.

    Torch raises ``RuntimeError`` on a processor and ``OutOfMemoryError`` on a GPU, numpy and Python ``MemoryError``.

    Args:
        error: what was raised.
        cure: what needs less memory.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        return None
    asked = _ASKED.search(text)
    if asked is None:
        amount = "memory"
    elif asked[2] is None or asked[2].lower() == "bytes":
        amount = f"{size_text(int(float(asked[1])))} more"
    else:
        amount = f"{asked[1]} {asked[2]} more"
    gpu = re.search(r"of which ([\d.]+ [KMG]iB) is free", text)
    there = f"the GPU has {gpu[1]}" if gpu else f"{size_text(free_memory())} are free"
    cures = [*([cure] if cure else []), "take a machine with more memory"]
    return MemoryShortError(f"out of memory: {amount} was needed, {there}; {', or '.join(cures)}")
