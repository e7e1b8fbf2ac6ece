"""``python -m multipruner export FOLDER --format gguf``: write a pruned model for other programs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from multipruner.config.choices import EXPORTS, QUANTS, loaded
from multipruner.core.errors import ConfigError

from .base import Parser, log_flags, on_screen

_HELP = """\
Write a pruned model as one file, or a folder, for other programs.

gguf (default)  for llama.cpp and what is built on it (Ollama, LM Studio, ...). Families: llama, mistral, qwen2, qwen3.
                Layers of different sizes are told as llama.cpp's 'deci', those of qwen3 (with tied embeddings only)
                as 'openelm'. --quant makes K-quants of it, by llama.cpp's own quantiser where that is installed.
onnx            for ONNX Runtime and its kin: input_ids, attention_mask -> logits, any batch and length, without a
                cache, so rather for scoring than for writing text. All families; of an image classifier pixel_values
                -> logits, opened again and compared before the file takes its name.
                Needs the extra: pip install 'multipruner[onnx]'
openvino        a folder for openvino-genai and OpenVINO's servers, with a cache and the tokenizer as graphs; opened
                again, and its logits compared, before it takes its name. All families.
                Needs the extra: pip install 'multipruner[openvino]'

examples
  python -m multipruner export runs/llama-0.2 --format gguf
  python -m multipruner export runs/llama-0.2 --format gguf --outtype q8_0 --output small.gguf
  python -m multipruner export runs/llama-0.2 --quant q4_k_m
  python -m multipruner export runs/llama-0.2 --format onnx
  python -m multipruner export runs/llama-0.2 --format openvino --outtype int8"""


def make_parser() -> Parser:
    """Make the command's parser."""
    parser = Parser(prog="multipruner export", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the folder of a finished run")
    parser.add_argument("--format", choices=tuple(EXPORTS), default="gguf", help="what to write; default gguf")
    parser.add_argument("--outtype", choices=("f32", "f16", "bf16", "q8_0", "int8"),
                        help="of the matrices; default f16, for onnx f32 (gguf has f32, f16, bf16 and q8_0, onnx f32 "
                        "and f16, openvino f32, f16 and int8)")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE", help="default FOLDER-OUTTYPE.FORMAT, beside the folder")
    parser.add_argument("--base-gguf", type=Path, metavar="FILE",
                        help="gguf: copy the tokenizer from a GGUF file of the base model")  # fmt: skip
    parser.add_argument("--quant", choices=QUANTS,
                        help="gguf: a K-quant, in place of --outtype (needs llama-quantize or llama-cpp-python)"
                        )  # fmt: skip
    parser.add_argument("--trust-remote-code", dest="trust_remote_code", action="store_true",
                        help="onnx, openvino: run the model's own code")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    log_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def run(arguments: Sequence[str]) -> int:
    typed = make_parser().parse_args(arguments)
    row = EXPORTS[typed.format]
    outtype = typed.outtype or row.outtype
    if typed.format != "gguf" and typed.base_gguf:
        raise ConfigError("--base-gguf goes with --format gguf: other formats take the folder's own tokenizer, or none")
    if typed.quant and (typed.format != "gguf" or typed.outtype):
        raise ConfigError("--quant goes with --format gguf, and in place of --outtype: it says the type itself")
    with on_screen(vars(typed), "export") as console:
        from multipruner.checkpoint.classes import check_reads_text
        from multipruner.console.progress import waiting_display
        from multipruner.console.say import teller

        say = teller(console)
        if not row.pictures:
            check_reads_text(typed.folder, f"export --format {typed.format}")
        options = {name: say if name == "say" else getattr(typed, name) for name in row.options}
        with waiting_display(console, "export"):
            done = loaded(row.by)(typed.folder, typed.output, outtype=outtype, overwrite=typed.overwrite, **options)
        for line in done.lines(typed.quant or outtype):
            say(line)
    return 0
