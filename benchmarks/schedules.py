"""The order of the dimensions and their shares of the ratio, one at a time: the ablation of the paper, on any model.

    python benchmarks/schedules.py --work runs/schedules [--ratio 0.2] [--wikitext wiki.test.raw]
        [--orders all] [--shares 44:52:4,100:0:0,...] [--of-orders 44:52:4]

Every cell walks the greedy path (blocks judged on all calibration sequences, widths on the first few) and prints
the loss on the text that judged, the loss on text that nothing was chosen by, and WikiText-2 perplexity. Paths share
every loss that they have in common. A cell that is in ``--work`` is not computed again; the command can be interrupted
at any time and goes on. Writes ``table.md`` and ``schedules.png``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from plans import Cell, judged, number, parser_of, settings_of, write_table
from results import line, markdown, record

from multipruner.console.quiet import quiet_libraries
from multipruner.core.errors import InfeasibleError
from multipruner.engine.processes import Team
from multipruner.jobs.search.options import SearchOptions
from multipruner.jobs.search.schedules import FULL, ScheduleEngine
from multipruner.jobs.setting import Found
from multipruner.report.figures.drawing import BLUE, GRID, drawing
from multipruner.search import DIMENSIONS
from multipruner.search.schedule import Schedule

SHARES = "100:0:0,80:20:0,60:40:0,44:52:4,40:60:0,20:80:0,0:100:0,0:90:10"
COLUMNS = (("order", "{}"), ("blocks:mlp:heads", "{}:{}:{}"), ("removed", "{:.2%}"), ("loss, search text", "{:.4f}"),
           ("loss, unseen text", "{:.4f}"), ("WikiText-2", "{:.2f}"), ("minutes", "{:.1f}"))  # fmt: skip


def schedules(typed: Any, group: int, importance: str, repair: bool) -> list[tuple[str, Schedule]]:
    """(panel, schedule) for every line of the table."""

    def schedule(order: Sequence[Any], shares: str) -> Schedule:
        return Schedule(tuple(order), tuple(int(part) for part in shares.split(":")), group, importance, repair)

    orders = permutations(DIMENSIONS) if typed.orders == "all" else [tuple(typed.orders.split(","))]
    found = [("order", schedule(order, typed.of_orders)) for order in orders]
    return found + [("shares", schedule(DIMENSIONS, shares)) for shares in typed.shares.split(",")]


def cell(engine: ScheduleEngine, schedule: Schedule, typed: Any) -> dict[str, Any]:
    """One schedule's plan, from disk when it is there."""
    name = f"{'-'.join(schedule.order)}-{'-'.join(map(str, schedule.shares))}"
    kept = Cell(typed.work / f"{name}.json")
    if kept.done is not None:
        return kept.done
    engine.on_loss(kept.tick)
    kept.start(lambda: engine.work.token_layers)
    own = {"order": list(schedule.order), "shares": list(schedule.shares)}
    try:
        structure, steps = engine.path(schedule, FULL)
    except InfeasibleError as error:
        return kept.write({**own, "impossible": str(error)})
    seconds, token_layers = kept.spent()
    losses = engine.all_losses(schedule)
    found = Found(structure, losses["calibration"], 0.0, {}, steps)
    result = judged(engine.setting, found, typed.wikitext, typed.max_tokens)
    return kept.write({**own, "losses": losses, **result, "seconds": seconds, "token_layers": token_layers})


def cells(row: dict[str, Any]) -> list[Any]:
    """One row of the table."""
    schedule = [" → ".join(row["order"]), row["shares"]]
    if "impossible" in row:
        return [*schedule, "out of reach", None, None, None, None]
    losses = (row["losses"]["calibration"], row["losses"]["held_out"])
    return [*schedule, row["ratio"], *losses, number(row), row["seconds"] / 60]


def figure(rows: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Loss on unseen text, a panel for the orders and one for the shares."""
    possible = [(panel, row) for panel, row in rows if "losses" in row]
    labels = {"order": lambda row: " → ".join(row["order"]), "shares": lambda row: ":".join(map(str, row["shares"]))}
    titles = {"order": "order", "shares": "blocks:mlp:heads"}

    def panel_of(axes: Axes, panel: str) -> None:
        mine = [row for name, row in possible if name == panel]
        names = [labels[panel](row) for row in mine]
        values = [row["losses"]["held_out"] for row in mine]
        axes.plot(values, range(len(mine)), "o", color=BLUE)
        for place, row in enumerate(mine):
            axes.annotate(f"{values[place]:.3f} at {row['ratio']:.1%}", (values[place], place), xytext=(0, 5),
                          textcoords="offset points", ha="center", fontsize=7)  # fmt: skip
        axes.set_yticks(range(len(mine)), names)
        axes.set_ylim(len(mine) - 0.4, -0.7)
        axes.margins(x=0.18)
        axes.set_title(titles[panel])
        axes.set_xlabel("loss on unseen text, nats")
        axes.grid(axis="x", color=GRID)

    def paint(width: float) -> Figure:
        sheet = Figure(figsize=(width, 0.4 * width), layout="constrained")
        for axes, panel in zip(sheet.subplots(1, 2), titles, strict=True):
            panel_of(axes, panel)
        return sheet

    table = [(labels["order"](row), labels["shares"](row), row["losses"]["held_out"]) for _, row in possible]
    picture = drawing(
        paint, name="schedules", title="Stages and shares of the greedy path", caption="", alt="",
        columns=("order", "shares", "loss"), rows=table,
    )  # fmt: skip
    path.write_bytes(picture.png)


def main() -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--ratio", type=float, default=0.2)
    parser.add_argument("--orders", default="all", help="all six, or one such as blocks,mlp,heads")
    parser.add_argument("--of-orders", default="44:52:4", help="shares while the order changes")
    parser.set_defaults(shares=SHARES)
    typed = parser.parse_args()
    own = ("work", "wikitext", "max_tokens", "ratio", "orders", "of_orders", "shares", "record")
    flags = {name: value for name, value in vars(typed).items() if name not in own}
    quiet_libraries()
    typed.work.mkdir(parents=True, exist_ok=True)
    setting = settings_of(flags, [typed.ratio])[typed.ratio]
    engine = ScheduleEngine(setting, SearchOptions(genome="schedule"), Team())
    recipe, rows = setting.recipe, []
    for panel, schedule in schedules(typed, recipe.channel_group, recipe.importance, recipe.repair != "none"):
        rows.append((panel, cell(engine, schedule, typed)))
        print(line(COLUMNS, cells(rows[-1][1])), flush=True)
    table = [cells(row) for _, row in rows]
    write_table(typed.work / "table.md", markdown(COLUMNS, table))
    record(typed.record, "schedules", COLUMNS, table, setting={"recipe": recipe.model_dump(mode="json")})
    figure(rows, typed.work / "schedules.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
