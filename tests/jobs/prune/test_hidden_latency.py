"""The hidden size under a latency budget: one exact program per hidden size, each with that size's milliseconds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import product
from math import inf, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import multipruner
from multipruner import Recipe
from multipruner.commands.main import main
from multipruner.core.errors import InfeasibleError
from multipruner.core.latency_table import Entry, LatencyTable, Workload, WorkloadTable
from multipruner.core.structure import GONE, Anatomy, Size
from multipruner.engine.prunable import Prunable, Wider
from multipruner.jobs.limits import limits_of
from multipruner.jobs.prune import program
from multipruner.jobs.prune.given_plan import apply_given_plan
from multipruner.latency.bench import shapes_of
from multipruner.search import allocation
from multipruner.search.program import solve
from tests.support.commands import arguments, finished
from tests.support.tiny import tiny_model

OPTIONS: dict[str, list[Size]] = {"attention": [GONE, (1, 2), (2, 2)], "mlp": [GONE, (16,), (40,)]}
WORK = Workload("prefill", 1, 16)
Losses = Mapping[int, Mapping[Size, float]]
Asked = list[tuple[int, Losses, Any, Any]]
times = st.floats(0.01, 10)


@cache
def _small() -> Prunable:
    return Prunable.of(tiny_model("llama", layers=2))


def _narrower(hidden: int) -> Prunable:
    whole = _small()
    return whole if hidden == 48 else Prunable.narrower(whole.model, Wider(whole, torch.arange(hidden)))


def _row(
    milliseconds: Mapping[str, Mapping[Size, float]], constant: float, work: Workload = WORK
) -> dict[str, WorkloadTable]:
    blocks = {kind: {size: Entry(ms, 0.0, 1) for size, ms in rows.items()} for kind, rows in milliseconds.items()}
    return {work.name: WorkloadTable(work, blocks, Entry(constant, 0.0, 1))}


def _least(
    losses: Losses, anatomy: Anatomy, block: Mapping[str, Mapping[Size, float]], constant: float, budget: float
) -> tuple[float, float]:
    """The least sum of losses within a budget, and the least milliseconds of any structure, by trying all."""
    best, quickest, kinds = inf, inf, [place.kind for place in anatomy]
    for sizes in product(*(losses[number] for number in range(len(anatomy)))):
        if {kind for kind, size in zip(kinds, sizes, strict=True) if size} != set(kinds):
            continue  # one block of each kind stays
        takes = constant + sum(block[kind][size] for kind, size in zip(kinds, sizes, strict=True))
        quickest = min(quickest, takes)
        if takes <= budget:
            best = min(best, sum(losses[number][size] for number, size in enumerate(sizes)))
    return best, quickest


@settings(max_examples=40, deadline=None)
@given(st.data(), st.floats(0.2, 1.0))
def test_the_programs_of_all_hidden_sizes_are_what_trying_everything_finds(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, share: float
) -> None:
    anatomy, sizes = _small().anatomy, (48, 32, 16)
    takes = {h: {kind: {size: data.draw(times) for size in rows} for kind, rows in OPTIONS.items()} for h in sizes}
    constants = {hidden: data.draw(times) for hidden in sizes}
    rows = {hidden: _row(takes[hidden], constants[hidden]) for hidden in sizes}
    table = LatencyTable(shapes_of(_small().model), {}, "2026", rows.pop(48), rows)
    path = tmp_path_factory.mktemp("tables") / "table.json"
    path.write_text(table.to_json())
    budgets = {"latency": f"{share}x"}
    recipe = Recipe.build({"model": "m", "ratio": None, "budgets": budgets, "latency_table": str(path)})
    whole = constants[48] + sum(takes[48][place.kind][place.dense] for place in anatomy)
    for hidden in sizes:
        places = enumerate(anatomy)
        losses = {n: {size: data.draw(st.floats(0, 1)) for size in OPTIONS[place.kind]} for n, place in places}
        limits = limits_of(recipe, _narrower(hidden))
        assert limits[0].limit == pytest.approx(share * whole), "a share of the dense model, whatever the hidden size"
        best, quickest = _least(losses, anatomy, takes[hidden], constants[hidden], share * whole)
        if abs(quickest - share * whole) < 1e-6:
            continue  # rounding decides
        try:
            found = solve(losses, limits, anatomy)
        except InfeasibleError as error:
            assert best == inf and error.nearest == pytest.approx(quickest, rel=1e-6)
        else:
            loose, _ = _least(losses, anatomy, takes[hidden], constants[hidden], share * whole * (1 + 1e-7))
            assert loose - 1e-6 <= found.predicted <= best + 1e-6
            assert limits[0].cost(found.structure) <= share * whole * (1 + 1e-6)


def _milliseconds(hidden: int, size: Size) -> float:
    """Milliseconds of a machine that multiplies and does nothing else."""
    return 0.01 + hidden * prod(size or (0,)) * (8 if len(size) == 2 else 1) / 1000


def _written(path: Path, constants: Mapping[int, float]) -> Path:
    """Write a table of the model of ``dense``, of prompts and of decoding, at the hidden sizes of these constants."""
    sizes: dict[str, list[Size]] = {
        "attention": [GONE, *product((1, 2), (1, 2))],
        "mlp": [GONE, *((channels,) for channels in range(8, 48, 8))],
    }
    rows = {}
    for hidden, constant in constants.items():
        takes = {kind: {size: _milliseconds(hidden, size) for size in of} for kind, of in sizes.items()}
        works = Workload("prefill", 2, 16), Workload("decode", 2, 12)
        rows[hidden] = {work.name: row for work in works for row in _row(takes, constant, work).values()}
    shapes, own = shapes_of(tiny_model("llama", layers=4)), rows.pop(48)
    path.write_text(LatencyTable(shapes, {"device": "cpu"}, "2026", own, rows).to_json())
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of hidden sizes 48 and 32."""
    return _written(tmp_path_factory.mktemp("tables") / "table.json", {48: 2.0, 32: 1.5})


