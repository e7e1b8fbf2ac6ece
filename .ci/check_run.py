"""After the README's first command: the folder is what was promised."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from safetensors.torch import load_file

import multipruner

PERPLEXITY_BOUND = 2.0  # pruned / dense, on held-out text that the model wrote itself

folder = Path(sys.argv[1])
report = json.loads((folder / "report.json").read_text())
assert 0.2 <= report["ratio"] < 0.202, report["ratio"]
rounds = report["search"]["rounds"]
assert all(math.isfinite(r["loss"]) and r["loss"] >= 0 for r in rounds) and rounds[0]["gap"] < 1e-6
assert len((folder / "measurements.jsonl").read_text().splitlines()) > sum(r["measured"] for r in rounds) / 2
for name, value in report["perplexity"].items():
    dense, pruned = value["dense"], value["pruned"]
    assert math.isfinite(pruned) and pruned / dense < PERPLEXITY_BOUND, (name, value)
    print(f"{name}: {dense:.2f} -> {pruned:.2f}")
precision = report["precision"]
weights = load_file(folder / "model.safetensors")
assert {str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()} == {precision["stored"]}, precision
model = multipruner.load(folder)
assert sum(p.numel() for p in model.parameters()) == report["parameters"]["after"]
print(
    f"ratio {report['ratio']:.4f}, {report['parameters']['after']:,} parameters, computed in {precision['computed']}, "
    f"seconds {report['seconds']}"
)
