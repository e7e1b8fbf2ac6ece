"""Plain objective against ours on SmolLM2-135M: seconds and token-layers, both sides from one run.

``python benchmarks/objective.py``: one whole greedy step of the block stage (60 candidates).
``python benchmarks/objective.py --whole``: and a whole 20 % run (half an hour on two cores), and the same with
shortlists (``--shortlist 2,4,8``), which measure few candidates of a step and may decide otherwise.

The plain side runs the stock model from end to end for every candidate, removed blocks included (multiplied by zero),
as the official code does with its masks. Ours skips what is removed, re-uses what lies below the change, and abandons
a candidate whose running loss exceeds the second best; the head tokens show how little the last saves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from results import Cell, flag, record

from multipruner.config.recipe import Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.engine.objective import CalibrationObjective, PlainObjective, Work
from multipruner.engine.precision import Precision
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.jobs.setting import grid_in
from multipruner.recipes import mapping_for
from multipruner.search import (
    Dimension,
    Grid,
    Objective,
    Problem,
    Shortlisted,
    candidates,
    replay,
    sequential_path,
)
from multipruner.sources.calibration import load_calibration
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

COLUMNS = (("", "{}"), ("evaluations", "{:,}"), ("plain: seconds", "{:.1f}"), ("token-layers", "{:,.0f}"),
           ("ours: seconds", "{:.1f}"), ("token-layers", "{:,.0f}"), ("time", "{:.2f}x"),
           ("token-layers", "{:.2f}x"), ("loss, plain", "{:.4f}"), ("loss, ours", "{:.4f}"))  # fmt: skip


@dataclass(frozen=True)
class Side:
    """What one objective did."""

    name: str
    seconds: float
    evaluations: int
    token_layers: float
    head_tokens: int

    def row(self) -> str:
        return (
            f"{self.name:<24}{self.evaluations:>12,}{self.seconds:>10.1f}{self.token_layers:>16,.0f}"
            f"{self.head_tokens:>14,}"
        )


def measured(name: str, run: Callable[[], object], *works: Work) -> Side:
    before = [(w.evaluations, w.token_layers, w.head_tokens) for w in works]
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    evaluations, layers, head = (
        sum(now - then for now, then in zip(after, start, strict=True))
        for after, start in zip(
            zip(*((w.evaluations, w.token_layers, w.head_tokens) for w in works), strict=True),
            zip(*before, strict=True),
            strict=True,
        )
    )
    return Side(name, seconds, int(evaluations), layers, int(head))


def show(title: str, plain: Side, ours: Side) -> None:
    print(f"\n{title}\n{'':<24}{'evaluations':>12}{'seconds':>10}{'token-layers':>16}{'head tokens':>14}")
    print(plain.row())
    print(ours.row())
    print(
        f"plain / ours: {plain.seconds / ours.seconds:.2f}x time, "
        f"{plain.token_layers / ours.token_layers:.2f}x token-layers"
    )


def row_of(title: str, plain: Side, ours: Side, *losses: float) -> list[Cell]:
    """Both sides as a row of the result, with the losses that they end at."""
    both = (plain.seconds, plain.token_layers, ours.seconds, ours.token_layers)
    faster = (plain.seconds / ours.seconds, plain.token_layers / ours.token_layers)
    return [title, ours.evaluations, *both, *faster, *losses]


def one_step(prunable: Prunable, ids: torch.Tensor, batch_size: int) -> list[Cell]:
    """Every candidate of the first greedy step, both ways; the choices must agree."""
    moves = candidates("blocks", prunable.dense, prunable.anatomy, Grid({}))
    structures = [prunable.dense.replace(*move) for move in moves]
    plain = PlainObjective(prunable, ids, batch_size=batch_size)
    ours = CalibrationObjective(prunable, ids, batch_size=batch_size)
    plain(prunable.dense)
    ours(prunable.dense)  # warm both up
    choices = []
    a = measured("plain full forwards", lambda: choices.append(plain.argmin(structures)), plain.work)
    b = measured("prefix re-use", lambda: choices.append(ours.argmin(structures)), ours.work)
    show(f"one greedy step, {len(structures)} candidates, {ids.numel()} tokens", a, b)
    same = choices[0].best == choices[1].best
    print(f"same choice: {same}; loss {choices[0].loss:.6f} (plain) {choices[1].loss:.6f} (ours)")
    return row_of(f"one greedy step, {len(structures)} candidates", a, b, choices[0].loss, choices[1].loss)


@torch.inference_mode()
def overhead(prunable: Prunable, ids: torch.Tensor, repeats: int = 9) -> None:
    """Seconds per token-layer: the stock decoder's own forward against our row of blocks, in alternation."""
    ids = ids.to(prunable.model.device)
    inputs = prunable.inputs(ids)

    def stock() -> None:
        prunable.decoder(input_ids=ids, use_cache=False)

    def ours() -> None:
        hidden = inputs.hidden
        for block, size in enumerate(prunable.dense):
            hidden = prunable.block(hidden, inputs, block, size)

    times: dict[str, list[float]] = {"stock": [], "ours": []}
    for _ in range(repeats + 1):
        for name, run in (("stock", stock), ("ours", ours)):
            began = time.perf_counter()
            run()
            if ids.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - began)
    unit = ids.numel() * prunable.anatomy.layers / 1e6
    medians = {name: statistics.median(values[1:]) / unit for name, values in times.items()}
    print(
        f"\nmicroseconds per token-layer: stock decoder {medians['stock']:.2f}, ours {medians['ours']:.2f} "
        f"({medians['ours'] / medians['stock']:.3f}x)"
    )


