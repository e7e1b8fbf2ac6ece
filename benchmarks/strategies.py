"""The exact program against the greedy path at equal budgets: what each loses, before and after the last repair.

    python benchmarks/strategies.py --work runs/strategies [--table table.json] [--wikitext wiki.test.raw]

Both see the same calibration text, objective, order and repair; the model is loaded once. Budgets are ratios of the
parameters and, with a table of ``multipruner latency``, shares of the dense latency by that table. The greedy path
knows a ratio only: it is walked to the first structure that keeps the budget, and aimed further until there is one.
Every ratio has a path of its own; latencies share one, which ``--one-path`` does with all budgets (much cheaper, and
worse for the looser ones, whose path has spent more of its share on whole blocks).

Losses are in nats by the recipe's objective, on the calibration text and on as much held-out text of the same source
that nothing saw; "repaired" is after the repair of all blocks and the last norm, whether or not a run would take it.
Seconds and token-layers are those of all structures that a search asks for, as if it ran alone, and of the solver; a
real greedy run saves the part of the output head of candidates that it gives up early. Every loss and every cell is
kept in ``--work``: the same command goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metered import Bill, Metered
from plans import Cell, set_flag, settings_given
from results import flag, line, markdown, record
from rich.console import Console
from torch import Tensor

from multipruner.config.recipe import EvaluationSpec, Recipe
from multipruner.console.progress import counting_display, judging_display, search_display
from multipruner.console.quiet import quiet_libraries
from multipruner.core.errors import InfeasibleError, MultiprunerError
from multipruner.core.identity import digest
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Structure
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Outputs
from multipruner.eval import evaluate
from multipruner.jobs.finish import cut_model
from multipruner.jobs.last_repair import refitted
from multipruner.jobs.limits import latency_table_of
from multipruner.jobs.prepare import prepare
from multipruner.jobs.setting import Setting
from multipruner.jobs.sweep.path import first_within, judged_by, path_within, problem_to
from multipruner.recipes import mapping_for
from multipruner.search import Dimension, Limit, allocate, expected_candidates
from multipruner.sources.calibration import CalibrationSet, load_calibration

METHODS = ("program", "greedy")


class Bench:
    """The model, its text and its budgets."""

    def __init__(self, args: argparse.Namespace, recipe: Recipe, console: Console) -> None:
        self.args, self.console = args, console
        self.setting: Setting = prepare(recipe, console, {})
        prunable, spec = self.setting.prunable, recipe.calibration
        self.anatomy, self.bill = prunable.anatomy, Bill()
        self.table = latency_table_of(recipe, prunable) if recipe.latency_table else None
        text = self.setting.calibration
        held_out = load_calibration(spec, self.setting.tokenizer, prunable.model, split="heldout")
        with self._in_order():
            self.losses, self.width_losses = self._metered(text), self._metered(text.head(spec.width_sequences))
            self.judges = {"calibration": self._objective(text), "held_out": self._objective(held_out)}

    def _in_order(self) -> Any:
        return self.setting.prunable.in_order(self.setting.ranking, self.setting.search_repair)

    def _objective(self, text: CalibrationSet) -> CalibrationObjective:
        recipe = self.setting.recipe
        return CalibrationObjective(self.setting.prunable, text.ids, ignore_id=text.ignore_id,
                                    batch_size=recipe.calibration.batch_size, loss=recipe.objective)  # fmt: skip

    def _metered(self, text: CalibrationSet) -> Metered:
        space = digest({**self.setting.identity, "judged_on": text.hash})
        return Metered(self._objective(text), self.args.work / "losses.jsonl", space, self.bill)

    def _limits(self, budget: str) -> tuple[Limit, ...]:
        return replace(self.setting, recipe=with_budget(self.setting.recipe, budget)).task.limits

    def costs(self, structure: Structure) -> dict[str, float]:
        """What budgets can be of."""
        costs: dict[str, float] = {"parameters": self.setting.prunable.costs.parameters(structure)}
        if self.table is not None:
            costs["latency"] = self.table[0].milliseconds(structure, self.anatomy, self.table[1])
        return costs

    def find(self, method: str, budget: str) -> tuple[Structure, dict[str, Any]]:
        """The structure of one method under one budget, and what finding it took."""
        with self._in_order():
            if method == "greedy":
                return self._walked(budget)
            task = replace(self.setting, recipe=with_budget(self.setting.recipe, budget)).task
            with counting_display(self.console, "search") as display:
                found = allocate(task, self.losses, display)
            bill = self.bill.to_json()
            bill["seconds"] += sum(one.solver_seconds for one in found.rounds)
            return found.structure, {**bill, "rounds": [one.to_json() for one in found.rounds]}

    def _walked(self, budget: str) -> tuple[Structure, dict[str, Any]]:
        """The first structure that keeps a budget on the path that its group shares."""
        group = next(group for group in groups(self.args) if budget in group)
        aim = max(ratio_of(one) or 0.15 for one in group)
        problem = problem_to(self.setting, aim)
        expected: dict[Dimension, float] = dict(expected_candidates(problem).items())
        together = [limit for one in group for limit in self._limits(one)]
        with search_display(self.console, expected, aim) as display:
            judges = judged_by(self.losses, self.width_losses)
            steps = path_within(problem, judges, together, self.costs, display)
        structure = first_within(self.anatomy, steps or (), self._limits(budget), self.costs)
        if steps is None or structure is None:
            raise InfeasibleError(f"the greedy path does not get to {budget}; leave it out of the budgets")
        return structure, {**self.bill.to_json(), "steps": len(steps), "path_to": steps[-1].ratio}

    def judged(self, structure: Structure) -> dict[str, Any]:
        """Losses and perplexities, with the single repairs and with that of all blocks."""
        outputs: Outputs = {}
        gain: Tensor | None = None
        prunable, result = self.setting.prunable, dict[str, dict[str, Any]]()
        with self._in_order():
            result["plain"] = {name: judge(structure) for name, judge in self.judges.items()}
            if self.setting.repairs_all:
                began = time.perf_counter()
                with counting_display(self.console, "repair") as display:
                    outputs, gain = refitted(
                        self.setting, structure, lambda done, total: display("repair", done, total)
                    )
                with prunable.with_outputs(outputs, gain):
                    result["repaired"] = {name: judge(structure) for name, judge in self.judges.items()}
                result["repaired"]["seconds"] = time.perf_counter() - began
        if self.args.wikitext is not None:
            result["plain"]["wikitext2"] = self._perplexity(structure, {}, None)
            if "repaired" in result:
                result["repaired"]["wikitext2"] = self._perplexity(structure, outputs, gain)
        return result

    def _perplexity(self, structure: Structure, outputs: Outputs, gain: Tensor | None) -> dict[str, Any]:
        setting, args = self.setting, self.args
        plan = PruningPlan.from_structure(structure, setting.ranking, self.anatomy, model=setting.source.name,
                                          model_type=setting.prunable.spec.model_type)  # fmt: skip
        pruned = cut_model(setting, plan, outputs, gain)
        spec = EvaluationSpec(text=str(args.wikitext), length=args.eval_length, max_tokens=args.max_tokens)
        with judging_display(self.console, "pruned") as display:
            found = evaluate(pruned, setting.tokenizer, spec, progress=display)
        return next(iter(found.perplexities.values())).to_json()

    def cell(self, method: str, budget: str) -> dict[str, Any]:
        """One line of the table."""
        structure, taken = self.find(method, budget)
        costs, dense = self.costs(structure), self.costs(self.anatomy.dense)
        row = {"method": method, "budget": budget, "structure": structure.to_json(), "search": taken}
        row |= {"ratio": 1 - costs["parameters"] / dense["parameters"], **self.judged(structure)}
        if "latency" in costs:
            row |= {"latency_ms": costs["latency"], "dense_ms": dense["latency"]}
        return row


def ratio_of(budget: str) -> float | None:
    """The number of a ratio; none for a latency."""
    name, _, value = budget.partition("=")
    return float(value) if name == "ratio" else None


def with_budget(recipe: Recipe, budget: str) -> Recipe:
    """A recipe with just one budget."""
    plain = {**recipe.model_dump(), "ratio": ratio_of(budget), "budgets": {}, "latency_table": None}
    if plain["ratio"] is None:
        plain |= {"budgets": {"latency": budget.partition("=")[2]}, "latency_table": recipe.latency_table}
    return Recipe.build(plain)


def groups(args: argparse.Namespace) -> list[list[str]]:
    """Budgets that share a greedy path."""
    if args.one_path:
        return [list(args.budgets)]
    latencies = [budget for budget in args.budgets if ratio_of(budget) is None]
    return [*([budget] for budget in args.budgets if budget not in latencies), latencies]


def columns_of(cell: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Headings and formats: latencies and perplexities only where they were measured."""
    timed, judged, loss = "latency_ms" in cell, "wikitext2" in cell["plain"], "{:.4f}"
    latency = [("of the latency", "{:.3f}x")] if timed else []
    perplexity = [("WikiText-2", "{:.2f}"), ("repaired", "{:.2f}")] if judged else []
    names = ("calibration", "held out", "calibration, repaired", "held out, repaired")
    return [("budget", "{}"), ("method", "{}"), ("removed", "{:.2%}"), *latency, *((name, loss) for name in names),
            *perplexity, ("losses", "{:,}"), ("seconds", "{:,.0f}"), ("token-layers", "{:,.0f}")]  # fmt: skip


