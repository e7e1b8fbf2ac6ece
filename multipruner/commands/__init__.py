"""The commands: one module each, with a parser whose help teaches. No torch before a command runs."""

from __future__ import annotations

COMMANDS: dict[str, str] = {
    "prune": "prune a model (what happens when no command is named)",
    "eval": "compare models on perplexity and lm-eval tasks",
    "search": "search structures by evolution (NSGA-II) and make the best of them",
    "latency": "measure the milliseconds of every block option on this machine",
    "report": "write an HTML page about one or several runs",
    "export": "write a pruned model for llama.cpp (GGUF) or ONNX Runtime",
    "apply": "cut a dense checkpoint as a plan says, without loading it",
    "vocabulary": "leave a model the tokens that a language or domain needs",
    "tune": "train a pruned model a little (LoRA) and merge the result",
    "push": "share a pruned model on the Hugging Face Hub",
    "recipes": "list the recipes that --model knows",
}
"""Every command is a module of this package with ``run(arguments) -> exit code``; the text is for
``--help``."""
