"""What version 1 of every file holds is still read, and what keys it is found by has not changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from multipruner.core.identity import digest
from multipruner.core.latency_table import LatencyTable
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Structure
from multipruner.jobs.search.files import read_history
from multipruner.jobs.workspace import Workspace
from multipruner.latency.probe_journal import ProbeJournal, ProbeRecord
from multipruner.report.inputs import read_folders
from multipruner.search import Memo, Step, replay
from multipruner.search.step import read_trajectory
from tests.support.layers import layers_of

FILES = Path(__file__).parents[1] / "fixtures" / "v1"


def _lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (FILES / name).read_text().splitlines()]


def test_plans() -> None:
    text = (FILES / "plan.json").read_text()
    plan, record = PruningPlan.from_json(text), json.loads(text)
    now = json.loads(plan.to_json())
    assert (record["version"], now["version"]) == (1, 2)
    assert PruningPlan.from_json(plan.to_json()) == plan and now["base_model"] == record["base_model"]
    assert (plan.anatomy.layers, len(plan.structure)) == (2, 4)
    assert layers_of(plan.dense) == [tuple(row) for row in record["dense"]]
    for layer, row in enumerate(record["layers"]):
        attention, mlp = plan.kept(2 * layer), plan.kept(2 * layer + 1)
        each = plan.anatomy[2 * layer].dense[1]
        pairs: Any = zip(attention["kv_groups"], attention["queries"], strict=True)  # type: ignore[arg-type]
        heads = [group * each + query for group, inside in pairs for query in inside]
        assert _numbers(row["query_heads"]) == heads
        assert _numbers(row["kv_heads"]) == list(attention["kv_groups"])  # type: ignore[arg-type]
        assert _numbers(row["channels"]) == list(mlp["channels"])  # type: ignore[arg-type]


def _numbers(text: str) -> list[int]:
    ends = [run.partition("-")[::2] for run in text.split(",") if run]
    return [number for low, high in ends for number in range(int(low), int(high or low) + 1)]


def test_latency_tables() -> None:
    record, table = json.loads((FILES / "latency.json").read_text()), LatencyTable.read(FILES / "latency.json")
    assert table.workloads == ("prefill-b1-t8",)
    assert (record["version"], json.loads(table.to_json())["version"]) == (1, 2)
    assert LatencyTable.from_json(table.to_json()) == table
    assert (dict(table.environment), table.date) == (record["environment"], record["date"])
    shapes, queries = record["shapes"], record["shapes"]["queries_per_kv"]
    assert table.shapes == {
        "model_type": shapes["model_type"], "hidden": shapes["hidden_size"], "head_dim": shapes["head_dim"],
        "kv_groups": shapes["kv_heads"], "queries": queries, "channels": shapes["channels"],
        "vocab_size": shapes["vocab_size"],
    }  # fmt: skip
    (then,), now = record["workloads"], table.row("prefill-b1-t8")
    assert asdict(now.constant) == then["constant"] and now.check == then["interpolation_error"]
    for kind, sized in (("attention", lambda width: (width, queries)), ("mlp", lambda width: (width,))):
        rows = {sized(row["width"]) if row["width"] else (): row for row in then[kind]}
        entries = now.blocks[kind].items()
        assert {size: {**asdict(entry), "width": size[0] if size else 0} for size, entry in entries} == rows


def test_trajectories() -> None:
    found, plan = read_trajectory(FILES / "trajectory.jsonl"), PruningPlan.from_json((FILES / "plan.json").read_text())
    assert found is not None and found.finished and found.ratio == 0.3
    assert replay(plan.anatomy, found.steps) == plan.structure
    then = _lines("trajectory.jsonl")[1:-1]
    for step, row in zip(found.steps, then, strict=True):
        now, size = json.loads(json.dumps(step.to_json())), row.pop("size")
        heads, groups, channels = size
        attention, mlp = [groups, heads // groups] if groups else [], [channels] if channels else []
        assert now.pop("kept") == (attention if step.kind == "attention" else mlp)
        assert now == row and Step.from_json(step.to_json()) == step


def test_measurements(tmp_path: Path) -> None:
    header, *rows = _lines("measurements.jsonl")
    (tmp_path / "run.partial").mkdir()
    kept = Path(shutil.copy(FILES / "measurements.jsonl", tmp_path / "run.partial"))
    with Workspace(tmp_path / "run") as workspace:
        assert workspace.open_measurements(header["identity"], overwrite=False) == kept
    memo = Memo(kept, digest(header["identity"]))
    assert rows and all(memo.get(row["candidate"], 0) == tuple(row["values"]) for row in rows)
    assert all(memo.get(Structure.from_json(row["candidate"]).to_json(), 0) == tuple(row["values"]) for row in rows)
    assert kept.read_bytes() == (FILES / "measurements.jsonl").read_bytes()


def test_evaluations() -> None:
    rows = _lines("evaluations.jsonl")
    memo = Memo(FILES / "evaluations.jsonl", rows[0]["namespace"])
    assert len(memo) == len(rows)
    assert all(memo.get(row["candidate"], row["fidelity"]) == tuple(row["values"]) for row in rows)
    for row in rows:
        assert memo.get(Structure.from_json(row["candidate"]).to_json(), row["fidelity"]) == tuple(row["values"])


def test_histories_and_fronts(tmp_path: Path) -> None:
    _, records = read_history(FILES / "search.jsonl")
    assert records and records[-1]["stage"] == "picked"
    shutil.copy(FILES / "front.json", tmp_path)
    assert len(read_folders([tmp_path])[1][0].points) == len(json.loads((FILES / "front.json").read_text())["points"])


def test_probe_journals(tmp_path: Path) -> None:
    header, *rows = _lines("probes.jsonl")
    kept = Path(shutil.copy(FILES / "probes.jsonl", tmp_path))
    identity: dict[str, Any] = dict(header["identity"])
    for name, now in (("hidden_size", "hidden"), ("queries_per_kv", "queries"), ("kv_heads", "kv_groups")):
        identity[now] = identity.pop(name)
    with ProbeJournal(kept, identity) as journal:
        for record in map(ProbeRecord.from_json, rows):
            assert journal.find(record.workload, record.sizes, record.stage, record.number) == record
            assert ProbeRecord.from_json(record.to_json()) == record and len(record.sizes) == len(record.blocks[0])
    assert kept.read_bytes() == (FILES / "probes.jsonl").read_bytes()


@pytest.mark.parametrize("point", range(3))
def test_sweeps(point: int) -> None:
    record = json.loads((FILES / "sweep.json").read_text())
    assert (record["format"], record["version"]) == ("multipruner-sweep", 1)
    one = record["points"][point]
    structure = Structure.from_json(one["structure"])
    assert layers_of(structure) == [tuple(row) for row in one["structure"]]
    assert Structure.from_json(structure.to_json()) == structure
    assert abs(one["loss"]) < 9