def row_of(cell: Mapping[str, Any]) -> list[Any]:
    """One row below these headings."""
    both, search = (cell["plain"], cell.get("repaired", {})), cell["search"]
    latency = [cell["latency_ms"] / cell["dense_ms"]] if "latency_ms" in cell else []
    losses = [of.get(name) for of in both for name in ("calibration", "held_out")]
    scores = [of["wikitext2"]["value"] if of else None for of in both] if "wikitext2" in both[0] else []
    work = (search["measured"], search["seconds"], search["token_layers"])
    return [cell["budget"], cell["method"], cell["ratio"], *latency, *losses, *scores, *work]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--work", type=Path, required=True, help="keeps losses and cells")
    parser.add_argument("--table", type=Path, help="of `python -m multipruner latency`, for the latencies")
    parser.add_argument("--ratios", default="0.1,0.2,0.3", help="may be empty")
    parser.add_argument("--latencies", default="0.8x,0.7x", help="shares of dense, with --table")
    parser.add_argument("--one-path", action="store_true", help="one greedy path for all budgets")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--wikitext", type=Path, help="a text for perplexity, such as the raw test split")
    parser.add_argument("--max-tokens", type=int, default=8 * 2048, help="of it")
    parser.add_argument("--eval-length", type=int, default=2048, help="tokens per sequence of it")
    set_flag(parser)
    flag(parser)
    args = parser.parse_args()
    args.budgets = [f"ratio={value}" for value in args.ratios.split(",") if value]
    if args.table is not None:
        args.budgets += [f"latency={value}" for value in args.latencies.split(",") if value]
    return args


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What all cells share; without a budget."""
    given = {"ratio": None, "budgets": {}, "latency_table": str(args.table) if args.table else None}
    return Recipe.build(mapping_for(args.model), settings_given(args.set), given)


def main() -> int:
    args = parsed()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    console, bench, cells = Console(stderr=True), None, []
    try:
        recipe = recipe_of(args)
        about = {**recipe.model_dump(mode="json"), "wikitext": str(args.wikitext), "max_tokens": args.max_tokens,
                 "eval_length": args.eval_length, "one_path": args.one_path}  # fmt: skip
        for budget in args.budgets:
            for method in args.methods.split(","):
                kept = Cell(args.work / f"{method}-{budget.replace('=', '-')}.json")
                known = kept.done or {}
                # other latencies in the group mean another path
                shared = next(group for group in groups(args) if budget in group)
                about["group"] = shared if method == "greedy" else None
                if known.get("about") != about:
                    bench = bench or Bench(args, recipe, console)
                    known = kept.write({"about": dict(about), **bench.cell(method, budget)})
                cells.append(known)
                console.print(line(columns_of(known), row_of(known)), markup=False, highlight=False, soft_wrap=True)
    except MultiprunerError as error:
        print(f"strategies: {error}", file=sys.stderr)
        return 2
    if cells:
        columns, rows = columns_of(cells[0]), [row_of(cell) for cell in cells]
        print(markdown(columns, rows))
        record(args.record, "strategies", columns, rows, setting={"recipe": recipe.model_dump(mode="json")})
    return 0


if __name__ == "__main__":
    sys.exit(main())