def _command(dense: Path, output: Path, table: Path, *more: str) -> list[str]:
    asked = arguments(dense, output, "--max-latency", "0.6x", "--latency-table", str(table), "--rounds", "0", *more)
    at = asked.index("--ratio")
    return [*asked[:at], *asked[at + 2 :]]


def _phase(report: Mapping[str, Any]) -> tuple[str, dict[str, float]]:
    ((name, phase),) = report["latency"]["phases"].items()
    return name, phase


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Every allocation of a run: hidden size, the losses that its last program was given, task and answer."""
    seen: Asked = []
    last: dict[str, Any] = {}
    real, solved = allocation.allocate, allocation.solve

    def solving(losses: Any, *rest: Any, **more: Any) -> Any:
        last["losses"] = {block: dict(rows) for block, rows in losses.items()}
        return solved(losses, *rest, **more)

    def allocating(task: Any, *rest: Any, **more: Any) -> Any:
        found = real(task, *rest, **more)
        seen.append((task.anatomy.constants["hidden"], last["losses"], task, found))
        return found

    monkeypatch.setattr(allocation, "solve", solving)
    monkeypatch.setattr(program, "allocate", allocating)
    yield seen


def test_every_hidden_size_has_its_program_and_the_least_measured_loss_is_taken(
    dense: Path, table: Path, tmp_path: Path, asked: Asked
) -> None:
    assert main(_command(dense, tmp_path / "auto", table, "--hidden-size", "auto")) == 0
    report, plan = finished(tmp_path / "auto")
    assert [hidden for hidden, *_ in asked] == [48, 32]
    known, least = LatencyTable.read(table), {}
    whole = known.milliseconds(plan.dense, plan.anatomy, "prefill-b2-t16")
    for hidden, losses, task, found in asked:
        sizes = {kind: {GONE, *_of_kind(losses, task.anatomy, kind)} for kind in task.anatomy.kinds}
        block = {kind: {size: _milliseconds(hidden, size) for size in rows} for kind, rows in sizes.items()}
        least[hidden], _ = _least(losses, task.anatomy, block, {48: 2.0, 32: 1.5}[hidden], 0.6 * whole)
        least[hidden] += found.dense_loss
        assert found.rounds[0].predicted == pytest.approx(least[hidden], abs=1e-6)
    predicted = {int(size): loss for size, loss in report["search"]["hidden_sizes_predicted"].items()}
    assert predicted == pytest.approx(least, abs=1e-6)
    measured = {int(size): loss for size, loss in report["search"]["hidden_sizes"].items()}
    assert measured == pytest.approx({hidden: found.loss for hidden, *_, found in asked}, abs=1e-6)
    assert (plan.structure.hidden or 48) == min(measured, key=lambda hidden: measured[hidden])
    name, phase = _phase(report)
    assert name == "prefill-b2-t16" and phase["predicted_dense_ms"] == whole
    assert phase["predicted_ms"] == known.milliseconds(plan.structure, plan.anatomy, name) <= 0.6 * whole * (1 + 1e-9)
    assert phase["measured_ms"] > 0


def _of_kind(losses: Losses, anatomy: Anatomy, kind: str) -> set[Size]:
    return {size for number in anatomy.of_kind(kind) for size in losses[number]}


def test_a_hidden_size_at_which_the_budget_cannot_be_kept_is_left_out(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Head and embeddings alone take more than the budget of decoding at 48 dimensions; rounds are made at the best."""
    other = _written(tmp_path / "table.json", {48: 100.0, 32: 1.0})
    run = ("--hidden-size", "auto", "--workload", "decode-b2-t12", "--rounds", "1")
    for size in ("auto", "32"):
        assert main(_command(dense, tmp_path / "dry", other, *run, "--hidden-size", size, "--dry-run")) == 0
    assert main(_command(dense, tmp_path / "wide", other, *run, "--hidden-size", "48")) == 2
    assert main(_command(dense, tmp_path / "narrow", other, *run)) == 0
    assert "hidden size 48: no structure keeps latency" in capsys.readouterr().out
    report, plan = finished(tmp_path / "narrow")
    assert plan.structure.hidden == 32 and list(report["search"]["hidden_sizes"]) == ["32"]
    assert [each["round"] for each in report["search"]["rounds"]] == [0, 1]
    name, phase = _phase(report)
    assert name == "decode-b2-t12" and phase["predicted_ms"] <= 0.6 * phase["predicted_dense_ms"] * (1 + 1e-9)
    assert main(_command(dense, tmp_path / "none", other, *run, "--max-latency", "0.0001x")) == 2
    said = capsys.readouterr().err
    assert "hidden size 32: no structure keeps latency" in said and "nearest" in said and said.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_from_measuring_to_a_folder(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command line alone, with the milliseconds of this machine."""
    path = tmp_path / "table.json"
    made = ["latency", "--model", str(dense), "--phase", "prefill", "--prompt", "16", "--channel-step", "40"]
    assert main([*made, "--hidden-sizes", "48,32", "--output", str(path)]) == 0
    assert main(_command(dense, tmp_path / "run", path, "--hidden-size", "auto", "--max-latency", "0.8x")) == 0
    report, plan = finished(tmp_path / "run")
    name, phase = _phase(report)
    known = LatencyTable.read(path)
    assert known.hidden_sizes == (48, 32) and name == "prefill-b1-t16"
    assert phase["predicted_ms"] == known.milliseconds(plan.structure, plan.anatomy, name)
    assert phase["predicted_ms"] <= 0.8 * phase["predicted_dense_ms"] * (1 + 1e-9)
    said = capsys.readouterr().out
    assert all(f"hidden size {hidden}: predicted" in said for hidden in report["search"]["hidden_sizes"])


def test_a_given_hidden_size_has_its_own_milliseconds(dense: Path, table: Path, tmp_path: Path) -> None:
    assert main(_command(dense, tmp_path / "fixed", table, "--hidden-size", "32")) == 0
    report, plan = finished(tmp_path / "fixed")
    known = LatencyTable.read(table)
    name, phase = _phase(report)
    assert plan.structure.hidden == 32
    assert phase["predicted_ms"] == known.milliseconds(plan.structure, plan.anatomy, name)
    assert phase["predicted_ms"] <= 0.6 * phase["predicted_dense_ms"] * (1 + 1e-9)
    expected = 1.5 + sum(
        _milliseconds(32, size)
        for place, size in zip(plan.anatomy, plan.structure, strict=True)
        if any(plan.structure[number] for number in plan.anatomy.of_layer(place.layer))
    )
    assert phase["predicted_ms"] == pytest.approx(expected)
    recipe = Recipe.build(report["recipe"])
    again = apply_given_plan(recipe, tmp_path / "fixed" / "plan.json", tmp_path / "again")
    assert _phase(again.report)[1]["predicted_ms"] == phase["predicted_ms"] and again.plan == plan


def test_other_hidden_sizes_in_a_table_change_nothing_for_runs_that_keep_theirs(
    dense: Path, table: Path, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.json"
    record = json.loads(table.read_text())
    del record["narrower"]
    alone.write_text(json.dumps(record))
    plans, phases = [], []
    for name, path in (("both", table), ("one", alone)):
        assert main(_command(dense, tmp_path / name, path)) == 0
        report, _ = finished(tmp_path / name)
        plans.append((tmp_path / name / "plan.json").read_bytes())
        phases.append({key: _phase(report)[1][key] for key in ("predicted_ms", "predicted_dense_ms")})
        assert "hidden_sizes" not in report["search"]
    assert plans[0] == plans[1] and phases[0] == phases[1]


@pytest.mark.parametrize(
    ("hidden", "alone", "expected"),
    [
        ("16", False, "no hidden size 16; it has 48, 32"),
        ("32", True, "no hidden size 32; it has 48 "),
        ("auto", True, "knows hidden size 48 alone"),
        ("40", False, "multiple of hidden_step"),
    ],
)
def test_hidden_sizes_that_a_table_does_not_hold_are_refused(
    hidden: str, alone: bool, expected: str, dense: Path, table: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, step = tmp_path / "table.json", "16" if hidden == "16" else "32"
    record = json.loads(table.read_text())
    path.write_text(json.dumps({key: value for key, value in record.items() if key != "narrower" or not alone}))
    capsys.readouterr()
    assert main(_command(dense, tmp_path / "out", path, "--hidden-size", hidden, "--hidden-step", step)) == 2
    said = capsys.readouterr().err
    assert expected in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_python_asks_for_it_too(dense: Path, table: Path, tmp_path: Path) -> None:
    text = str(dense / "text.txt")
    run = multipruner.prune(
        str(dense), output=tmp_path / "run", ratio=None, budgets={"latency": "0.6x"}, latency_table=str(table),
        hidden_size="auto", channel_group=8, rounds=0, evaluation={"text": text, "length": 64},
        calibration={"source": text, "sequences": 4, "length": 16, "moments_sequences": 12},
    )  # fmt: skip
    (phase,) = run.report["latency"]["phases"].values()
    assert phase["predicted_ms"] <= 0.6 * phase["predicted_dense_ms"] * (1 + 1e-9)
