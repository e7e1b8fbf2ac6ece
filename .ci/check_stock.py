"""In an environment without multipruner: stock transformers opens a folder or a repository; its logits are the same.

    python .ci/check_stock.py SOURCE LOGITS

LOGITS is a safetensors file with ``ids`` and ``logits``.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

assert importlib.util.find_spec("multipruner") is None, "this environment must not have multipruner"
source, expected = sys.argv[1], load_file(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
with torch.no_grad():
    logits = model(input_ids=expected["ids"]).logits.float()
    out = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=12, do_sample=False
    )
assert torch.equal(logits, expected["logits"]), (logits - expected["logits"]).abs().max()
print(f"{logits.numel():,} logits equal to the bit; it writes: {tokenizer.decode(out[0])!r}")
