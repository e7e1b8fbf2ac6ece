"""A published recipe on one device, such as one big GPU: from a checkpoint of random weights to its speed-up.

    python benchmarks/gpu.py [--shape llama-2-7b,llama-3.1-8b] [--device cuda] [--dtype bfloat16] [--short]
        [--methods program,paper] [--work DIR] [--record FILE] [FLAGS OF A RUN]

Nothing is downloaded: weights, tokenizer and text are made in place (``random_models.py``), so that times and memory
mean something, and what is chosen means nothing. For every shape:

1. the checkpoint, and latency tables of prefill and decoding at every batch size (``multipruner latency``);
2. the catalogue's recipe of that name at 20 %, by each method, in a process of its own (``multipruner``);
3. both models as transformers opens them, timed in alternation, beside what the tables predict;
4. how fast the device multiplies matrices, which is what the stages' products are a share of.

``--short`` takes little text and few samples, to see that all of it works. Every stage leaves a file in
``DIR/SHAPE``: the same command goes on where it was stopped. A run goes on inside of its stage, too; its minutes are
then those of its last part, and the tables say that it went on. The folders of results are as large as their models:
``--drop`` takes their weights away once they are timed. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import alone
import gpu_tables
import torch
from latency_check import as_anyone_opens_it
from random_models import SHAPES, checkpoint, text
from results import flag, machine, markdown, record

from multipruner.console.quiet import quiet_libraries
from multipruner.core.families import anatomy_of
from multipruner.core.identity import digest
from multipruner.core.latency_table import LatencyTable, Workload
from multipruner.core.structure import Structure
from multipruner.latency.timing import time_side_by_side
from multipruner.recipes import names, read

Found = dict[str, Any]
PUBLISHED = "llama-2-7b"
"""The recipe of a shape that the catalogue has none for."""
TEXT = 1_000_000
"""Words that calibration, moments and evaluation are taken from."""
SHORT = {
    "calibration": {"sequences": 4, "width_sequences": 2, "length": 256, "moments_sequences": 8},
    "evaluation": {"length": 256, "max_tokens": 1024},
}
"""What ``--short`` changes in the recipe."""
_ROUNDS = {True: 4, False: 30}
"""Samples of both models, of a short and of a whole measurement."""


class Bench:
    """The stages of one shape, each kept in a file as soon as it is done.

    Args:
        name: of the shape.
        asked: the flags.
        more: further flags of the runs.
    """

    def __init__(self, name: str, asked: argparse.Namespace, more: Sequence[str]) -> None:
        self.name, self.asked, self.more = name, asked, list(more)
        self.folder: Path = asked.work / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self._machine = machine()

    def kept(self, stage: str, about: Mapping[str, Any], make: Callable[[Path], Found]) -> Found:
        """Return what a stage found; it is made where there is no file yet of what it is about, on this machine.

        Args:
            stage: its name.
            about: everything that it depends on.
            make: makes it, and may leave what it works with beside the file, under the same name.
        """
        whole = {"stage": stage, "machine": self._machine, "torch": torch.__version__, **about}
        path = self.folder / f"{stage}-{digest(whole)[:12]}.json"
        if path.is_file():
            return json.loads(path.read_text())
        print(f"{self.name}: {stage}", flush=True)
        _let_go()
        found = make(path.with_suffix(""))
        aside = path.with_suffix(".aside")
        aside.write_text(json.dumps(found))
        aside.replace(path)
        return found

    @property
    def model(self) -> Path:
        """The checkpoint, written where it is not there yet."""
        device = "cuda" if self.asked.device.startswith("cuda") else "cpu"
        return checkpoint(SHAPES[self.name], self.folder / "dense", device)

    def table(self, batch: int) -> LatencyTable:
        """Return milliseconds of every option at a batch size."""
        asked, where = self.asked, ["--device", self.asked.device, "--dtype", self.asked.dtype]
        step = asked.channel_step or min(1024, SHAPES[self.name]["intermediate_size"] // 8)
        flags = ["--batch", str(batch), "--prompt", str(asked.prompt), "--cached", str(asked.cached),
                 "--channel-step", str(step), *where]  # fmt: skip

        def measure(place: Path) -> Found:
            output = place.with_suffix(".table")
            if not output.exists():
                alone.run(["latency", "--model", str(self.model), "--output", str(output), *flags], self._marks)
            return json.loads(output.read_text())

        return LatencyTable.from_json(json.dumps(self.kept(f"table-b{batch}", {"flags": flags}, measure)))

    @property
    def _marks(self) -> Path:
        return self.folder / "memory.json"

    def recipe(self) -> Found:
        """Return the catalogue's recipe on this checkpoint and this text."""
        published = read(self.name if self.name in names() else PUBLISHED)
        given, short = str(text(self.folder, self.asked.words)), SHORT if self.asked.short else {}
        calibration = {**published["calibration"], **short.get("calibration", {}), "source": given}
        return {**published, "model": str(self.model), "ratio": self.asked.ratio, "dtype": self.asked.dtype,
                "device": self.asked.device, "calibration": calibration,
                "evaluation": {**short.get("evaluation", {}), "text": given}}  # fmt: skip

    def pruned(self, method: str) -> Found:
        """Return report and memory of a run by a method, and its folder."""
        recipe = self.recipe()

        def make(place: Path) -> Found:
            given = place.with_suffix(".recipe")
            again = given.exists()
            given.write_text(json.dumps(recipe))
            flags = ["--recipe", str(given), "--method", method, "--output", str(place), *self.more]
            memory = alone.run(flags, self._marks)
            report = json.loads((place / "report.json").read_text())
            return {"folder": str(place), "again": again, "memory": memory, "report": report}

        return self.kept(method, {"recipe": recipe, "more": self.more}, make)

    def speeds(self, method: str, run: Found) -> Found:
        """Return milliseconds of both models by workload: measured in alternation, and as the tables say."""
        rounds = _ROUNDS[self.asked.short]
        tables = {batch: self.table(batch) for batch in self.asked.batches}

        def measure(place: Path) -> Found:
            how = argparse.Namespace(attn_implementation=None, dtype=self.asked.dtype, device=self.asked.device)
            folders = {"dense": self.model, "pruned": Path(run["folder"])}
            models = {name: as_anyone_opens_it(folder, how) for name, folder in folders.items()}
            anatomy = anatomy_of(models["dense"].config)
            structure, found = Structure.from_json(run["report"]["structure"]), {}
            for table in tables.values():
                for name in table.workloads:
                    workload: Workload = table.row(name).workload
                    timed = time_side_by_side(models, workload, rounds=rounds)
                    found[name] = {who: one.median_ms for who, one in timed.items()} | {
                        "predicted_dense": table.milliseconds(anatomy.dense, anatomy, name),
                        "predicted_pruned": table.milliseconds(structure, anatomy, name),
                    }
            return found

        about = {"of": run["folder"], "rounds": rounds, "tables": [table.date for table in tables.values()]}
        found = self.kept(f"speed-{method}", about, measure)
        if self.asked.drop:
            for weights in Path(run["folder"]).glob("*.safetensors"):
                weights.unlink()
        return found

    def rate(self, dtype: str) -> float:
        """Return 10^9 floating-point operations per second of large products in a type."""
        made = self.kept(f"rate-{dtype}", {}, lambda place: {"gflops": product_rate(self.asked.device, dtype)})
        return made["gflops"]


