"""A sweep finds at every value what a run of its own finds, goes on after a kill, and its plans become models."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForCausalLM

import multipruner
from multipruner.commands.base import Parser
from multipruner.commands.sweep_flags import Asked, sweep_flags, take
from multipruner.config.recipe import Recipe
from multipruner.config.spellings import FOUND_BY
from multipruner.config.sweep_points import parse_sweep
from multipruner.core.errors import ConfigError, InfeasibleError, OutputError
from multipruner.core.families import anatomy_of
from multipruner.core.latency_table import Entry, LatencyTable, Workload, WorkloadTable
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import GONE, Structure
from multipruner.jobs.prune.given_plan import apply_given_plan, leading
from multipruner.jobs.prune.run import prune_recipe
from multipruner.jobs.sweep.path import along, first_within, path_within
from multipruner.jobs.sweep.run import sweep
from multipruner.latency.bench import shapes_of
from multipruner.search import DIMENSIONS, Limit
from multipruner.storage.files import write_atomically
from tests.support.layers import layers_of
from tests.support.tiny import random_ranking, random_structure
from tests.support.toys import ANATOMY, COSTS, DENSE, Additive, problem


def fields(dense: Path, **more: Any) -> dict[str, Any]:
    text = str(dense / "text.txt")
    return {
        "model": str(dense), "name": "tiny", "ratio": 0.3, "channel_group": 8,
        "calibration": {"source": text, "sequences": 4, "width_sequences": 2, "length": 16,
                        "moments_sequences": 12},
        "evaluation": {"text": text}, **more,
    }  # fmt: skip


def recipe(dense: Path, **more: Any) -> Recipe:
    return Recipe.build(fields(dense, **more))


@pytest.fixture(scope="module")
def table(dense: Path) -> Path:
    """A latency table of made-up times: wide blocks take long, narrow ones more than their share."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    entry = lambda milliseconds: Entry(milliseconds, 0.01, 9)  # noqa: E731
    attention = {GONE: entry(0.02)} | {(groups, 2): entry(1.52 + groups) for groups in (1, 2)}
    mlp = {GONE: entry(0.01)} | {(width,): entry(2.01 + width / 10) for width in range(8, 41, 8)}
    row = WorkloadTable(Workload("prefill", 1, 16), {"attention": attention, "mlp": mlp}, entry(3.0))
    table = LatencyTable(shapes_of(model), {"device": "cpu"}, "2026-01-01", {row.workload.name: row})
    write_atomically(dense / "t.json", table.to_json())
    return dense / "t.json"


def timed(dense: Path, table: Path) -> Recipe:
    return recipe(dense, ratio=None, budgets={"latency": "1x"}, latency_table=str(table), rounds=1)


@pytest.fixture(scope="module")
def swept(dense: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    points = parse_sweep("latency=0.6x,0.9x,0.75x")
    return sweep(timed(dense, table), points, tmp_path_factory.mktemp("sweep") / "swept", greedy=True)


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "sweep.json").read_text())


def rows(folder: Path, strategy: str) -> list[dict[str, Any]]:
    return [point for point in record(folder)["points"] if point["method"] == strategy]


@pytest.mark.parametrize(
    ("text", "timed", "budget", "values"),
    [
        ("latency=0.7x,0.9x,0.8x", False, "latency", ("0.9x", "0.8x", "0.7x")),
        ("ratio=0.3, 0.1,0.2", True, "ratio", ("0.1", "0.2", "0.3")),
        ("0.7,0.9", True, "latency", ("0.9x", "0.7x")),
        ("0.7x,0.9", False, "parameters", ("0.9x", "0.7x")),
        ("memory=150MiB,0.2GiB", False, "weight_bytes", ("0.2GiB", "150MiB")),
        ("params=0.5x,0.50x", False, "parameters", ("0.5x",)),
    ],
)
def test_values_are_read_loosest_first(text: str, timed: bool, budget: str, values: tuple[str, ...]) -> None:
    points = parse_sweep(text, timed=timed)
    assert (points.budget, points.values) == (budget, values)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("speed=0.5x", "speed"), ("latancy=0.5x", "did you mean 'latency'"), ("", "no value"), ("latency=", "no value"),
        ("ratio=1.2", "between 0 and 1"), ("ratio=lots", "between 0 and 1"), ("1.2", "between 0 and 1"),
        ("latency=0.5x,12ms", "mixes"), ("flops=quick", "share"), ("memory=5 parsecs", "share"),
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_sweep(text, timed=True)


