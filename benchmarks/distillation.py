"""Training after the cut by text (NLL) and by the dense model (distillation), on equal tokens, from one run.

``python benchmarks/distillation.py runs/llama-0.2 --wikitext wiki.test.raw --alpaca alpaca.jsonl``
``python benchmarks/distillation.py runs/llama-0.2 --tuned runs/lora,runs/layers --wikitext ... --alpaca ...``

Both begin with the same pruned model, see the same sequences in the same order and take the same number of steps; both
learn LoRA adapters, or what ``--learn`` says. The text is the dense model's own unless ``--data`` says otherwise. With
``--tuned`` nothing is trained: folders that ``tune`` has made of the run are judged. The rows of Alpaca that the models
are judged on are the last quarter, which nothing is trained or calibrated on. The pruned model has a row of its own
before those that were trained.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from results import Cell, flag, record
from rich.console import Console
from transformers import AutoTokenizer

from multipruner.checkpoint.load import load
from multipruner.checkpoint.run_folder import read_run
from multipruner.config.recipe import EvaluationSpec
from multipruner.console.quiet import quiet_libraries
from multipruner.engine.precision import Precision
from multipruner.eval import Perplexity, perplexity
from multipruner.jobs.tune.run import tune
from multipruner.jobs.tune.settings import LEARN, TuneSettings
from multipruner.jobs.tune.text import dense_model

COLUMNS = (("", "{}"), ("loss", "{}"), ("tokens", "{:,}"), ("seconds of training", "{:,.0f}"),
           ("WikiText-2", "{:.2f}"), ("times dense", "{:.2f}"), ("held-out Alpaca", "{:.2f}"),
           ("times dense", "{:.2f}"))  # fmt: skip
WAYS = {"text": (False, "NLL of the text"), "distilled": (True, "divergence from the dense model")}


def texts(tokenizer: Any, wikitext: Path, alpaca: Path) -> dict[str, torch.Tensor]:
    """Token ids of what is judged: running text, and the last quarter of the rows, joined by blank lines."""
    rows = [json.loads(line)["text"] for line in alpaca.read_text(encoding="utf-8").splitlines()]
    held_out = "\n\n".join(rows[len(rows) * 3 // 4 :])
    both = {"WikiText-2": wikitext.read_text(encoding="utf-8"), "held-out Alpaca": held_out}
    return {name: tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for name, text in both.items()}


def judged(model: Any, ids: dict[str, torch.Tensor], length: int, tokens: int) -> dict[str, Perplexity]:
    """Perplexities by text."""
    with Precision.of(model).computing(model):
        return {name: perplexity(model, text, length=length, max_tokens=tokens) for name, text in ids.items()}


def row(name: str, loss: str, tuned: dict[str, Any], found: Any, dense: Any) -> list[Cell]:
    """A row of the table."""
    values = [cell for text in dense for cell in (found[text].value, found[text].value / dense[text].value)]
    return [name, loss, tuned.get("tokens"), tuned.get("seconds", {}).get("training"), *values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="FOLDER", help="a pruned run; its dense model is at hand")
    parser.add_argument("--wikitext", type=Path, required=True, metavar="FILE", help="wiki.test.raw")
    parser.add_argument("--alpaca", type=Path, required=True, metavar="FILE", help="rows with a key text")
    parser.add_argument("--tuned", default="", metavar="FOLDERS", help="trained before, with commas between them")
    parser.add_argument("--data", default="self", metavar="TEXT", help="to train on, as tune takes it")
    parser.add_argument("--learn", choices=tuple(LEARN), default="lora")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--top-k", type=int, default=0, help="of the teacher; 0: its whole distributions")
    parser.add_argument("--eval-length", type=int, default=2048)
    parser.add_argument("--eval-tokens", type=int, default=49152, help="of each text")
    parser.add_argument("--work", type=Path, default=None, metavar="DIR", help="keeps the trained models there")
    flag(parser)
    given = parser.parse_args()
    quiet_libraries()
    console, run = Console(), read_run(given.run)
    ids = texts(AutoTokenizer.from_pretrained(given.run, trust_remote_code=False), given.wikitext, given.alpaca)
    measure = (given.eval_length, given.eval_tokens)
    teacher = dense_model(run.report, run.path, False, console.print)
    dense = judged(teacher, ids, *measure)
    del teacher
    pruned = judged(load(given.run), ids, *measure)
    rows = [row("dense", "", {}, dense, dense), row("pruned", "", {}, pruned, dense)]
    folders = [Path(folder) for folder in given.tuned.split(",") if folder]
    for folder in folders:
        done = read_run(folder).report["tuned"]
        rows.append(row(f"tuned: {done['learn']}", done["loss"], done, judged(load(folder), ids, *measure), dense))
        print(rows[-1], flush=True)
    base = TuneSettings(data=given.data, learn=given.learn, steps=given.steps, batch=given.batch, length=given.length,
                        lr=given.lr)  # fmt: skip
    spec = EvaluationSpec(text=str(given.wikitext), length=64, max_tokens=128)  # ours are measured here, on both texts
    with tempfile.TemporaryDirectory() as scratch:
        for name, (distill, loss) in ({} if folders else WAYS).items():
            settings = replace(base, distill=distill, top_k=given.top_k if distill else 0)
            done = tune(given.run, (given.work or Path(scratch)) / name, settings, evaluation=spec, console=console)
            found = judged(done.model, ids, *measure)
            rows.append(row(f"tuned: {name}", loss, done.report["tuned"], found, dense))
            print(rows[-1], flush=True)
    heads = [heading for heading, _ in COLUMNS]
    print(heads, *rows, sep="\n")
    setting = {"pruned": run.report.get("command"), "tuned": asdict(base), "perplexity": measure,
               "ratio": run.report["ratio"]}  # fmt: skip
    record(given.record, "distillation", COLUMNS, rows, setting=setting)


if __name__ == "__main__":
    main()
