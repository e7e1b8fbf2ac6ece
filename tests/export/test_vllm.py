"""vLLM itself, in an environment of its own: what it generates from a folder is what transformers do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACE = Path(os.environ.get("MULTIPRUNER_VLLM") or ROOT / "build" / "vllm")


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (PLACE / "bin" / "vllm").exists(), reason=f"{PLACE} is not there (.ci/vllm makes it)"),
]


def _said(*kind: str) -> str:
    environment = {**os.environ, "PYTHON": sys.executable, "MULTIPRUNER_VLLM": str(PLACE)}
    done = subprocess.run([ROOT / ".ci" / "vllm", *kind], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_vllm_serves_what_can_be_missing() -> None:
    said = _said()
    assert said.count("224 of 224 greedy tokens equal") == 4, said


def test_vllm_adds_an_adapter() -> None:
    said = _said("adapter")
    assert said.count("96 of 96 greedy tokens equal") == 2, said


def test_vllm_shares_a_model_between_processes() -> None:
    said = _said("parallel")
    assert "tensor parallel: 96 of 96 greedy tokens equal" in said, said
