"""``python -m multipruner export FOLDER --format gguf``: write a pruned model for llama.cpp."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .base import Parser

_HELP = """\
Write a pruned model as one GGUF file for llama.cpp and what is built on it (Ollama, LM Studio, ...).
Families: llama, mistral, qwen2. Layers of different sizes are told as llama.cpp's architecture 'deci'.

examples
  python -m multipruner export runs/llama-0.2 --format gguf
  python -m multipruner export runs/llama-0.2 --format gguf --outtype q8_0 --output small.gguf"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="multipruner export", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a finished run")
    parser.add_argument("--format", choices=("gguf",), default="gguf", help="what to write; default gguf")
    parser.add_argument("--outtype", choices=("f32", "f16", "bf16", "q8_0"), default="f16",
                        help="of the matrices; default f16")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default FOLDER-OUTTYPE.gguf, beside the folder")
    parser.add_argument("--base-gguf", type=Path, metavar="FILE",
                        help="copy the tokenizer from a GGUF file of the base model")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = _parser().parse_args(arguments)
    from multipruner.export.gguf import export_gguf
    from multipruner.quiet import quiet_libraries

    quiet_libraries()
    done = export_gguf(
        typed.folder,
        typed.output,
        outtype=typed.outtype,
        base_gguf=typed.base_gguf,
        overwrite=typed.overwrite,
    )
    print(
        f"{done.path}: architecture {done.architecture}, {done.layers} layers, {done.tensors} tensors, "
        f"{typed.outtype}, {done.nbytes / 1e6:,.1f} MB"
    )
    if done.kept_wide:
        print(f"{done.kept_wide} matrices stay f16: {typed.outtype} needs rows that are a multiple of 32")
    if done.window:
        print(
            f"the context length in the file is {done.window}, the sliding window: llama.cpp attends to everything "
            "with this architecture, which is the same only up to there"
        )
    return 0
