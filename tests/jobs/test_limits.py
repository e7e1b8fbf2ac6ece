"""Budgets are read as typed, become limits whose sums are the costs, and the default method keeps all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multipruner.commands.main import main
from multipruner.config.amounts import amount_of
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError
from multipruner.core.latency_table import Entry, LatencyTable, Workload, WorkloadTable
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import GONE, Structure
from multipruner.engine.prunable import Prunable
from multipruner.jobs.limits import latency_table_of, limits_of
from multipruner.latency.bench import shapes_of
from tests.support.commands import arguments
from tests.support.tiny import MORE, VARIANTS, random_structure, tiny_model


@pytest.mark.parametrize(
    ("name", "text", "amount"),
    [
        ("latency", "12ms", 12), ("latency", "0.5s", 500), ("latency", "0.7x", 70), ("weight_bytes", "2 MiB", 2 << 20),
        ("weight_bytes", "1.5GB", 1.5e9), ("parameters", "90M", 90e6), ("flops", "1e9", 1e9), ("kv_bytes", "1x", 100),
    ],
)  # fmt: skip
def test_amounts_are_read(name: str, text: str, amount: float) -> None:
    assert amount_of(name, text, 100.0) == pytest.approx(amount)


@pytest.mark.parametrize("text", ["", "x", "1.2x", "0x", "12 parsecs", "-3ms", "fast"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="latency"):
        amount_of("latency", text, 100.0)


@given(st.sampled_from(sorted(VARIANTS)), st.integers(0, 10**6))
def test_the_sum_over_blocks_is_the_cost(variant: str, seed: int) -> None:
    prunable = _prunable(variant)
    costs = prunable.costs
    counts = {"parameters": costs.parameters, "weight_bytes": costs.weight_bytes, "flops": costs.flops_per_token,
              "kv_bytes": costs.kv_bytes_per_token}  # fmt: skip
    counts = {name: count for name, count in counts.items() if count(prunable.dense)}  # mixers have no keys and values
    recipe = Recipe.build({"model": "m", "ratio": None, "budgets": dict.fromkeys(counts, "0.5x")})
    structure = random_structure(prunable.anatomy, seed)
    for limit, count in zip(limits_of(recipe, prunable), counts.values(), strict=True):
        assert limit.cost(structure) == count(structure)
        assert limit.limit == count(prunable.dense) / 2


def test_what_blocks_share_is_counted_until_both_are_gone() -> None:
    """One norm for both blocks of a layer: 48 weights, a constant to the exact program."""
    prunable = Prunable.of(tiny_model(**MORE["cohere"]))
    recipe = Recipe.build({"model": "m", "ratio": None, "budgets": {"parameters": "0.5x"}})
    (limit,), costs, dense = limits_of(recipe, prunable), prunable.costs, prunable.dense
    alone = dense.replace(2, GONE).replace(1, (7,))
    assert limit.cost(dense) == costs.parameters(dense) and limit.cost(alone) == costs.parameters(alone)
    without = alone.replace(3, GONE)
    assert limit.cost(without) == costs.parameters(without) + 48


_MADE: dict[str, Prunable] = {}


def _prunable(variant: str) -> Prunable:
    if variant not in _MADE:
        _MADE[variant] = Prunable.of(tiny_model(**VARIANTS[variant]))
    return _MADE[variant]


def _structure(folder: Path) -> Structure:
    return PruningPlan.from_json((folder / "plan.json").read_text()).structure


def test_several_budgets_are_kept_together(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    flags = ("--max-kv-bytes", "0.5x", "--max-flops", "0.9x", "--max-params", "0.85x")
    command = [flag for flag in arguments(dense, output, *flags) if flag not in ("--ratio", "0.3")]
    assert main(command) == 0
    report = json.loads((output / "report.json").read_text())
    assert report["recipe"]["ratio"] is None
    for name, share in (("kv_bytes_per_token", 0.5), ("flops_per_token", 0.9)):
        assert report["costs"][name]["after"] <= share * report["costs"][name]["before"]
    assert report["parameters"]["after"] <= 0.85 * report["parameters"]["before"]


def test_latency_is_measured_bounded_and_reported(dense: Path, tmp_path: Path, capsys) -> None:
    table, output = tmp_path / "table.json", tmp_path / "fast"
    measure = ["latency", "--model", str(dense), "--phase", "prefill", "--prompt", "16", "--channel-step", "8"]
    assert main([*measure, "--output", str(table)]) == 0
    budget = ("--max-latency", "0.8x", "--latency-table", str(table))
    command = [flag for flag in arguments(dense, output, *budget) if flag not in ("--ratio", "0.3")]
    assert main(command) == 0
    (row,) = json.loads((output / "report.json").read_text())["latency"]["phases"].values()
    assert row["predicted_ms"] <= 0.8 * row["predicted_dense_ms"] * 1.0001
    assert row["measured_ms"] > 0 and row["dense_ms"] > 0
    capsys.readouterr()
    assert main([*command, "--max-latency", "0.001x"]) == 2
    assert "nearest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--max-latency", "0.7x"), "latency table"),
        (("--max-params", "lots"), "share"),
        (("--max-params", "0.7x", "--method", "paper"), "program"),
        (("--max-params", "0.7x", "--latency-table", "t.json"), "latency"),
    ],
)
def test_wrong_budgets_are_one_line(flags: tuple[str, ...], expected: str, dense: Path, tmp_path: Path, capsys) -> None:
    assert main(arguments(dense, tmp_path / "bad", *flags)) == 2
    printed = capsys.readouterr().err
    assert expected in printed and printed.count("\n") == 1


def test_a_table_of_whole_groups_is_refused_for_parts_of_them(tmp_path: Path) -> None:
    prunable, entry = _prunable("llama"), Entry(1.0, 0.0, 1)
    groups, queries = prunable.dense[0]
    channels = prunable.dense[1][0]
    whole = {(): entry, **{(count, queries): entry for count in range(1, groups + 1)}}
    path, at = tmp_path / "table.json", Workload("prefill", 1, 8)
    fine = {**whole, **{(count, 1): entry for count in range(1, groups + 1)}}
    for attention, said in ((whole, "knows KV groups of all 2 query heads only"), (fine, None)):
        row = WorkloadTable(at, {"attention": attention, "mlp": {(): entry, (channels,): entry}}, entry)
        path.write_text(LatencyTable(shapes_of(prunable.model), {}, "2026", {at.name: row}).to_json())
        asked = {"model": "m", "ratio": None, "budgets": {"latency": "0.9x"}, "latency_table": str(path)}
        assert latency_table_of(Recipe.build(asked), prunable)[1] == at.name
        recipe = Recipe.build({**asked, "query_head_step": 1})
        if said is None:
            assert latency_table_of(recipe, prunable)[1] == at.name
            continue
        with pytest.raises(ConfigError, match=said):
            latency_table_of(recipe, prunable)
