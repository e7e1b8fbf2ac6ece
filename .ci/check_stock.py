"""In an environment without multipruner: stock transformers loads the folder and computes the same logits."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

assert importlib.util.find_spec("multipruner") is None, "this environment must not have multipruner"
folder = Path(sys.argv[1])
expected = load_file(folder.with_suffix(".logits.safetensors"))
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(input_ids=expected["ids"]).logits.float()
    out = model.generate(
        **tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=12, do_sample=False
    )
assert torch.equal(logits, expected["logits"]), (logits - expected["logits"]).abs().max()
print("logits equal to the bit; it writes:", tokenizer.decode(out[0]))
