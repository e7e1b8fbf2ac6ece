"""vLLM itself, in an environment of its own: what it generates from a folder is what transformers do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACE = Path(os.environ.get("MULTIPRUNER_VLLM") or ROOT / "build" / "vllm")


@pytest.mark.slow
@pytest.mark.skipif(not (PLACE / "bin" / "vllm").exists(), reason=f"{PLACE} is not there (.ci/vllm makes it)")
def test_vllm_serves_what_can_be_missing() -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "MULTIPRUNER_VLLM": str(PLACE)}
    done = subprocess.run([ROOT / ".ci" / "vllm"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("224 of 224 greedy tokens equal") == 4, done.stdout
