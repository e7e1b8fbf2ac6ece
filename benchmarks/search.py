"""What evolution adds: the greedy plan, the exact program's, evolution's and random search's, all else equal.

    python benchmarks/search.py --work runs/search-benchmark --wikitext wiki.test.raw --calibration self
        [--ratios 0.2,0.3] [--population 24] [--generations 20] [--search-seeds 0,1]

Model, calibration text, importance and repair are the same for all plans (flags as for pruning). Printed are the
loss on the text that the searches look at, the loss on text that nothing was chosen by, WikiText-2 perplexity of the
finished model, and what it took. Evolution starts from the exact program's plan (its evaluations and minutes are not
counted again) or from nothing; random search gets as many evaluations. Every cell is one JSON file in ``--work``; the
command can be interrupted at any time and goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plans import Cell, judged, number, parser_of, settings_of, write_table
from results import markdown, record

from multipruner.console.quiet import quiet_libraries
from multipruner.core.structure import Structure
from multipruner.engine.processes import Team
from multipruner.jobs.remembered import RememberedObjective
from multipruner.jobs.search.files import evaluations, read_history, write_history
from multipruner.jobs.search.options import SearchOptions
from multipruner.jobs.search.structures import StructureEngine
from multipruner.jobs.search.walk import walk
from multipruner.jobs.setting import Found, Setting
from multipruner.report.figures.search import convergence
from multipruner.search import allocate
from multipruner.search.evolution import evolve, random_search
from multipruner.search.front import pick

COLUMNS = (("plan", "{}"), ("removed", "{:.2%}"), ("loss, search text", "{:.4f}"), ("loss, unseen text", "{:.4f}"),
           ("WikiText-2", "{:.2f}"), ("evaluations", "{}"), ("minutes", "{:.1f}"),
           ("token-layers, millions", "{:.2f}"))  # fmt: skip


@dataclass
class Bench:
    """One ratio: its engine, and where its cells are."""

    setting: Setting
    engine: StructureEngine
    work: Path
    typed: Any

    def cell(self, name: str, find: Callable[[Cell], tuple[Structure, list[int]]]) -> dict[str, Any]:
        """The result of one plan, from disk when it is there."""
        cell = Cell(self.work / f"{name.replace(' ', '-').replace(',', '')}.json")
        if cell.done is not None:
            return cell.done
        self.engine.on_loss(cell.tick)
        with self.engine.ready():
            cell.start(lambda: self.engine.work.token_layers)
            structure, count = find(cell)
            seconds, token_layers = cell.spent()
            losses = self.engine.all_losses(structure)
        found = Found(structure, losses["calibration"], 0.0, {})
        result = judged(self.setting, found, self.typed.wikitext, self.typed.max_tokens)
        spent = {"evaluations": count, "seconds": seconds, "token_layers": token_layers}
        return cell.write({"name": name, "losses": losses, **result, **spent})

    def remembering(self, sequences: int, cell: Cell) -> tuple[RememberedObjective, Any]:
        """Losses on the first sequences, on disk for this cell alone, so that what they took is counted."""
        place = self.engine.home
        if sequences < len(self.setting.calibration.ids):
            losses = type(self.engine.losses)(self.setting, [self.setting.calibration.head(sequences).ids], cell.tick)
            objective = losses.objective(0)
        else:
            objective = self.engine.losses.objective(place)
        memo = evaluations({**self.engine.identity, "cell": str(cell.path.resolve()), "sequences": sequences})
        return RememberedObjective(objective, memo, cell.tick), objective

    def greedy(self, cell: Cell) -> tuple[Structure, list[int]]:
        """The paper's path with this recipe's order, shares and losses."""
        spec = self.setting.recipe.calibration
        blocks, first = self.remembering(spec.sequences, cell)
        widths, second = self.remembering(spec.width_sequences, cell)
        cell.start(lambda: sum(each.work.token_layers for each in {id(o): o for o in (first, second)}.values()))
        structure, _ = walk(self.setting, self.setting.problem, blocks, widths)
        return structure, [len(memo) for memo in {m.namespace: m for m in (widths.memo, blocks.memo)}.values()]

    def program(self, cell: Cell) -> tuple[Structure, list[int]]:
        """Tables and the exact program."""
        objective, _ = self.remembering(self.setting.recipe.calibration.sequences, cell)
        return allocate(self.setting.task, objective).structure, [len(objective.memo)]

    def evolved(self, algorithm: Any, seeds: list[Structure], seed: int) -> Callable[[Cell], Any]:
        """A search; goes on where it was."""

        def find(cell: Cell) -> tuple[Structure, list[int]]:
            memo = evaluations({**self.engine.identity, "cell": str(cell.path.resolve())})
            state = cell.path.with_suffix(".state")
            settings = replace(self.engine.options.settings(self.engine.fidelities), seed=seed)

            def tell(history: Any) -> None:
                print(cell.path.stem, history[-1]["generation"], history[-1]["front"][0], flush=True)

            result = algorithm(
                self.engine.space, self.engine.evaluate, settings=settings, seeds=seeds, memo=memo, checkpoint=state,
                on_generation=tell,
            )  # fmt: skip
            write_history(cell.path.with_suffix(".jsonl"), {"format": "multipruner-search", "version": 1,
                                                            "identity": {}}, result.history)  # fmt: skip
            state.unlink(missing_ok=True)
            return pick(result.front, "best").candidate, list(result.scored)

        return find


def rows_of(bench: Bench, search_seeds: list[int]) -> list[dict[str, Any]]:
    """All cells of one ratio."""
    rows = [bench.cell("greedy", bench.greedy), bench.cell("exact program", bench.program)]
    start = [Structure.from_json(rows[1]["structure"])]
    for seed in search_seeds:
        rows.append(bench.cell(f"evolution, seed {seed}", bench.evolved(evolve, start, seed)))
        rows.append(bench.cell(f"evolution from nothing, seed {seed}", bench.evolved(evolve, [], seed)))
        rows.append(bench.cell(f"random search, seed {seed}", bench.evolved(random_search, [], seed)))
    seed = search_seeds[0]
    histories = {}
    for name, stem in (("evolution from the exact program", f"evolution-seed-{seed}"),
                       ("evolution from nothing", f"evolution-from-nothing-seed-{seed}"),
                       ("random search", f"random-search-seed-{seed}")):  # fmt: skip
        histories[name] = read_history(bench.work / f"{stem}.jsonl")[1]
    losses = {row["name"]: row["losses"]["calibration"] for row in rows[:2]}
    (bench.work / "convergence.png").write_bytes(convergence(histories, losses))
    return rows


def cells(row: dict[str, Any]) -> list[Any]:
    """One row of the table."""
    losses = (row["losses"]["calibration"], row["losses"]["held_out"])
    work = (" + ".join(map(str, row["evaluations"])), row["seconds"] / 60, row["token_layers"] / 1e6)
    return [row["name"], row["ratio"], *losses, number(row), *work]


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--ratios", default="0.2,0.3")
    parser.add_argument("--population", type=int, default=24)
    parser.add_argument("--generations", type=int, default=20)
    parser.add_argument("--screen", type=int, default=None)
    parser.add_argument("--search-seeds", default="0")
    typed = parser.parse_args()
    own = ("work", "wikitext", "max_tokens", "ratios", "population", "generations", "screen", "search_seeds", "record")
    flags = {name: value for name, value in vars(typed).items() if name not in own}
    quiet_libraries()
    ratios = [float(ratio) for ratio in typed.ratios.split(",")]
    typed.work.mkdir(parents=True, exist_ok=True)
    options = SearchOptions(population=typed.population, generations=typed.generations, screen=typed.screen)
    table: list[list[Any]] = []
    for ratio, setting in settings_of(flags, ratios).items():
        bench = Bench(setting, StructureEngine(setting, options, Team()), typed.work / f"{ratio:g}", typed)
        table += map(cells, rows_of(bench, [int(seed) for seed in typed.search_seeds.split(",")]))
    write_table(typed.work / "table.md", markdown(COLUMNS, table))
    record(typed.record, "search", COLUMNS, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
