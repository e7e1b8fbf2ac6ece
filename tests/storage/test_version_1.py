"""What version 1 of every file holds is still read, and what keys it is found by has not changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from multipruner.core.identity import digest
from multipruner.core.latency_table import LatencyTable
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Structure
from multipruner.jobs.search.files import read_history
from multipruner.jobs.workspace import Workspace
from multipruner.latency.probe_journal import ProbeJournal, ProbeRecord
from multipruner.report.inputs import read_folders
from multipruner.search import Memo, replay
from multipruner.search.step import read_trajectory

FILES = Path(__file__).parents[1] / "fixtures" / "v1"


def _lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (FILES / name).read_text().splitlines()]


def test_plans() -> None:
    text = (FILES / "plan.json").read_text()
    plan = PruningPlan.from_json(text)
    assert plan.to_json() == text
    assert (len(plan.dense), len(plan.structure)) == (2, 2)


def test_latency_tables() -> None:
    table = LatencyTable.read(FILES / "latency.json")
    assert table.to_json() == (FILES / "latency.json").read_text()
    assert table.workloads == ("prefill-b1-t8",)


def test_trajectories() -> None:
    found, plan = read_trajectory(FILES / "trajectory.jsonl"), PruningPlan.from_json((FILES / "plan.json").read_text())
    assert found is not None and found.finished and found.ratio == 0.3
    assert replay(plan.dense, found.steps) == plan.structure
    assert json.loads(json.dumps([step.to_json() for step in found.steps])) == _lines("trajectory.jsonl")[1:-1]


def test_measurements(tmp_path: Path) -> None:
    header, *rows = _lines("measurements.jsonl")
    (tmp_path / "run.partial").mkdir()
    kept = Path(shutil.copy(FILES / "measurements.jsonl", tmp_path / "run.partial"))
    with Workspace(tmp_path / "run") as workspace:
        assert workspace.open_measurements(header["identity"], overwrite=False) == kept
    memo = Memo(kept, digest(header["identity"]))
    assert rows and all(memo.get(row["candidate"], 0) == tuple(row["values"]) for row in rows)
    assert kept.read_bytes() == (FILES / "measurements.jsonl").read_bytes()


def test_evaluations() -> None:
    rows = _lines("evaluations.jsonl")
    memo = Memo(FILES / "evaluations.jsonl", rows[0]["namespace"])
    assert len(memo) == len(rows)
    assert all(memo.get(row["candidate"], row["fidelity"]) == tuple(row["values"]) for row in rows)


def test_histories_and_fronts(tmp_path: Path) -> None:
    _, records = read_history(FILES / "search.jsonl")
    assert records and records[-1]["stage"] == "picked"
    shutil.copy(FILES / "front.json", tmp_path)
    assert len(read_folders([tmp_path])[1][0].points) == len(json.loads((FILES / "front.json").read_text())["points"])


def test_probe_journals(tmp_path: Path) -> None:
    header, *rows = _lines("probes.jsonl")
    kept = Path(shutil.copy(FILES / "probes.jsonl", tmp_path))
    with ProbeJournal(kept, header["identity"]) as journal:
        for record in map(ProbeRecord.from_json, rows):
            assert journal.find(record.workload, record.sizes, record.stage, record.number) == record
    assert kept.read_bytes() == (FILES / "probes.jsonl").read_bytes()


@pytest.mark.parametrize("point", range(3))
def test_sweeps(point: int) -> None:
    record = json.loads((FILES / "sweep.json").read_text())
    assert (record["format"], record["version"]) == ("multipruner-sweep", 1)
    one = record["points"][point]
    assert Structure.from_json(one["structure"]).to_json() == one["structure"]
    assert abs(one["loss"]) < 9
