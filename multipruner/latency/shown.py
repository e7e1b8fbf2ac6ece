"""A latency table on the screen."""

from __future__ import annotations

from statistics import median

from rich.table import Table

from multipruner.core.axes import BLOCK_KINDS
from multipruner.core.latency_table import USUAL, LatencyTable
from multipruner.core.structure import Anatomy, Structure


def spread_of(table: LatencyTable) -> float:
    """Return the median spread of blocks in the workload, and at the hidden size, where it is largest."""
    return max(_spread(table, name, hidden) for name in table.workloads for hidden in table.hidden_sizes)


def _spread(table: LatencyTable, name: str, hidden: int) -> float:
    """Return the median spread of a workload's blocks; those of removed ones take too little to tell."""
    row = table.row(name, hidden)
    return median(entry.spread for entries in row.blocks.values() for size, entry in entries.items() if size)


def summary(table: LatencyTable, anatomy: Anatomy) -> Table:
    """Return what the table predicts of a dense model, and the entries of its first blocks, of every workload and
    hidden size.

    Args:
        table: of the model.
        anatomy: its blocks.
    """
    environment, sizes = table.environment, table.hidden_sizes
    threads = f", {environment['threads']} threads" if environment["device"] == "cpu" else ""
    title = f"milliseconds on {environment['device_name']}{threads}, {environment['dtype']}"
    title += f", in {table.runtime}" if table.runtime != USUAL else ""
    view = Table(title=title, title_justify="left")
    kinds = [BLOCK_KINDS[kind].label for kind in anatomy.kinds]
    stream = ["hidden size"] if len(sizes) > 1 else []
    for column in ("workload", *stream, "dense", "constant", *kinds, "spread"):
        view.add_column(column, justify="left" if column == "workload" else "right")
    first = [anatomy[anatomy.of_kind(kind)[0]] for kind in anatomy.kinds]
    for name in table.workloads:
        for hidden in sizes:
            blocks = [table.block_milliseconds(place.kind, place.dense, name, hidden) for place in first]
            whole = table.milliseconds(Structure(anatomy.dense.blocks, hidden), anatomy, name)
            numbers = (f"{number:.3f}" for number in (whole, table.constant(name, hidden), *blocks))
            said = [str(hidden)] if stream else []
            view.add_row(name, *said, *numbers, f"{100 * _spread(table, name, hidden):.0f}%")
    return view
