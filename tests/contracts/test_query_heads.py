"""Query heads that leave inside KV groups: laws of plans and orders, the engine, the repair, the checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import AutoModelForCausalLM

import multipruner
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.commands.main import main
from multipruner.config.choices import IMPORTANCES
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError
from multipruner.core.families import anatomy_of
from multipruner.core.latency_table import Workload
from multipruner.core.layout import Layout
from multipruner.core.plan import BlockUnits, PruningPlan, Ranking
from multipruner.core.structure import Anatomy, Structure, counts_of
from multipruner.engine.moments import gather
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.jobs.prepare import prepare
from multipruner.jobs.prune.given_plan import leading
from multipruner.latency.bench import Effort, measure_table
from multipruner.repair.scoring import Repair
from multipruner.repair.stream import accumulated
from multipruner.repair.write import repair_outputs, write_outputs
from tests.support import tiny
from tests.support.commands import arguments, assert_refused_in_a_line, finished
from tests.support.layers import Layer, layers_of, plan_of_version_1, structure_of, uniform

HEADS: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 3}
GROUPED = [name for name in tiny.VARIANTS if name not in ("baichuan", "qwen2-mixed", "llama-tied", "qwen3-tied")]
seeds = st.integers(0, 10**6)


def _model(variant: str = "llama") -> Any:
    """Twelve query heads on three KV heads."""
    return tiny.tiny_model(**tiny.VARIANTS[variant], **HEADS)


def _plan(structure: Structure, ranking: Ranking, dense: Anatomy, family: str = "llama") -> PruningPlan:
    return PruningPlan.from_structure(structure, ranking, dense, model="m", model_type=family)


def _inside(units: BlockUnits) -> Any:
    """The query heads of every KV group."""
    return units.axes[1]


@torch.no_grad()
def _loss(model: Any, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood by the stock forward pass, from end to end."""
    logs = model(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    return float(-logs.gather(1, ids[:, 1:].reshape(-1, 1)).mean())


@torch.no_grad()
def _silence(attention: Any, heads: tuple[int, ...]) -> None:
    for head in heads:
        rows = slice(16 * head, 16 * (head + 1))
        attention.q_proj.weight[rows] = 0
        attention.o_proj.weight[:, rows] = 0


@st.composite
def structures(draw: st.DrawFn) -> tuple[Anatomy, Structure]:
    """A dense model, and a structure within it whose groups keep any number of query heads."""
    layers, groups, per, channels = (draw(st.integers(1, n)) for n in (4, 4, 5, 30))
    dense = uniform(layers, groups * per, groups, channels)
    sizes = []
    for _ in range(layers):
        kept = draw(st.integers(0, groups))
        sizes.append((kept * draw(st.integers(1, per)), kept, draw(st.integers(0, channels))))
    return dense, structure_of(*sizes)


@given(structures(), seeds)
def test_plans_keep_the_first_heads_of_the_first_groups_and_survive_their_json(
    pair: tuple[Anatomy, Structure], seed: int
) -> None:
    dense, structure = pair
    ranking = tiny.random_ranking(dense, seed)
    plan = _plan(structure, ranking, dense)
    assert plan.structure == structure
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert PruningPlan.from_json(plan.to_json()).to_json() == plan.to_json()
    for number in dense.of_kind("attention"):
        kept, (order, inside) = plan.blocks[number].axes, ranking.blocks[number].axes
        groups, per_group = structure[number] or (0, 0)
        first: Any = {group: set(inside[group][:per_group]) for group in order[:groups]}  # pyright: ignore
        assert first == ({g: set(heads) for g, heads in zip(*kept, strict=True)} if kept else {})  # pyright: ignore


@given(structures(), seeds)
def test_an_order_that_leaves_heads_as_they_are_is_the_dense_one_inside_the_groups(
    pair: tuple[Anatomy, Structure], seed: int
) -> None:
    """As plans of version 1 say it, in which a row of query heads counts them through the layer."""
    dense, structure = pair
    orders, whole = tiny.random_ranking(dense, seed).blocks, Ranking.identity(dense).blocks
    blocks = zip(orders, whole, strict=True)
    plain = Ranking(tuple(BlockUnits((order.axes[0], *own.axes[1:])) for order, own in blocks))
    plan = _plan(structure, plain, dense)
    for number in dense.of_kind("attention"):
        groups, per_group = structure[number] or (0, 0)
        if groups:
            assert _inside(plan.blocks[number]) == (tuple(range(per_group)),) * groups
    assert PruningPlan.from_json(json.dumps(plan_of_version_1(plan))) == plan


@given(structures(), seeds, seeds)
def test_an_order_that_a_plan_leads_gives_the_plan_back(pair: tuple[Anatomy, Structure], seed: int, other: int) -> None:
    dense, structure = pair
    plan = _plan(structure, tiny.random_ranking(dense, seed), dense)
    for ranking in (tiny.random_ranking(dense, other), Ranking.identity(dense)):
        assert _plan(structure, leading(plan, ranking), dense) == plan


def test_more_query_heads_than_a_group_has_are_refused() -> None:
    dense = uniform(1, 4, 2, 8)
    with pytest.raises(ConfigError, match=r"layer 0 would keep \(1, 3\) of \(2, 2\) KV groups, query heads"):
        _plan(structure_of((3, 1, 8)), Ranking.identity(dense), dense)


def test_rows_are_slices_wherever_they_lead() -> None:
    dense = {"head_dim": 2, **counts_of("attention", (3, 4))}
    queries, keys = Layout("kv_groups * queries * head_dim"), Layout("kv_groups * head_dim")
    for size, heads in (((3, 4), 12), ((2, 4), 8), ((1, 3), 3), ((), 0)):
        assert queries.index(counts_of("attention", size), dense) == slice(0, 2 * heads), "no copy"
    part = counts_of("attention", (2, 2))
    assert queries.index(part, dense) == (0, 1, 2, 3, 8, 9, 10, 11)
    assert keys.index(part, dense) == slice(0, 4)


@pytest.mark.parametrize("variant", GROUPED)
def test_parameters_are_those_the_costs_promise(variant: str) -> None:
    model = _model(variant)
    prunable = Prunable.of(model)
    for seed in range(4):
        structure = tiny.random_structure(prunable.anatomy, seed, partial=True)
        plan = tiny.plan_for(model, structure, seed)
        pruned = apply_plan(model, plan)
        assert sum(tensor.numel() for tensor in pruned.parameters()) == prunable.costs.parameters(structure)
        with torch.no_grad():
            ids = tiny.random_ids()
            assert torch.allclose(pruned(ids).logits, tiny.masked_model(model, plan)(ids).logits, atol=3e-5)


@settings(max_examples=25)
@given(seeds)
def test_keeping_everything_is_the_identity(seed: int) -> None:
    model = _model()
    prunable, ids = Prunable.of(model), tiny.random_ids()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ranking = tiny.random_ranking(prunable.anatomy, seed)
    with torch.no_grad():
        expected = model(ids).logits
        with prunable.in_order(ranking):
            assert torch.allclose(model(ids).logits, expected, atol=1e-4)
            second = prunable.anatomy.at(1, "attention")
            assert prunable.output_of(second, prunable.dense[second]) is model.model.layers[1].self_attn.o_proj
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    pruned = apply_plan(model, _plan(prunable.dense, ranking, prunable.anatomy))
    assert torch.equal(pruned(ids).logits, expected)


@pytest.mark.parametrize("repaired", ["plain", "repaired", "all repaired"])
@pytest.mark.parametrize("variant", GROUPED)
def test_scores_are_those_of_the_model_that_is_written(variant: str, repaired: str) -> None:
    model, text, ids = _model(variant), tiny.random_ids(24, 20), tiny.random_ids(4, 14)
    prunable = Prunable.of(model)
    statistics = gather(prunable, text)
    ranking = rank("second-order", prunable, statistics, within=["queries"])
    structure = structure_of((4, 2, 30), (9, 3, 40), (2, 1, 11))
    plan = _plan(structure, ranking, prunable.anatomy, prunable.spec.model_type)
    pruned = apply_plan(model, plan)
    repair = None if repaired == "plain" else Repair(prunable, statistics, ranking)
    with prunable.in_order(ranking, repair):
        objective = CalibrationObjective(prunable, ids, batch_size=3)
        loss = objective(structure)
        if repaired == "all repaired":
            outputs = accumulated(prunable, structure, text)
            with prunable.with_outputs(outputs):
                loss = CalibrationObjective(prunable, ids)(structure)
            write_outputs(pruned, prunable, plan, ranking, outputs)
    if repaired == "repaired":
        assert repair_outputs(pruned, prunable, plan, statistics, 1e-2) == 5
    assert loss == pytest.approx(_loss(pruned, ids), rel=1e-4)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_a_head_that_does_nothing_leaves_its_group_first(name: str) -> None:
    model = _model()
    idle = {0: (3, 4, 10), 1: (0, 7, 9), 2: (2, 5, 8)}  # one in each group of four
    for number, heads in idle.items():
        _silence(model.model.layers[number].self_attn, heads)
    prunable = Prunable.of(model)
    statistics = gather(prunable, tiny.random_ids(batch=12, length=20))
    blocks, attention = rank(name, prunable, statistics).blocks, prunable.anatomy.of_kind("attention")
    assert all(_inside(blocks[n]) == (tuple(range(4)),) * 3 for n in attention), "only where it is wanted"
    ranking = rank(name, prunable, statistics, within=["queries"])
    for layer, number in enumerate(attention):
        for group, heads in enumerate(_inside(ranking.blocks[number])):
            assert sorted(heads) == [0, 1, 2, 3]
            assert name == "none" or 4 * group + heads[-1] == idle[layer][group]
    if name != "none":
        kept = structure_of(*[(9, 3, 40)] * 3)
        pruned, ids = apply_plan(model, _plan(kept, ranking, prunable.anatomy)), tiny.random_ids()
        with torch.no_grad():
            assert torch.allclose(pruned(ids).logits, model(ids).logits, atol=1e-4), "nothing was lost"


MIXED = structure_of((6, 3, 23), (2, 2, 0), (9, 3, 40))
ALIKE = structure_of(*[(6, 3, 24)] * 3)


@pytest.mark.parametrize("structure", [MIXED, ALIKE], ids=["mixed", "alike"])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen3"])
def test_a_saved_model_gives_the_same_logits(variant: str, structure: Structure, tmp_path: Path) -> None:
    model = _model(variant)
    plan = tiny.plan_for(model, structure, seed=3)
    pruned = apply_plan(model, plan)
    save(tmp_path / "run", pruned, None, plan=plan, report={}, card="")
    loaded: Any = multipruner.load(tmp_path / "run").eval()
    ids = tiny.random_ids(2, 10)
    with torch.no_grad():
        expected = pruned(ids).logits
        assert torch.equal(loaded(ids).logits, expected)
        cache, steps = None, []
        for place in range(ids.shape[1]):  # through the KV cache, token by token
            step = loaded(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
        assert torch.allclose(torch.cat(steps, dim=1), expected, atol=1e-4)
        if structure is ALIKE:
            stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
            assert stock.config.model_type == variant and stock.config.num_attention_heads == 6
            assert torch.equal(stock(ids).logits, expected)
    assert layers_of(anatomy_of(model.config).dense)[0] == Layer(12, 3, 40)


def _arguments(dense: Path, output: Path, *more: str) -> list[str]:
    return arguments(dense, output, "--ratio", "0.15", "--channel-group", "40", "--query-head-step", "1", *more)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_the_command_takes_query_heads_out_of_groups(importance: str, dense: Path, tmp_path: Path) -> None:
    """Half the query heads do nothing: without them, and with all KV heads, nothing is lost."""
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    for layer in model.model.layers:
        _silence(layer.self_attn, (1, 3))
    model.save_pretrained(tmp_path / "idle")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "idle")
    output = tmp_path / "run"
    more = ("--model", str(tmp_path / "idle"), "--importance", importance, "--rounds", "1")
    assert main(_arguments(dense, output, *more)) == 0
    report, plan = finished(output)
    assert report["ratio"] >= 0.15 and report["recipe"]["query_head_step"] == 1
    assert plan.structure == structure_of(*[(2, 2, 40)] * 4)
    assert all(_inside(plan.blocks[n]) == ((0,), (0,)) for n in plan.anatomy.of_kind("attention"))
    assert report["search"]["loss"] == pytest.approx(0, abs=1e-5)
    header = json.loads((output / "measurements.jsonl").read_text().splitlines()[0])
    assert header["identity"]["query_head_step"] == 1


def test_the_greedy_path_takes_them_too(dense: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    more = ("--method", "paper", "--shares", "0:0:1", "--ratio", "0.08", "--width-sequences", "2")
    assert main(_arguments(dense, output, *more)) == 0
    _, plan = finished(output)
    assert any(0 < size.query_heads < 2 * size.kv_heads for size in layers_of(plan.structure))
    assert main(_arguments(dense, output, *more, "--ratio", "0.04")) == 0, "a smaller ratio of the same path"


def test_without_the_key_losses_are_remembered_as_before(dense: Path) -> None:
    text = {"source": str(dense / "text.txt"), "length": 16, "moments_sequences": 8}
    recipe = Recipe.build({"model": str(dense), "channel_group": 8, "calibration": text})
    setting = prepare(recipe, Console(quiet=True), {})
    assert "query_head_step" not in setting.identity
    anatomy, blocks = setting.prunable.anatomy, setting.ranking.blocks
    assert all(_inside(blocks[n]) == ((0, 1), (0, 1)) for n in anatomy.of_kind("attention")), "in the dense order"


def test_a_latency_table_knows_groups_of_fewer_heads(dense: Path, tmp_path: Path) -> None:
    """Measured with one, half and all query heads of a group; what lies between is interpolated, and bounds the run."""
    model = _model()
    anatomy, little = anatomy_of(model.config), Effort(probes=2, placements=2, repeats=2, warmup=1, tries=1)
    table = measure_table(model, [Workload("prefill", 1, 16)], channel_step=40, effort=little)
    (row,) = table.rows.values()
    times = row.milliseconds("attention")
    assert set(times) == {(), *((groups, heads) for groups in (1, 2, 3) for heads in (1, 2, 4))}
    whole, dense_time = anatomy.dense, table.milliseconds(anatomy.dense, anatomy, row.workload.name)
    for heads, low, high in ((2, 2, 2), (3, 2, 4)):
        fewer = structure_of(*[(3 * heads, 3, 40)] * 3)
        change = table.milliseconds(fewer, anatomy, row.workload.name) - dense_time
        between = (times[3, low] + times[3, high]) / 2
        assert change == pytest.approx(3 * (between - times[whole[0]]), rel=1e-6, abs=1e-9)

    measure = ["latency", "--model", str(dense), "--phase", "prefill", "--prompt", "16", "--channel-step", "40"]
    assert main([*measure, "--output", str(tmp_path / "t.json")]) == 0
    made = json.loads((tmp_path / "t.json").read_text())
    for entry in made["workloads"][0]["blocks"]["attention"]:  # heads that take time, groups that take none
        entry["milliseconds"] = 0.01 + math.prod(entry["size"] or [0]) / max(1, (entry["size"] or [0])[0])
    (tmp_path / "t.json").write_text(json.dumps(made))
    more = ("--max-latency", "0.8x", "--latency-table", str(tmp_path / "t.json"), "--rounds", "0")
    command = [flag for flag in _arguments(dense, tmp_path / "run", *more) if flag not in ("--ratio", "0.15", "0.3")]
    assert main(command) == 0
    report, plan = finished(tmp_path / "run")
    assert any(0 < size.query_heads < 2 * size.kv_heads for size in layers_of(plan.structure))
    (phase,) = report["latency"]["phases"].values()
    assert phase["predicted_ms"] <= 0.8 * phase["predicted_dense_ms"] * 1.0001


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--query-head-step", "2"), "query head step 2 does not fit the 2 query heads"),
        (("--query-head-step", "0"), "query_head_step"),
    ],
)
def test_bad_input_is_one_line(more: tuple[str, ...], expected: str, dense: Path, tmp_path: Path, capsys) -> None:
    assert_refused_in_a_line(_arguments(dense, tmp_path / "bad", *more), expected, tmp_path / "bad", capsys)
