"""Time and memory of a run against the size of the model: layers in memory, and on disk.

    python benchmarks/scale.py [--shapes 0.1b,0.5b] [--offload none,disk] [--sequences 4] [--length 128]
        [--moments-sequences 4] [--ratio 0.2] [--limit GIB] [--work DIR] [--record FILE] [FLAGS OF A RUN]
    python benchmarks/scale.py --shapes llama-2-7b --offload disk --limit 12 --sequences 2 --length 64
        --moments-sequences 2    # 7 billion parameters on a small machine: 13.5 GB on disk, hours

Checkpoints of random weights, in the shapes of published models, come with a tokenizer and a text
(``random_models.py``). A process each prunes them. Printed are its seconds by stage, the most memory that it had
(VmHWM, pages of mapped files among them) and the most that was its own (RssAnon), beside the weights as they are stored
and as they are computed with, and what the run foretold. Where layers are on disk, one pass over them is timed besides,
with their files out of the system's cache: the next layer read while one computes, and not. With ``--limit`` a process
whose own memory grows beyond it ends there, and the benchmark with it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import alone
from random_models import SHAPES, checkpoint, text
from results import Cell, flag, markdown, record


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
    memory = alone.run(flags, marks, limit=asked.limit)
    return {"report": json.loads((output / "report.json").read_text()), **memory}


_PASS = """
import sys, time
import torch
from transformers import AutoModelForCausalLM
from multipruner.engine.precision import Held
from multipruner.engine.prunable import Prunable
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
prunable = Prunable.of(model, torch.bfloat16)
held = Held(model, torch.bfloat16, torch.float32, prunable.layers)
held.on_disk.end()
held.on_disk.ahead = sys.argv[4] == "True"
held.on_disk.begin()
ids = torch.zeros(int(sys.argv[2]), int(sys.argv[3]), dtype=torch.long)
with torch.inference_mode():
    began = time.perf_counter()
    prunable.decoder(input_ids=ids, use_cache=False)
print(time.perf_counter() - began)
"""
"""One pass over all layers, computed in float32, in a process of its own."""


def timed_pass(model: Path, asked: argparse.Namespace, *, ahead: bool) -> float:
    """Return the seconds of one pass whose layers come from disk, and not from the system's cache.

    Args:
        model: the checkpoint.
        asked: sequences and length of the text.
        ahead: whether the next layer is read while one computes.
    """
    os.sync()
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    words = [str(model), str(asked.sequences), str(asked.length), str(ahead)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", _PASS, *words], env=environment, check=True, stdout=subprocess.PIPE)
    return float(done.stdout.split()[-1])


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


def _arguments(typed: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.1b,0.5b", help=", ".join(SHAPES))
    parser.add_argument("--offload", default="none,disk", help="where layers are: none, disk, or both")
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--moments-sequences", type=int, default=4)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--limit", type=float, metavar="GIB", help="the most memory that a process may have of its own")
    parser.add_argument("--work", type=Path, default=Path("runs/scale"), help="checkpoints and results are kept there")
    flag(parser)
    return parser.parse_known_args(typed)


def main(typed: Sequence[str] | None = None) -> None:
    """Measure every shape both ways; print and record the table."""
    asked, more = _arguments(typed)
    rows, passes = [], {}
    for name in asked.shapes.split(","):
        model = checkpoint(SHAPES[name], asked.work / name)
        for offload in asked.offload.split(","):
            rows.append(row_of(name, offload, measured(model, offload, asked, more)))
            print(markdown(COLUMNS, rows), flush=True)
        if "disk" in asked.offload.split(","):
            passes[name] = [timed_pass(model, asked, ahead=ahead) for ahead in (False, True)]
            print("{}: a pass of {} tokens, layers from disk: {:.2f} s; the next one read meanwhile: {:.2f} s".format(
                name, asked.sequences * asked.length, *passes[name]), flush=True)  # fmt: skip
    setting = {
        "passes_without_and_with_read_ahead": passes,
        "sequences": asked.sequences,
        "length": asked.length,
        "moments_sequences": asked.moments_sequences,
    }
    record(asked.record, "scale", COLUMNS, rows, setting=setting)


if __name__ == "__main__":
    main()
