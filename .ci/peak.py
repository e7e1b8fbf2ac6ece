"""Run a command, say how long it took and how much memory it had at most, and fail above a limit in GiB."""

from __future__ import annotations

import resource
import subprocess
import sys
import time

limit, command = float(sys.argv[1]), sys.argv[2:]
began = time.monotonic()
code = subprocess.run(command, check=False).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
print(f"{time.monotonic() - began:.0f} s, at most {peak:.2f} GiB of memory: {' '.join(command)}", flush=True)
sys.exit(code or peak > limit)