def _let_go() -> None:
    """Give a GPU's memory that nothing is in back to other processes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def product_rate(device: str, dtype: str, *, products: int = 8, repeats: int = 5) -> float:
    """Measure how fast a device multiplies large matrices: the best of some rows of products.

    Args:
        device, dtype: by torch's names.
        products: between two waits for the device.
        repeats: of these; one before them does not count.

    Returns:
        10^9 floating-point operations per second.
    """
    from multipruner.latency.clock import Clock

    width = 1024 if device == "cpu" else 8192
    left, right = (torch.ones(width, width, dtype=getattr(torch, dtype), device=device) for _ in range(2))
    out, clock, best = torch.empty_like(left), Clock(torch.device(device)), float("inf")
    with torch.inference_mode():
        for repeat in range(1 + repeats):
            clock.wait()
            begin = clock.now()
            for _ in range(products):
                torch.mm(left, right, out=out)
            end = clock.now()
            clock.wait()
            best = min(best, clock.milliseconds(begin, end)) if repeat else best
    return products * 2 * width**3 / best / 1e6


def _arguments(typed: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-2-7b,llama-3.1-8b", help=f"one or several of {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--methods", default="program,paper", help="program, greedy, paper")
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--short", action="store_true", help="little text and few samples: does it work at all?")
    parser.add_argument("--batches", default="1,8", help="sequences that are timed together (default 1,8)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prefill (default 512)")
    parser.add_argument("--cached", type=int, default=512, help="tokens in the cache of a decoding step (default 512)")
    parser.add_argument("--channel-step", type=int, default=None,
                        help="between widths of the latency tables (default 1024, or an eighth)")  # fmt: skip
    parser.add_argument("--words", type=int, default=TEXT, help="of the text")
    parser.add_argument("--drop", action="store_true", help="delete the weights of results once they are timed")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="everything is kept there")
    flag(parser)
    asked, more = parser.parse_known_args(typed)
    for name in asked.shape.split(","):
        if name not in SHAPES:
            parser.error(f"--shape {name} is unknown; choose from {', '.join(SHAPES)}")
    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {asked.device}: torch finds no GPU here; give --device cpu")
    asked.batches = [int(batch) for batch in asked.batches.split(",")]
    return asked, more


def main(typed: Sequence[str] | None = None) -> int:
    """Measure every shape by every method; print and record the tables after each."""
    asked, more = _arguments(typed)
    quiet_libraries()
    tables = gpu_tables.Tables()
    for name in asked.shape.split(","):
        bench = Bench(name, asked, more)
        for method in asked.methods.split(","):
            run = bench.pruned(method)
            computed = run["report"]["precision"]["computed"]
            label = f"{name}, {method}" + (", went on" if run["again"] else "")
            tables.add(label, run, bench.rate(computed), gpu_tables.layer_flops(bench.model))
            tables.add_speeds(label, bench.speeds(method, run))
            for columns, rows in tables.all():
                print(f"\n{markdown(columns, rows)}", flush=True)
            setting = {key: value for key, value in vars(asked).items() if key not in ("work", "record")}
            record(asked.record, "gpu", gpu_tables.STAGES, tables.stages, setting={**setting, "more": more},
                   **tables.others())  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
