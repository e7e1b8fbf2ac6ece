"""Checkpoints opened by plain transformers, in a process that cannot import this package."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

_ELSEWHERE = """
import sys
sys.modules["multipruner"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(torch.load(sys.argv[1])).logits, folder + "/logits.pt")
"""


def logits_elsewhere(folders: Sequence[str], ids: Path) -> dict[str, torch.Tensor]:
    """The logits that every folder's model gives for the token ids in a file."""
    command = [sys.executable, "-c", _ELSEWHERE, str(ids), *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {folder: torch.load(f"{folder}/logits.pt") for folder in folders}
