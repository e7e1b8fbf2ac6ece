"""Latency tables: sums, interpolation, files, warnings, and how samples become entries. No torch."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import cycle, pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.commands import latency as command
from multipruner.core.errors import ConfigError, OutputError
from multipruner.core.latency.entries import PHASES
from multipruner.core.latency_table import Entry, LatencyTable, Workload, WorkloadTable, interpolate
from multipruner.core.structure import GONE, Anatomy, Size, Structure, total
from multipruner.latency.probe_journal import ProbeJournal, ProbeRecord, discard
from multipruner.latency.summarise import constant_rest, interquartile_mean, relative_iqr, slowness, summarise
from tests.support.layers import structure_of, uniform

SHAPES: dict[str, Any] = {
    "model_type": "llama", "hidden": 48, "head_dim": 16, "kv_groups": 4, "queries": 2, "channels": 64, "vocab_size": 97,
}  # fmt: skip
KINDS = ("attention", "mlp")
ENVIRONMENT = {"device": "cpu", "device_name": "a processor", "threads": 2, "dtype": "bfloat16", "cuda": None}
times = st.floats(0.001, 1e4, allow_nan=False)
workloads = st.builds(Workload, st.sampled_from(["prefill", "decode"]), st.integers(1, 64), st.integers(1, 10**6))
entries = st.builds(Entry, times, st.floats(0, 3), st.integers(1, 1000))


@st.composite
def tables(draw: st.DrawFn) -> LatencyTable:
    """Tables of 4 KV groups of 2 query heads and 64 channels: all KV groups, perhaps with one query head, some MLP
    widths."""
    rows = {}
    for workload in draw(st.lists(workloads, min_size=1, max_size=2, unique=True)):
        queries = draw(st.sampled_from([(2,), (1, 2)]))
        sizes: dict[str, list[Size]] = {
            "attention": [GONE, *((groups, each) for groups in range(1, 5) for each in queries)],
            "mlp": [GONE, *((width,) for width in sorted({64, *draw(st.sets(st.integers(1, 63), max_size=4))}))],
        }
        count = sum(map(len, sizes.values())) + 1
        measured = iter(draw(st.lists(entries, min_size=count, max_size=count)))
        blocks = {kind: {size: next(measured) for size in options} for kind, options in sizes.items()}
        rows[workload.name] = WorkloadTable(workload, blocks, next(measured), draw(st.floats(0, 1)))
    return LatencyTable(SHAPES, ENVIRONMENT, "2026-01-02T03:04:05+00:00", rows)


layers = st.builds(
    lambda groups, each, channels: (groups * each, groups, channels),
    st.integers(0, 4), st.integers(1, 2), st.integers(0, 64),
)  # fmt: skip
stacks = st.lists(layers, max_size=5)


def anatomy_of(structure: Structure) -> Anatomy:
    """The dense model of 4 KV groups of 2 query heads and 64 channels, as deep as a structure."""
    return uniform(len(structure) // 2, 8, 4, 64)


def milliseconds(table: LatencyTable, structure: Structure, workload: str) -> float:
    return table.milliseconds(structure, anatomy_of(structure), workload)


def a_table() -> LatencyTable:
    mlp: dict[Size, float] = {GONE: 0.1, (16,): 1.0, (32,): 2.0, (64,): 5.0}
    attention: dict[Size, float] = {GONE: 0.1, **{(groups, 2): 0.5 * groups + 0.1 for groups in range(1, 5)}}
    blocks = {
        kind: {size: Entry(value, 0.02, 9) for size, value in times.items()}
        for kind, times in (("attention", attention), ("mlp", mlp))
    }
    row = WorkloadTable(Workload("decode", 1, 256), blocks, Entry(3.0, 0.01, 9))
    return LatencyTable(SHAPES, ENVIRONMENT, "2026-01-02", {row.workload.name: row})


@settings(max_examples=40)
@given(tables(), stacks)
def test_a_structure_takes_the_constant_and_its_layers(table: LatencyTable, stack: list[tuple[int, ...]]) -> None:
    structure = structure_of(*stack)
    for name in table.workloads:
        time = table.constant(name)
        for attention, mlp in zip(structure.blocks[::2], structure.blocks[1::2], strict=True):
            if attention or mlp:
                time += table.block_milliseconds("attention", attention, name)
                time += table.block_milliseconds("mlp", mlp, name)
        assert milliseconds(table, structure, name) == pytest.approx(time, rel=1e-12)


@settings(max_examples=40)
@given(tables(), stacks, stacks)
def test_two_stacks_take_the_sum_of_both_with_one_constant(
    table: LatencyTable, a: list[tuple[int, ...]], b: list[tuple[int, ...]]
) -> None:
    for name in table.workloads:
        both, one, other = (milliseconds(table, structure_of(*rows), name) for rows in ([*a, *b], a, b))
        assert both == pytest.approx(one + other - table.constant(name), rel=1e-9)


def test_a_layer_without_blocks_costs_nothing() -> None:
    table = a_table()
    assert milliseconds(table, uniform(5, 8, 4, 64).empty, "decode-b1-t256") == 3.0
    one = structure_of((0, 0, 0), (2, 1, 0))
    assert milliseconds(table, one, "decode-b1-t256") == pytest.approx(3.0 + 0.6 + 0.1)


@settings(max_examples=40)
@given(tables())
def test_json_gives_the_same_table_back(table: LatencyTable) -> None:
    again = LatencyTable.from_json(table.to_json())
    assert again == table
    assert again.to_json() == table.to_json()
    assert json.loads(table.to_json())["version"] == 2


@settings(max_examples=40)
@given(tables())
def test_tables_of_version_1_are_the_same_table(table: LatencyTable) -> None:
    """Written out by hand as version 1 wrote it: widths are KV groups, whole, or channels; 0 for none."""
    names = {"hidden": "hidden_size", "queries": "queries_per_kv", "kv_groups": "kv_heads"}
    whole, workloads = {}, []
    for name, row in table.rows.items():
        blocks = {kind: {s: e for s, e in row.blocks[kind].items() if s[1:] != (1,)} for kind in KINDS}
        whole[name] = WorkloadTable(row.workload, blocks, row.constant, row.check)
        listed = {
            kind: [{"width": size[0] if size else 0, **asdict(entry)} for size, entry in blocks[kind].items()]
            for kind in KINDS
        }
        workloads.append({**asdict(row.workload), **listed, "constant": asdict(row.constant),
                          "interpolation_error": row.check})  # fmt: skip
    record = {
        "format": "multipruner-latency", "version": 1, "shapes": {names.get(n, n): v for n, v in table.shapes.items()},
        "environment": table.environment, "date": table.date, "workloads": workloads,
    }  # fmt: skip
    assert LatencyTable.from_json(json.dumps(record)) == replace(table, rows=whole)


points = st.dictionaries(st.integers(1, 200), times, min_size=1)


@given(points, st.data())
def test_interpolation_stays_between_its_neighbours(known: dict[int, float], data: st.DataObject) -> None:
    width = data.draw(st.integers(1, max(known)))
    value = interpolate({(count,): time for count, time in known.items()}, (width,))
    if width in known:
        assert value == known[width]
        return
    above = min(w for w in known if w > width)
    below = max((w for w in known if w < width), default=above)
    assert min(known[below], known[above]) <= value <= max(known[below], known[above])


@given(st.sets(st.integers(1, 200), min_size=2), st.data())
def test_interpolation_of_rising_times_rises(widths: set[int], data: st.DataObject) -> None:
    values = sorted(data.draw(st.lists(times, min_size=len(widths), max_size=len(widths))))
    known: dict[Size, float] = dict(zip(((width,) for width in sorted(widths)), values, strict=True))
    curve = [interpolate(known, (width,)) for width in range(1, max(widths) + 1)]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(curve))


def test_interpolation_is_linear_and_never_reaches_towards_none() -> None:
    known: dict[Size, float] = {GONE: 0.0, (100,): 10.0, (200,): 30.0}
    assert interpolate(known, (150,)) == 20.0
    assert interpolate(known, (1,)) == 10.0, "a narrow block is launched as a wide one is"
    with pytest.raises(ConfigError, match="size 201 was not measured; measured: gone, 100, 200"):
        interpolate(known, (201,))
    for nothing in ({(5,): 1.0}, {}):
        with pytest.raises(ConfigError, match="size gone was not measured"):
            interpolate(nothing, GONE)
    with pytest.raises(ConfigError, match=r"size 3 was not measured; measured: gone$"):
        interpolate({GONE: 1.0}, (3,))


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[int], list[int], dict[Size, float]]:
    """Counts along two axes, and a time of every pair."""
    first, second = (sorted(draw(st.sets(st.integers(1, most), min_size=1, max_size=4))) for most in (12, 8))
    pairs = list(product(first, second))
    values = draw(st.lists(times, min_size=len(pairs), max_size=len(pairs)))
    return first, second, dict(zip(pairs, values, strict=True))


def _around(counts: list[int], count: int) -> tuple[int, int]:
    """The measured counts next to one, from both sides; below the least, that one."""
    above = min(c for c in counts if c >= count)
    return max((c for c in counts if c <= count), default=above), above


@given(grids(), st.data())
def test_interpolation_on_two_axes_stays_between_the_corners(
    grid: tuple[list[int], list[int], dict[Size, float]], data: st.DataObject
) -> None:
    first, second, known = grid
    size = data.draw(st.integers(1, max(first))), data.draw(st.integers(1, max(second)))
    value, corners = interpolate(known, size), product(_around(first, size[0]), _around(second, size[1]))
    around = [known[corner] for corner in corners]
    assert min(around) <= value <= max(around)
    if size in known:
        assert value == known[size]
    if size[0] in first:  # on a line of the grid it is the interpolation along that line
        line: dict[Size, float] = {(count,): known[size[0], count] for count in second}
        assert value == interpolate(line, size[1:])
    if size[1] in second:
        line = {(count,): known[count, size[1]] for count in first}
        assert value == interpolate(line, size[:1])
    assert interpolate({**known, GONE: 0.0}, size) == value, "a removed block is no neighbour"
    for beyond in ((max(first) + 1, size[1]), (size[0], max(second) + 1)):
        with pytest.raises(ConfigError, match=f"size {beyond[0]} x {beyond[1]} was not measured"):
            interpolate(known, beyond)


@given(grids(), times, st.floats(0, 100), st.floats(0, 100), st.floats(0, 10), st.data())
def test_interpolation_on_two_axes_is_exact_where_times_are_linear_in_each(
    grid: tuple[list[int], list[int], dict[Size, float]], base: float, a: float, b: float, both: float,
    data: st.DataObject,
) -> None:  # fmt: skip
    first, second, _ = grid

    def time(groups: int, queries: int) -> float:
        return base + a * groups + b * queries + both * groups * queries

    known: dict[Size, float] = {size: time(*size) for size in product(first, second)}
    size = data.draw(st.integers(min(first), max(first))), data.draw(st.integers(min(second), max(second)))
    assert interpolate(known, size) == pytest.approx(time(*size), rel=1e-9)


def test_questions_beyond_the_table_are_errors() -> None:
    table = a_table()
    with pytest.raises(ConfigError, match="did you mean 'decode-b1-t256'"):
        table.constant("decode-b1-t265")
    for size in ((5, 2), (1, 3)):
        with pytest.raises(ConfigError, match=rf"size {size[0]} x {size[1]} was not measured; measured: gone, 1 x 2"):
            table.block_milliseconds("attention", size, "decode-b1-t256")
    assert table.block_milliseconds("attention", (1, 1), "decode-b1-t256") == 0.6, "below the least, that one's time"
    with pytest.raises(ConfigError, match="size 65"):
        table.block_milliseconds("mlp", (65,), "decode-b1-t256")
    with pytest.raises(ConfigError, match="measured: none"):
        table.block_milliseconds("mixer", (1,), "decode-b1-t256")


def test_another_machine_is_named() -> None:
    table = a_table()
    assert table.warning(ENVIRONMENT) is None
    warning = table.warning({**ENVIRONMENT, "threads": 8, "device_name": "another"})
    assert warning is not None
    assert "threads: 2 -> 8" in warning
    assert "a processor -> another" in warning


def test_another_model_is_refused() -> None:
    table = a_table()
    table.check_shapes(SHAPES)
    with pytest.raises(ConfigError, match="hidden: 48 -> 64"):
        table.check_shapes({**SHAPES, "hidden": 64})


@given(st.sampled_from([*PHASES, "train"]), st.integers(-1, 2), st.integers(-1, 2))
def test_workloads_are_checked(phase: Any, batch: int, tokens: int) -> None:
    made = {"phase": phase, "batch": batch, "tokens": tokens}
    if phase == "train" or batch < 1 or tokens < 1:
        with pytest.raises(ConfigError):
            Workload(**made)
    else:
        assert Workload(**made).name == f"{phase}-b{batch}-{PHASES[phase]}{tokens}"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "multipruner-latency", "version": 99}', "null"])
def test_other_files_are_no_tables(tmp_path: Path, text: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"no latency table|not a latency table"):
        LatencyTable.read(path)
    with pytest.raises(ConfigError, match="No such file"):
        LatencyTable.read(tmp_path / "missing.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.001, "1.0"])
@settings(max_examples=5)
@given(table=tables())
def test_a_time_that_is_none_makes_no_table(table: LatencyTable, value: Any) -> None:
    record = json.loads(table.to_json())
    for row in record["workloads"]:
        row["constant"]["milliseconds"] = value
    with pytest.raises(ConfigError, match="not a latency table"):
        LatencyTable.from_json(json.dumps(record))


@given(st.lists(times, min_size=1, max_size=40), st.floats(1.0, 1e6))
def test_one_disturbed_sample_in_five_hardly_matters(values: list[float], wild: float) -> None:
    mean = interquartile_mean(values)
    assert min(values) * (1 - 1e-9) <= mean <= max(values) * (1 + 1e-9)
    assert relative_iqr([2.0] * len(values)) == 0
    assert interquartile_mean([*[1.0] * 4, wild]) == 1.0


living = st.lists(layers.filter(any), min_size=1, max_size=6)


def _units(kind: str, size: Size) -> int:
    """Query heads or channels."""
    return total(kind, size, "queries" if kind == "attention" else "channels")


@given(st.lists(living, min_size=1, max_size=4), st.floats(0.0, 50.0), st.floats(0.0, 0.01))
def test_entries_recover_what_the_samples_were_made_of(
    probes: list[list[tuple[int, ...]]], constant: float, mark: float
) -> None:
    """Blocks that take 1 + width, a constant, and marks that take time themselves."""
    records = []
    for number, rows in enumerate(probes):
        true = [1.0 + units for heads, _, channels in rows for units in (heads, channels)]
        plain = constant + sum(true)
        marked = plain + mark * (len(true) + 1)
        shown = [value + mark for value in true]
        stack = structure_of(*rows)
        records.append(ProbeRecord("w", 0, number, stack, [plain] * 3, [marked] * 3, [shown] * 3))
    found = summarise(records, KINDS * 7)
    shown = {(kind, size) for record in records for kind, size in zip(cycle(KINDS), record.sizes, strict=False)}
    assert {(kind, size) for kind, table in found.items() for size in table} == shown
    for kind, table in found.items():
        for size, entry in table.items():
            assert entry.milliseconds == pytest.approx(1.0 + _units(kind, size), abs=1e-6)
            assert entry.spread == pytest.approx(0.0, abs=1e-9)
    assert constant_rest(records, found, KINDS * 7).milliseconds == pytest.approx(constant, abs=1e-6)


@settings(max_examples=30)
@given(st.lists(st.floats(0.5, 2.0), min_size=3, max_size=7))
def test_a_machine_that_slows_down_is_allowed_for(factors: list[float]) -> None:
    """Every probe shows the full width and one of its own; whatever the speeds, their proportions are found."""
    records = []
    for number, factor in enumerate(factors):
        widths = [(4, 64), (2, number + 1), (4, 64)]
        true = [1.0 + width for pair in widths for width in pair]
        samples = [factor * value for value in true]
        stack = structure_of(*((2 * groups, groups, channels) for groups, channels in widths))
        records.append(ProbeRecord("w", 0, number, stack, [sum(samples)], [sum(samples)], [samples]))
    middle = statistics.median(factors)
    assert slowness(records, KINDS * 7) == pytest.approx([factor / middle for factor in factors], rel=1e-6)
    found = summarise(records, KINDS * 7)
    for (width,), entry in found["mlp"].items():
        assert entry.milliseconds == pytest.approx(middle * (1.0 + width), rel=1e-6)
    assert constant_rest(records, found, KINDS * 7).milliseconds == pytest.approx(0.0, abs=1e-3)


def a_record(number: int, value: float = 1.25) -> ProbeRecord:
    sizes = structure_of((2, 1, 8))
    return ProbeRecord("decode-b1-t256", 0, number, sizes, [value], [value], [[0.5, 0.25]])


def test_a_journal_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "table.json.partial"
    with ProbeJournal(path, {"threads": 2}) as journal:
        for number in range(3):
            journal.add(a_record(number))
    path.write_bytes(path.read_bytes()[:-20])
    with ProbeJournal(path, {"threads": 2}) as journal:
        sizes = a_record(0).sizes
        assert journal.find("decode-b1-t256", sizes, 0, 1) == a_record(1)
        assert journal.find("decode-b1-t256", sizes, 0, 2) is None
        assert journal.find("decode-b1-t256", Structure(()), 0, 1) is None
        assert journal.find("prefill-b1-t1", sizes, 0, 1) is None
        with pytest.raises(OutputError, match="another process"), ProbeJournal(path, {"threads": 2}):
            pass
        journal.add(a_record(2))
    assert [json.loads(line).get("number") for line in path.read_text().splitlines()] == [None, 0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_journal_of_another_measurement_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json.partial"
    with ProbeJournal(path, {"threads": 2}) as journal:
        journal.add(a_record(0))
    with pytest.raises(OutputError, match="threads: 2 -> 4"), ProbeJournal(path, {"threads": 4}):
        pass
    path.write_text("something else\n")
    with pytest.raises(OutputError, match="no latency measurement"), ProbeJournal(path, {"threads": 2}):
        pass


def test_a_disturbed_probe_is_told_from_a_calm_one() -> None:
    sizes = structure_of((2, 1, 8))
    calm = ProbeRecord("w", 0, 0, sizes, [10.0, 10.5, 30.0], [], [])
    disturbed = ProbeRecord("w", 0, 0, sizes, [10.0, 900.0, 1000.0], [], [])
    assert calm.calm
    assert not disturbed.calm


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", ["prefill-b1-t512", "decode-b1-t256"]),
        ("--phase prefill --prompt 128 --prompt 512 --prompt 128", ["prefill-b1-t128", "prefill-b1-t512"]),
        ("--phase decode --batch 4 --cached 100", ["decode-b4-t100"]),
        ("--phase decode --prompt 512 --generate 128", ["decode-b1-t576"]),
        ("--phase prefill --batch 1 --batch 8 --prompt 64", ["prefill-b1-t64", "prefill-b8-t64"]),
    ],
)
def test_flags_name_workloads(flags: str, names: list[str]) -> None:
    typed = command.make_parser().parse_args(["--model", "llama", "--output", "t.json", *flags.split()])
    assert [workload.name for workload in command.workloads_of(typed)] == names


@pytest.mark.parametrize("flags", ["--batch 0", "--phase decode --generate 0", "--phase decode --cached 0"])
def test_numbers_below_one_are_refused(flags: str) -> None:
    with pytest.raises(ConfigError):
        command.run(["--model", "llama", "--output", "t.json", *flags.split()])


def test_a_table_that_is_there_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text("precious")
    with pytest.raises(OutputError, match="--overwrite"):
        command.run(["--model", "llama", "--output", str(path)])
    assert path.read_text() == "precious"


def test_what_another_process_measures_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "table.json.partial"
    with ProbeJournal(path, {"a": 1}):
        with pytest.raises(OutputError, match="another process"):
            discard(path)
        assert path.exists()
    discard(path)
    discard(path)
    assert list(tmp_path.iterdir()) == []


def test_tables_need_no_torch() -> None:
    code = (
        "import sys, multipruner.core.latency_table, multipruner.latency.summarise, multipruner.commands.latency as c\n"
        "c.make_parser().format_help()\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
