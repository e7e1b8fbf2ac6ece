"""A command of ``python -m multipruner`` in a process of its own, and the memory that it had. Linux only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_CHILD = """
import json, os, sys, threading, time
from pathlib import Path
def status(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)
most, limit = [0], float(sys.argv[2])
def watch():
    while True:
        most[0] = max(most[0], status("RssAnon"))
        if most[0] << 10 > limit:
            print(f"the process has {most[0] / 2**20:.2f} GiB of its own, {limit / 2**30:.2f} are allowed", flush=True)
            os._exit(3)
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
from multipruner.commands.main import main
code = main(sys.argv[3:])
found = {"own": most[0] << 10, "all": status("VmHWM") << 10, "allocated": None, "reserved": None}
cuda = sys.modules["torch"].cuda if "torch" in sys.modules else None
if cuda is not None and cuda.is_available():
    every = range(cuda.device_count())
    found |= {"allocated": max(map(cuda.max_memory_allocated, every)),
              "reserved": max(map(cuda.max_memory_reserved, every))}
Path(sys.argv[1]).write_text(json.dumps(found))
raise SystemExit(code)
"""
"""One command, and the memory that it had."""


def run(arguments: Sequence[str], marks: Path, *, limit: float | None = None) -> dict[str, int | None]:
    """Run a command, without the network, and return the most bytes that it had.

    Args:
        arguments: what stands behind ``python -m multipruner``.
        marks: a file that the process writes them to.
        limit: GiB that the process may have of its own; beyond it ends.

    Returns:
        ``own`` (RssAnon) and ``all`` (VmHWM, pages of mapped files among them) of the host's memory, and ``allocated``
        and ``reserved`` of a GPU's by torch's allocator, ``None`` without one.

    Raises:
        SystemExit: when the command fails; it has said why.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    marks.unlink(missing_ok=True)
    most = str(float("inf") if limit is None else limit * 2**30)
    process = subprocess.run([sys.executable, "-c", _CHILD, str(marks), most, *arguments], env=environment, check=False)
    if process.returncode:
        raise SystemExit(f"multipruner {' '.join(arguments)}: the run ended with {process.returncode}")
    return json.loads(marks.read_text())
