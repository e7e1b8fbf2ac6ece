"""What is kept at which ratio: this project's method against the paper's procedure and against removing blocks only.

    python benchmarks/quality.py --work runs/quality --alpaca alpaca.jsonl --wikitext wiki.test.raw
        [--tasks piqa,arc_easy --include-path TASKS --limit 200] [--ratios 0.1,0.2] [--seeds 0,1,2]

Every cell is one run folder and one JSON file in ``--work``; a cell that is there is not computed again, so the command
can be interrupted and goes on. Calibration is text sampled from the model (``--calibration self``, no data at all) or
the first three quarters of the Alpaca file; perplexities are of raw WikiText-2 test (sequences of 2,048 tokens) and of
the last quarter of the Alpaca file, which no calibration sees. Nothing here chooses a setting.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import multipruner
from multipruner.eval import evaluate
from multipruner.quiet import quiet_libraries
from multipruner.recipe import EvaluationSpec, Recipe
from multipruner.recipes import mapping_for
from multipruner.sources import load_dense, resolve

METHODS: dict[str, dict[str, Any]] = {
    "global": {"method": "global"},
    "paper": {"method": "paper"},
    "blocks only": {"method": "paper", "shares": "100:0:0"},
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "no repair of what adds up": {"accumulate": 0},
    "no repair": {"compensation": "none"},
    "magnitude order": {"importance": "magnitude"},
    "magnitude order, no repair": {"importance": "magnitude", "compensation": "none"},
    "nll instead of kl": {"objective": "nll"},
    "tables once": {"rounds": 0},
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--alpaca", type=Path, required=True, help="JSON lines with a column 'text'")
    parser.add_argument("--wikitext", type=Path, required=True, help="raw test split")
    parser.add_argument("--calibration", choices=("self", "alpaca"), default="self")
    parser.add_argument("--ratios", default="0.1,0.2,0.3,0.4")
    parser.add_argument("--seeds", default="0,1,2", help="of the calibration text, for the method 'global'")
    parser.add_argument("--methods", default=",".join(METHODS), help="may be empty")
    parser.add_argument(
        "--ablations", action="store_true", help="also each ingredient off in turn, at the second ratio"
    )
    parser.add_argument("--tasks", default="", help="lm-eval tasks, for the first seed")
    parser.add_argument("--include-path", default=None)
    parser.add_argument("--limit", type=int, default=None)
    return parser.parse_args()


def split_alpaca(source: Path, work: Path) -> tuple[Path, Path]:
    """The file in two: for calibration, and for nothing but the final numbers."""
    rows = source.read_text(encoding="utf-8").splitlines()
    cut = 3 * len(rows) // 4
    train, held_out = work / "alpaca-calibration.jsonl", work / "alpaca-held-out.txt"
    train.write_text("\n".join(rows[:cut]) + "\n", encoding="utf-8")
    held_out.write_text("\n\n".join(json.loads(row)["text"] for row in rows[cut:]), encoding="utf-8")
    return train, held_out


def judge(model: Any, tokenizer: Any, args: argparse.Namespace, held_out: Path, tasks: bool) -> dict[str, Any]:
    """Perplexities and tasks of one model."""

    def text(path: Path, length: int, most: int) -> dict[str, Any]:
        spec = EvaluationSpec(text=str(path), length=length, max_tokens=most)
        return next(iter(evaluate(model, tokenizer, spec).perplexities.values())).to_json()

    result: dict[str, Any] = {
        "wikitext2": text(args.wikitext, 2048, 24 * 2048),
        "alpaca": text(held_out, 512, 16 * 512),
    }
    if tasks and args.tasks:
        spec = EvaluationSpec(tasks=tuple(args.tasks.split(",")), include_path=args.include_path, limit=args.limit)
        done = evaluate(model, tokenizer, spec)
        result["tasks"] = {name: task.to_json() for name, task in done.tasks.items()}
    return result


def cell(args: argparse.Namespace, name: str, settings: dict[str, Any], ratio: float, seed: int, texts: Any) -> dict:
    """One pruned model, judged; from disk when it is there."""
    train, held_out = texts
    stem = f"{name}-{ratio:g}-{args.calibration}-{seed}".replace(" ", "_").replace(",", "")
    target = args.work / f"{stem}.json"
    if target.exists():
        return json.loads(target.read_text())
    source = "self" if args.calibration == "self" else str(train)
    recipe = Recipe.build(
        mapping_for(args.model),
        settings,
        {"ratio": ratio, "calibration": {"source": source, "seed": seed}},
        # the run's own evaluation is not what is reported here: keep it short
        {"evaluation": {"text": str(held_out), "max_tokens": 1024, "length": 512}},
    )
    # one folder for all ratios of a setting: losses that were measured for one serve the others
    folder = args.work / stem.replace(f"-{ratio:g}-", "-")
    run = multipruner.prune(recipe, output=folder, console=Console(), overwrite=True)
    result = judge(run.model, run.tokenizer, args, held_out, seed == int(args.seeds.split(",")[0]))
    result |= {"name": name, "ratio": run.report["ratio"], "target": ratio, "seed": seed}
    result |= {"parameters": run.report["parameters"]["after"], "seconds": run.report["seconds"]}
    write(target, result)
    del run
    gc.collect()
    return result


def write(path: Path, record: dict[str, Any]) -> None:
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


def dense_cell(args: argparse.Namespace, held_out: Path) -> dict[str, Any]:
    target = args.work / "dense.json"
    if target.exists():
        return json.loads(target.read_text())
    recipe = Recipe.build(mapping_for(args.model))
    model, tokenizer = load_dense(resolve(recipe, print), recipe)
    result = judge(model, tokenizer, args, held_out, tasks=True) | {"name": "dense", "ratio": 0.0}
    result["parameters"] = sum(weight.numel() for weight in model.parameters())
    write(target, result)
    return result


def row(dense: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """One line of the table: mean over the seeds, and their standard deviation."""

    def number(text: str) -> str:
        values = [one[text]["value"] for one in group]
        times = statistics.mean(values) / dense[text]["value"]
        spread = f" ±{statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{spread} ({times:.2f}x)"

    scores = [one["tasks"] for one in group if "tasks" in one]
    cells = [group[0]["name"], f"{group[0]['ratio']:.2%}", number("wikitext2"), number("alpaca")]
    for task in sorted(dense.get("tasks", {})):
        metrics = scores[0][task]["metrics"] if scores and task in scores[0] else {}
        best = metrics.get("acc_norm") or metrics.get("acc")
        cells.append(f"{100 * best['value']:.1f} ±{100 * best['stderr']:.1f}" if best else "")
    seconds = [sum(one["seconds"].values()) - one["seconds"]["evaluation"] for one in group if "seconds" in one]
    cells.append(f"{statistics.mean(seconds):,.0f}" if seconds else "")
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    args = arguments()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    texts = split_alpaca(args.alpaca, args.work)
    torch.manual_seed(0)
    dense = dense_cell(args, texts[1])
    ratios, seeds = [float(r) for r in args.ratios.split(",")], [int(s) for s in args.seeds.split(",")]
    tasks = sorted(dense.get("tasks", {}))
    lines = [
        "| method | removed | WikiText-2 | held-out Alpaca | " + " | ".join([*tasks, "seconds"]) + " |",
        "|" + "---|" * (5 + len(tasks)),
        row(dense, [dense]),
    ]
    for ratio in ratios:
        for name in filter(None, args.methods.split(",")):
            of = seeds if name == "global" else seeds[:1]
            lines.append(row(dense, [cell(args, name, METHODS[name], ratio, seed, texts) for seed in of]))
            print(lines[-1], flush=True)
    if args.ablations:
        ratio = ratios[min(1, len(ratios) - 1)]
        for name, settings in ABLATIONS.items():
            lines.append(row(dense, [cell(args, name, settings, ratio, seeds[0], texts)]))
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
