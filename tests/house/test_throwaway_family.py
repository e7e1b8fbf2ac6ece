"""A family is one row: one that nobody knows, with nothing in common with Llama, passes what all families pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from multipruner.core.families import FAMILIES
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from tests.support import tiny
from tests.support.loom import ROW

ROOT = Path(__file__).parents[2]
FOLDERS = ("engine", "contracts", "checkpoint", "repair")
"""Tests that are parametrised over the families: sliced equals masked, parameters counted equal computed, cached equals
uncached step by step, what is on disk opened by ``multipruner.load`` and by plain transformers, repairs."""


def test_a_family_that_nobody_knows_passes_what_all_families_pass(tmp_path: Path) -> None:
    """In a process of its own, so that the row is in nobody else's table."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.support.loom"]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path),
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }  # fmt: skip
    command += ["-k", "(loom and not bloom) or plain_transformers_load", *(f"tests/{folder}" for folder in FOLDERS)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 45, done.stdout


def test_parts_that_share_a_matrix_are_ordered_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved queries, keys and values, in a transposed matrix: what feeds nothing goes first."""
    monkeypatch.setitem(FAMILIES, "loom", ROW)
    model = tiny.tiny_model("loom")
    layer = model.get_submodule("cloth.stages.0")
    with torch.no_grad():  # 2 KV groups of (3 queries, key, value), 8 wide; 40 channels of gate and up
        fused, wide = layer.get_parameter("mixer.fused.weight"), layer.get_parameter("feed.wide.weight")
        fused[:, 40:80] *= 2
        fused[:, 8:16] *= 0.01
        wide[:, [7, 47]] *= 0.01
    attention, mlp = rank("magnitude", Prunable.of(model), within=["queries"]).blocks[:2]
    groups, inside = attention.axes
    assert groups == (1, 0)
    assert inside[0][-1] == 1  # pyright: ignore[reportIndexIssue]
    assert mlp.axes[0][-1] == 7