@given(st.lists(st.integers(1, 99), min_size=1, unique=True))
def test_any_order_of_values_is_the_same_sweep(shares: list[int]) -> None:
    points = parse_sweep(",".join(f"{share / 100}" for share in shares))
    assert points.values == tuple(f"{share / 100}x" for share in sorted(shares, reverse=True))


def asked(*flags: str) -> Asked:
    parser = Parser(argument_default=argparse.SUPPRESS)
    sweep_flags(parser)
    return take(vars(parser.parse_args(flags)))


@pytest.mark.parametrize(
    ("flags", "typed", "source", "expected"),
    [
        (("--sweep", "0.9,0.8"), {}, {}, {"budgets": {"parameters": "0.9x"}}),
        (("--sweep", "0.8,0.9"), {"latency_table": "t"}, {}, {"latency_table": "t", "budgets": {"latency": "0.9x"}}),
        (("--sweep", "0.8,0.9"), {}, {"latency_table": "t"}, {"budgets": {"latency": "0.9x"}}),
        (("--sweep", "ratio=0.3,0.1"), {}, {"latency_table": "t"}, {"ratio": 0.1}),
        (("--sweep", "params=0.5x"), {"budgets": {"flops": "0.8x"}}, {},
         {"budgets": {"flops": "0.8x", "parameters": "0.5x"}}),
        (("--plan", "p.json"), {"ratio": 0.3}, {},
         {"ratio": None, FOUND_BY: "program", "budgets": {}, "hidden_size": None}),
        ((), {"ratio": 0.3}, {}, {"ratio": 0.3}),
    ],
)  # fmt: skip
def test_flags_make_a_whole_recipe(
    flags: tuple[str, ...], typed: dict[str, Any], source: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = asked(*flags)
    assert bool(found) == bool(flags)
    found.put_into(typed, [source])
    assert typed == expected


def test_a_table_without_workloads_is_refused(dense: Path, table: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "t.json").write_text(json.dumps(json.loads(table.read_text()) | {"workloads": []}))
    given = timed(dense, tmp_path / "t.json")
    with pytest.raises(ConfigError, match="has no workload"):
        multipruner.prune(given, output=tmp_path / "out")


@pytest.mark.parametrize("flags", [("--sweep", "0.9", "--plan", "p.json"), ("--sweep-greedy",)])
def test_flags_that_contradict_each_other_are_refused(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--sweep"):
        asked(*flags)


def test_every_point_keeps_its_budget(swept: Path) -> None:
    found = record(swept)
    (whole,) = rows(swept, "dense")
    assert whole["loss"] == pytest.approx(0, abs=1e-4) and whole["structure"] == found["dense"]
    for strategy in ("program", "greedy"):
        points = rows(swept, strategy)
        assert [point["value"] for point in points] == ["0.9x", "0.75x", "0.6x"]
        for point, share in zip(points, (0.9, 0.75, 0.6), strict=True):
            assert point["limit"] == pytest.approx(share * whole["costs"]["latency"])
            assert point["costs"]["latency"] <= point["limit"] * (1 + 1e-9)
            assert point["loss"] > 0
    assert all(point["rounds"] and point["predicted_loss"] is not None for point in rows(swept, "program"))


def test_a_point_is_what_a_run_of_its_own_finds_and_its_plan_what_that_run_writes(
    swept: Path, dense: Path, table: Path, tmp_path: Path
) -> None:
    alone = Recipe.build(timed(dense, table).model_dump(), {"budgets": {"latency": "0.75x"}})
    run = prune_recipe(alone, tmp_path / "alone")
    point = rows(swept, "program")[1]
    assert run.plan.structure.to_json() == point["structure"]
    rounds = run.report["search"]["rounds"]
    assert min(one["loss"] for one in rounds) == pytest.approx(point["loss"], rel=1e-6)
    assert run.plan.to_json() == (swept / point["plan"]).read_text()

    made = apply_given_plan(timed(dense, table), swept / point["plan"], tmp_path / "made")
    assert made.plan == run.plan
    written = multipruner.load(tmp_path / "made").state_dict()
    for name, tensor in multipruner.load(tmp_path / "alone").state_dict().items():
        assert torch.equal(tensor, written[name]), name
    assert made.report["search"]["loss"] == pytest.approx(run.report["search"]["loss"], rel=1e-6)
    (phase,) = made.report["latency"]["phases"].values()
    assert phase["predicted_ms"] == pytest.approx(point["costs"]["latency"])


def test_the_table_holds_every_number(swept: Path) -> None:
    points = record(swept)["points"]
    lines = list(csv.DictReader(io.StringIO((swept / "sweep.csv").read_text())))
    assert len(lines) == len(points) == 7
    for line, point in zip(lines, points, strict=True):
        assert float(line["loss"]) == point["loss"] and line["method"] == point["method"]
        assert {name: float(line[name]) for name in point["costs"]} == point["costs"]
        assert float(line["latency_share"]) == point["costs"]["latency"] / points[0]["costs"]["latency"]


def test_figures_are_pictures_and_plans_hold_the_structures(swept: Path) -> None:
    for name in ("sweep.png", "structures.png"):
        with Image.open(swept / name) as picture:
            assert picture.format == "PNG" and picture.width > 800
            colours = picture.convert("RGB").getcolors(1 << 24)
        assert colours is not None and len(colours) > 50, "something is drawn"
    for point in record(swept)["points"]:
        if point["plan"]:
            plan = PruningPlan.from_json((swept / point["plan"]).read_text())
            assert plan.structure.to_json() == point["structure"]
    assert not swept.with_name("swept.partial").exists()


def test_more_values_in_the_same_folder_measure_little_more(swept: Path, dense: Path, table: Path) -> None:
    (swept / "note.txt").write_text("mine")
    before, measured = rows(swept, "program"), (swept / "measurements.jsonl").read_text()
    sweep(timed(dense, table), parse_sweep("latency=0.75x,0.9x,0.6x,0.5x"), swept)
    after = rows(swept, "program")
    assert after[:3] == [{**old, "rounds": new["rounds"]} for old, new in zip(before, after, strict=False)]
    now = (swept / "measurements.jsonl").read_text()
    assert now.startswith(measured) and now.count("\n") < 1.5 * measured.count("\n")
    assert (swept / "note.txt").read_text() == "mine"
    assert not (swept / "plans" / "greedy-0.9x.json").exists(), "an earlier sweep's plans are gone"


PROGRAM = """
import json, sys
from pathlib import Path
from multipruner.config.recipe import Recipe
from multipruner.config.sweep_points import parse_sweep
from multipruner.jobs.sweep.run import sweep
sweep(Recipe.build(json.loads(sys.argv[1])), parse_sweep("ratio=0.2,0.35"), Path(sys.argv[2]), greedy=True)
"""


def test_a_killed_sweep_goes_on_and_ends_the_same(dense: Path, tmp_path: Path) -> None:
    output, whole = tmp_path / "stopped", tmp_path / "whole"
    measurements = tmp_path / "stopped.partial" / "measurements.jsonl"
    command = [sys.executable, "-c", PROGRAM, json.dumps(fields(dense)), str(output)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        while process.poll() is None and not (measurements.exists() and measurements.read_bytes().count(b"\n") > 40):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    kept = measurements.read_bytes()
    assert not output.exists() and kept.count(b"\n") > 40
    kept = kept[: kept.rfind(b"\n") + 1]
    for folder in (output, whole):
        sweep(recipe(dense), parse_sweep("ratio=0.2,0.35"), folder, greedy=True)
    for strategy in ("program", "greedy"):
        for one, other in zip(rows(output, strategy), rows(whole, strategy), strict=True):
            assert (one["structure"], one["value"]) == (other["structure"], other["value"])
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    after = (output / "measurements.jsonl").read_bytes()
    assert after.startswith(kept)
    keys = [(line["namespace"], str(line["candidate"])) for line in map(json.loads, after.splitlines()[1:])]
    assert len(set(keys)) == len(keys), "nothing was measured twice"
    assert not measurements.parent.exists()


def test_what_cannot_be_kept_is_refused_before_anything_is_measured(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="nearest"):
        sweep(recipe(dense), parse_sweep("params=0.9x,0.01x"), tmp_path / "no")
    with pytest.raises(ConfigError, match="latency table"):
        sweep(recipe(dense), parse_sweep("latency=0.9x"), tmp_path / "no")
    with pytest.raises(ConfigError, match="program"):
        sweep(recipe(dense, method="paper"), parse_sweep("ratio=0.1"), tmp_path / "no")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(OutputError, match="no sweep"):
        sweep(recipe(dense), parse_sweep("ratio=0.1"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def a_plan(dense: Path, seed: int, **changes: Any) -> PruningPlan:
    """Random parts of the dense model, in an order that no calibration gives."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    full = anatomy_of(model.config)
    structure = random_structure(full, seed, partial=seed % 2 == 0)
    return PruningPlan.from_structure(
        structure, random_ranking(full, seed), full, model="elsewhere", model_type="llama", **changes
    )


@pytest.mark.parametrize("seed", [3, 2], ids=["whole KV groups", "parts of KV groups"])
def test_any_plan_of_the_model_is_followed_to_the_index(seed: int, dense: Path, tmp_path: Path) -> None:
    plan = a_plan(dense, seed)
    assert seed % 2 or any(0 < size.query_heads < 2 * size.kv_heads for size in layers_of(plan.structure))
    (tmp_path / "p.json").write_text(plan.to_json())
    run = apply_given_plan(recipe(dense, rounds=0), tmp_path / "p.json", tmp_path / "made")
    assert run.plan.blocks == plan.blocks and run.plan.layers == plan.layers
    assert run.report["search"]["method"] == "given plan"
    sliced = multipruner.apply_plan(AutoModelForCausalLM.from_pretrained(dense), plan).state_dict()
    written = multipruner.load(tmp_path / "made").state_dict()
    assert written.keys() == sliced.keys()
    repaired = {name for name, tensor in sliced.items() if not torch.equal(tensor, written[name])}
    assert repaired and all(name.split(".")[-2] in ("o_proj", "down_proj", "norm") for name in repaired)


def test_sizes_that_the_latency_table_does_not_hold_are_refused_at_once(
    dense: Path, table: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    full = anatomy_of(model.config)
    record = json.loads(table.read_text())
    entries = record["workloads"][0]["blocks"]
    for kind, where, said in (("attention", 2, "gone"), ("mlp", 3, "40")):
        lacking = [e for e in entries[kind] if e["size"] != ([] if said == "gone" else [40])]
        changed = {**record["workloads"][0], "blocks": {**entries, kind: lacking}}
        (tmp_path / "t.json").write_text(json.dumps({**record, "workloads": [changed]}))
        structure = full.dense.replace(where, GONE) if said == "gone" else full.dense.replace(0, GONE)
        plan = PruningPlan.from_structure(structure, random_ranking(full, 2), full, model="m", model_type="llama")
        (tmp_path / "p.json").write_text(plan.to_json())
        with pytest.raises(ConfigError, match=f"size {said} was not measured"):
            apply_given_plan(timed(dense, tmp_path / "t.json"), tmp_path / "p.json", tmp_path / "made")
        assert not (tmp_path / "made").exists()


def test_a_plan_with_parts_of_kv_groups_is_timed(dense: Path, table: Path, tmp_path: Path) -> None:
    """By a table that was measured for whole groups it takes as long as they do."""
    plan = a_plan(dense, 2)
    assert any(0 < size.query_heads < 2 * size.kv_heads for size in layers_of(plan.structure))
    (tmp_path / "p.json").write_text(plan.to_json())
    run = apply_given_plan(timed(dense, table), tmp_path / "p.json", tmp_path / "made")
    (phase,) = run.report["latency"]["phases"].values()
    sizes = layers_of(plan.structure)
    blocks = [0.02 + bool(s.kv_heads) * (1.5 + s.kv_heads) for s in sizes if any(s)]
    blocks += [LatencyTable.read(table).block_milliseconds("mlp", (s.channels,) if s.channels else GONE,
               "prefill-b1-t16") for s in sizes if any(s)]  # fmt: skip
    assert phase["predicted_ms"] == pytest.approx(3 + sum(blocks))


def test_a_plan_of_other_weights_is_refused(dense: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(a_plan(dense, 3, fingerprint="0" * 64).to_json())
    with pytest.raises(ConfigError, match="weights differ"):
        apply_given_plan(recipe(dense), path, tmp_path / "made")
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"p\.json"):
        apply_given_plan(recipe(dense), path, tmp_path / "made")
    assert [one.name for one in tmp_path.iterdir()] == ["p.json"]


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_what_a_plan_keeps_stands_first_and_the_rest_as_before(seed: int, other: int) -> None:
    plan = PruningPlan.from_structure(
        random_structure(ANATOMY, seed), random_ranking(ANATOMY, seed), ANATOMY, model="m", model_type="llama"
    )
    before = random_ranking(ANATOMY, other)
    after = leading(plan, before)
    again = PruningPlan.from_structure(plan.structure, after, ANATOMY, model="m", model_type="llama")
    assert again == plan
    for number, place in enumerate(ANATOMY):
        for old, new in zip(before.blocks[number].axes, after.blocks[number].axes, strict=True):
            assert _sorted(new) == _sorted(old), place
    assert leading(plan, after) == after


def _sorted(units: Any) -> Any:
    return [sorted(row) for row in units] if isinstance(units[0], tuple) else sorted(units)


def costs_of(structure: Structure) -> dict[str, float]:
    return {"parameters": COSTS.parameters(structure), "kv_bytes": COSTS.kv_bytes_per_token(structure)}


@settings(max_examples=25)
@given(st.floats(0.6, 0.97), st.floats(0.55, 1.0), st.integers(1, 30))
def test_the_path_is_walked_until_every_limit_is_kept(parameters: float, cache: float, seed: int) -> None:
    full = costs_of(DENSE)
    shares = {"parameters": parameters, "kv_bytes": cache}
    limits = [Limit.of_blocks(name, lambda *at: 0.0, 0.0, shares[name] * full[name]) for name in shares]
    judges = dict.fromkeys(DIMENSIONS, Additive(seed))
    steps = path_within(problem(0.05), judges, limits, costs_of)
    assume(steps is not None)  # shares leave little for the cache: not every pair of limits has a path
    assert steps is not None
    found = first_within(ANATOMY, steps, limits, costs_of)
    assert found is not None
    passed = list(along(ANATOMY, steps))
    for structure in passed[: passed.index(found)]:
        assert any(costs_of(structure)[limit.name] > limit.limit for limit in limits)
    assert all(costs_of(found)[limit.name] <= limit.limit for limit in limits)


def test_easy_limits_are_reached_and_the_impossible_is_none() -> None:
    judges = dict.fromkeys(DIMENSIONS, Additive())
    for share in (0.95, 0.9, 0.8, 0.7):
        limits = [Limit.of_blocks("parameters", lambda *at: 0.0, 0.0, share * COSTS.parameters(DENSE))]
        steps = path_within(problem(0.05), judges, limits, costs_of)
        assert steps is not None
        assert 1 - share <= steps[-1].ratio < 1 - share + 0.03, "aimed no further than needed"
    assert path_within(problem(0.2), judges, [Limit.of_blocks("kv_bytes", lambda *at: 0.0, 0.0, 0.0)], costs_of) is None
