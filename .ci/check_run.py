"""After the README's first command: the folder is what was promised, and its logits are kept for the next check."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import multipruner

PERPLEXITY_BOUND = 5.0  # pruned / dense, on held-out text with the default calibration; measured: 3.52

folder = Path(sys.argv[1])
report = json.loads((folder / "report.json").read_text())
steps = [json.loads(line) for line in (folder / "trajectory.jsonl").read_text().splitlines()[1:-1]]
half_a_step = (steps[-1]["ratio"] - steps[-2]["ratio"]) / 2
assert abs(report["ratio"] - 0.2) <= half_a_step + 1e-9, (report["ratio"], half_a_step)
for name, value in report["perplexity"].items():
    dense, pruned = value["dense"], value["pruned"]
    assert math.isfinite(pruned) and pruned / dense < PERPLEXITY_BOUND, (name, value)
    print(f"{name}: {dense:.2f} -> {pruned:.2f}")
model = multipruner.load(folder)
assert sum(p.numel() for p in model.parameters()) == report["parameters"]["after"]
ids = torch.arange(5, 69).reshape(2, 32)
with torch.no_grad():
    logits = model(input_ids=ids).logits.float()
save_file({"ids": ids, "logits": logits.contiguous()}, folder.with_suffix(".logits.safetensors"))
print(f"ratio {report['ratio']:.4f}, {report['parameters']['after']:,} parameters, seconds {report['seconds']}")
