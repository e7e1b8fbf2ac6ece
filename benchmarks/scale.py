"""Time and memory of a run against the size of the model: layers in memory, and on disk.

    python benchmarks/scale.py [--shapes 0.1b,0.5b] [--offload none,disk] [--sequences 4] [--length 128]
        [--moments-sequences 4] [--ratio 0.2] [--work DIR] [--record FILE] [FLAGS OF A RUN]

Checkpoints of random weights, in the shapes of published models, come with a tokenizer and a text
(``random_models.py``). A process each prunes them. Printed are its seconds by stage, the most memory that it had
(VmHWM, pages of mapped files among them) and the most that was its own (RssAnon), beside the weights as they are stored
and as they are computed with, and what the run foretold. Linux only.
"""

from __future__ import annotations

import argparse
import json
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
    memory = alone.run(flags, marks)
    return {"report": json.loads((output / "report.json").read_text()), **memory}


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
    parser.add_argument("--work", type=Path, default=Path("runs/scale"), help="checkpoints and results are kept there")
    flag(parser)
    return parser.parse_known_args(typed)


def main(typed: Sequence[str] | None = None) -> None:
    """Measure every shape both ways; print and record the table."""
    asked, more = _arguments(typed)
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
