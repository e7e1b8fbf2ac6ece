"""In an environment without multipruner: stock transformers opens a folder or a repository, and computes the same.

    python .ci/check_stock.py SOURCE LOGITS WEIGHTS

LOGITS is a safetensors file with ``ids`` and ``logits`` in 32-bit, WEIGHTS the run's safetensors file. Every weight
has to be equal to the bit. The logits need not be: which kernels a process computes with is no property of the files.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

BOUND = 1e-3
assert importlib.util.find_spec("multipruner") is None, "this environment must not have multipruner"
source, expected, weights = sys.argv[1], load_file(sys.argv[2]), load_file(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
given = model.state_dict()
assert all(torch.equal(given[name], weight) for name, weight in weights.items()), "weights differ"
with torch.no_grad():
    out = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=12, do_sample=False
    )
    logits = model.float()(input_ids=expected["ids"]).logits
difference = float((logits - expected["logits"]).abs().max())
assert difference < BOUND, f"logits are off by {difference}"
print(
    f"{len(weights)} tensors equal to the bit, {logits.numel():,} logits within {difference:.1e}; it writes: "
    f"{tokenizer.decode(out[0])!r}"
)
