"""Time and memory of a run against the size of the model: layers in memory, and on disk.

    python benchmarks/scale.py [--shapes 0.1b,0.5b] [--offload none,disk] [--sequences 4] [--length 128]
        [--moments-sequences 4] [--ratio 0.2] [--work DIR] [--record FILE] [FLAGS OF A RUN]

Checkpoints of random weights, in the shapes of published models, are written shard by shard, a layer at a time; a
tokenizer of bytes and a text come with them. A process each prunes them. Printed are its seconds by stage, the most
memory that it had (VmHWM, pages of mapped files among them) and the most that was its own (RssAnon), beside the weights
as they are stored and as they are computed with, and what the run foretold. Linux only.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from results import Cell, flag, markdown, record
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

_SHARED = {"max_position_embeddings": 4096, "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1}
SHAPES: dict[str, dict[str, Any]] = {
    "0.01b": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
              "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True},
    "0.1b": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
             "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}  # fmt: skip
"""Configurations of Qwen 2.5 (and, at 0.1 billion, the sizes of SmolLM2), by their billions of parameters."""
WORDS = 4096
"""Of the vocabulary that the random text is of, and ``TEXT`` words of it are written."""
TEXT = 200_000
_CHILD = """
import json, sys, threading, time
from pathlib import Path
def status(key):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)
most = [0]
def watch():
    while True:
        most[0] = max(most[0], status("RssAnon"))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
from multipruner.commands.main import main
code = main(sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps({"own": most[0] << 10, "all": status("VmHWM") << 10}))
raise SystemExit(code)
"""
"""One run, and the memory that it had."""


def checkpoint(shape: Mapping[str, Any], folder: Path) -> Path:
    """Write a model of random weights, one layer's at a time; nothing where it is there already."""
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = Qwen2Config(**_SHARED, **shape, architectures=["Qwen2ForCausalLM"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator, placed = torch.Generator().manual_seed(0), dict[str, str]()
    for number, names in enumerate(_parts(model)):
        tensors = {name: _drawn(name, tuple(tensor.shape), generator) for name, tensor in names.items()}
        file = f"model-{number:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, file)
    config.save_pretrained(folder)
    _tokenizer(folder)
    size = sum(tensor.numel() * 2 for tensor in model.parameters())
    index = {"metadata": {"total_size": size}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _parts(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the tensors of the layers, and of what is outside of them, layer by layer."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.named_parameters():
        words = name.split(".")
        parts.setdefault(words[2] if words[1] == "layers" else "outside", {})[name] = tensor
    yield from parts.values()


def _drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return one tensor: norms near one, biases near zero, rows of matrices of length one half."""
    noise = torch.randn(prod(shape), generator=generator).view(shape)
    if len(shape) == 1:
        return (0.02 * noise + ("norm" in name)).to(torch.bfloat16)
    return noise.mul_(0.5 / shape[1] ** 0.5).to(torch.bfloat16)


def _tokenizer(folder: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: number for number, word in enumerate(["<s>", "</s>", *letters, *_words()])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def _words() -> list[str]:
    return [f"word{number}" for number in range(WORDS)]


def text(folder: Path) -> Path:
    """Write random words, a line of 64 each, some far more often than others."""
    drawn, words = random.Random(0), _words()
    weights = [1 / (1 + number) for number in range(WORDS)]
    rows = [" ".join(drawn.choices(words, weights, k=64)) for _ in range(TEXT // 64)]
    (folder / "text.txt").write_text("\n\n".join(rows))
    return folder / "text.txt"


def measured(model: Path, offload: str, asked: argparse.Namespace, more: list[str]) -> dict[str, Any]:
    """Prune in a process of its own; what it took.

    Raises:
        SystemExit: when the run fails, with what it said.
    """
    output, marks = asked.work / f"{model.name}-{offload}", asked.work / "memory.json"
    given = text(asked.work)
    flags = ["--model", str(model), "--output", str(output), "--overwrite", "--offload", offload, "--effort", "fast",
             "--ratio", str(asked.ratio), "--calibration", str(given), "--eval-text", str(given),
             "--sequences", str(asked.sequences), "--length", str(asked.length), "--moments-sequences",
             str(asked.moments_sequences), "--set", f"evaluation.length={asked.length}", "--set",
             f"evaluation.max_tokens={4 * asked.length}", *more]  # fmt: skip
    process = subprocess.run([sys.executable, "-c", _CHILD, str(marks), *flags], check=False)
    if process.returncode:
        raise SystemExit(f"{model.name}, --offload {offload}: the run ended with {process.returncode}")
    report = json.loads((output / "report.json").read_text())
    return {"report": report, **json.loads(marks.read_text())}


STAGES = ("load", "text", "moments", "search", "repair", "surgery", "evaluation", "writing")
_SIZE = "{:.2f}"
COLUMNS = [["shape, layers", "{}"], ["parameters, 10^9", _SIZE], ["weights as stored, GiB", _SIZE],
           ["as computed with", _SIZE], ["foretold", _SIZE], ["most of its own", _SIZE], ["most in all", _SIZE],
           ["walks", "{:.0f}"], ["seconds", "{:.0f}"], *([stage, "{:.0f}"] for stage in STAGES)]  # fmt: skip


def row_of(name: str, offload: str, found: Mapping[str, Any]) -> list[Cell]:
    """Return a line of the table."""
    report, gib = found["report"], 2**30
    seconds, parameters = report["seconds"], report["parameters"]["before"]
    width = 4 if report["precision"]["computed"] == "float32" else 2
    told = report["forecast"]["memory"]["predicted_bytes"]
    sizes = (2 * parameters, width * parameters, told, found["own"], found["all"])
    walks = report.get("offload", {}).get("walks")
    return [f"{name}, {offload}", parameters / 1e9, *(size / gib for size in sizes), walks, sum(seconds.values()),
            *(seconds.get(stage, 0.0) for stage in STAGES)]  # fmt: skip


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.1b,0.5b", help=", ".join(SHAPES))
    parser.add_argument("--offload", default="none,disk", help="where layers are: none, disk, or both")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--moments-sequences", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--work", type=Path, default=Path("runs/scale"), help="checkpoints and results are kept there")
    flag(parser)
    return parser.parse_known_args()


def main() -> None:
    """Measure every shape both ways; print and record the table."""
    asked, more = _arguments()
    rows = []
    for name in asked.shapes.split(","):
        model = checkpoint(SHAPES[name], asked.work / name)
        for offload in asked.offload.split(","):
            rows.append(row_of(name, offload, measured(model, offload, asked, more)))
            print(markdown(COLUMNS, rows), flush=True)
    setting = {"sequences": asked.sequences, "length": asked.length, "moments_sequences": asked.moments_sequences}
    record(asked.record, "scale", COLUMNS, rows, setting=setting)


if __name__ == "__main__":
    main()
