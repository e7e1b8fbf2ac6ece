"""``python -m multipruner export FOLDER --format gguf``: write a pruned model for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from multipruner.config.choices import EXPORTS, loaded
from multipruner.core.errors import ConfigError

from .base import Parser, log_flags, on_screen

_HELP = """\
Write a pruned model as one file for other programs.

gguf (default)  for llama.cpp and what is built on it (Ollama, LM Studio, ...). Families: llama, mistral, qwen2, qwen3.
                Layers of different sizes are told as llama.cpp's 'deci', those of qwen3 (with tied embeddings only)
                as 'openelm'.
onnx            for ONNX Runtime and its kin: input_ids, attention_mask -> logits, any batch and length, without a
                cache, so rather for scoring than for writing text. All families.
                Needs the extra: pip install 'multipruner[onnx]'

examples
  python -m multipruner export runs/llama-0.2 --format gguf
  python -m multipruner export runs/llama-0.2 --format gguf --outtype q8_0 --output small.gguf
  python -m multipruner export runs/llama-0.2 --format onnx"""


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(prog="multipruner export", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a finished run")
    parser.add_argument("--format", choices=tuple(EXPORTS), default="gguf", help="what to write; default gguf")
    parser.add_argument("--outtype", choices=("f32", "f16", "bf16", "q8_0"),
                        help="of the matrices; default f16 for gguf, f32 for onnx (which has f32 and f16)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default FOLDER-OUTTYPE.FORMAT, beside the folder")
    parser.add_argument("--base-gguf", type=Path, metavar="FILE",
                        help="gguf: copy the tokenizer from a GGUF file of the base model")  # fmt: skip
    parser.add_argument("--trust-remote-code", dest="trust_remote_code", action="store_true",
                        help="onnx: run the model's own code")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    log_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = make_parser().parse_args(arguments)
    row = EXPORTS[typed.format]
    outtype = typed.outtype or row.outtype
    if typed.format == "onnx" and typed.base_gguf:
        raise ConfigError("--base-gguf goes with --format gguf: an ONNX file holds no tokenizer")
    options = {name: getattr(typed, name) for name in row.options}
    with on_screen(vars(typed), "export") as console:
        from multipruner.console.progress import waiting_display
        from multipruner.console.say import teller

        with waiting_display(console, "export"):
            done = loaded(row.by)(typed.folder, typed.output, outtype=outtype, overwrite=typed.overwrite, **options)
        say = teller(console)
        for line in done.lines(outtype):
            say(line)
    return 0