def whole_run(prunable: Prunable, ids: torch.Tensor, recipe: Recipe, shortlists: Sequence[int]) -> list[list[Cell]]:
    """A whole run to 20 %, both ways, and with shortlists."""
    spec = recipe.calibration
    problem = Problem(
        prunable.costs, 0.2, recipe.stages, recipe.shares, grid_in(recipe).of_model(prunable.anatomy), recipe.stop
    )
    sides, paths = [], []
    ways = [("prefix re-use", CalibrationObjective, None), ("plain full forwards", PlainObjective, None)]
    ways += [(f"shortlist of {count}", CalibrationObjective, count) for count in shortlists]
    for name, make, count in ways:
        blocks = make(prunable, ids, batch_size=spec.batch_size)
        width = make(prunable, ids[: spec.width_sequences], batch_size=spec.batch_size)
        first, rest = (one if count is None else Shortlisted(one, count) for one in (blocks, width))
        judges: dict[Dimension, Objective] = {"blocks": first, "mlp": rest, "heads": rest}
        run = lambda judges=judges: paths.append(sequential_path(problem, judges))  # noqa: E731
        sides.append(measured(name, run, blocks.work, width.work))
        print(sides[-1].row(), flush=True)
    ours, plain, *few = sides
    judge = CalibrationObjective(prunable, ids, batch_size=spec.batch_size)
    ends = [judge(replay(prunable.anatomy, path)) for path in paths]
    for name, end in zip((side.name for side in sides), ends, strict=True):
        print(f"{name}: ends at a loss of {end:.4f} nats ({end / ends[1] - 1:+.2%} beside plain)")
    show("a whole run to 20 %", plain, ours)
    same = sum(a.kind == b.kind and a.layer == b.layer for a, b in zip(*paths[:2], strict=False))
    print(f"same decision at {same} of {len(paths[0])} steps (bfloat16 noise separates near ties)")
    rows = [row_of("a whole run to 20 %", plain, ours, ends[1], ends[0])]
    for side, end in zip(few, ends[2:], strict=True):
        show(f"a whole run to 20 %, {side.name}", plain, side)
        rows.append(row_of(f"a whole run to 20 %, {side.name}", plain, side, ends[1], end))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--whole", action="store_true", help="also a whole run to 20 %%")
    parser.add_argument("--shortlist", default="2,4,8", metavar="N,...", help="of the whole run (default %(default)s)")
    flag(parser)
    arguments = parser.parse_args()
    quiet_libraries()
    calibration = {
        "source": arguments.calibration, "sequences": arguments.sequences, "length": arguments.length
    }  # fmt: skip
    recipe = Recipe.build(mapping_for(arguments.model), {"method": "paper", "calibration": calibration})
    model, tokenizer = load_dense(resolve(recipe, print), recipe)
    precision = Precision.of(model, recipe.compute_dtype)
    prunable = Prunable.of(model, precision.stored)
    precision.held(model)
    ids = load_calibration(recipe.calibration, tokenizer, model, say=print).ids
    ranking = rank(recipe.importance, prunable)
    print(f"{torch.get_num_threads()} threads, {prunable.head_weight.dtype}, torch {torch.__version__}")
    with prunable.in_order(ranking):
        overhead(prunable, ids)
        rows = [one_step(prunable, ids, recipe.calibration.batch_size)]
        if arguments.whole:
            rows += whole_run(prunable, ids, recipe, [int(part) for part in arguments.shortlist.split(",") if part])
    record(arguments.record, "objective", COLUMNS, rows, setting={"recipe": recipe.model_dump(mode="json")})


if __name__ == "__main__":
    main()
