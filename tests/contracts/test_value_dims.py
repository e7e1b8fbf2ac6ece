"""Value dimensions that leave inside KV groups: what is cut computes what is masked, everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import multipruner
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.commands.main import main
from multipruner.config.choices import IMPORTANCES
from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.families import FAMILIES, anatomy_of
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import Structure
from multipruner.engine.moments import gather
from multipruner.engine.objective import CalibrationObjective, PlainObjective
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.importance.value_bases import basis_of, turn_values
from multipruner.jobs.prune.given_plan import leading
from multipruner.repair.scoring import Repair
from multipruner.repair.stream import accumulated
from multipruner.repair.write import repair_outputs, write_outputs, write_values
from tests.support import tiny
from tests.support.commands import arguments, assert_refused_in_a_line, bred, finished

ALONG = ("value_dim",)
WITH = [
    name for name, row in {**tiny.VARIANTS, **tiny.MORE}.items()
    if FAMILIES[row["family"]].further and name != "phi-normed"  # which is another row
]  # fmt: skip


def _model(variant: str = "llama") -> Any:
    return tiny.tiny_model(**{**tiny.VARIANTS, **tiny.MORE}[variant])


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def _loss(model: Any, ids: torch.Tensor) -> float:
    logs = _logits(model, ids)[:, :-1].flatten(0, 1).log_softmax(-1)
    return float(-logs.gather(1, ids[:, 1:].reshape(-1, 1)).mean())


@pytest.mark.parametrize("variant", WITH)
def test_cut_computes_what_masked_does_and_weighs_what_is_counted(variant: str) -> None:
    model, ids = _model(variant), tiny.random_ids()
    prunable = Prunable.of(model, along=ALONG)
    for seed in range(3):
        structure = tiny.random_structure(prunable.anatomy, seed, partial=True)
        plan = tiny.plan_for(model, structure, seed, ALONG)
        cut = apply_plan(model, plan)
        assert (_logits(cut, ids) - _logits(tiny.masked_model(model, plan), ids)).abs().max() < tiny.ROUNDING
        assert sum(weight.numel() for weight in cut.parameters()) == prunable.costs.parameters(structure)
        with prunable.in_order(tiny.random_ranking(prunable.anatomy, seed)):
            losses = [kind(prunable, ids)(structure) for kind in (CalibrationObjective, PlainObjective)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5) == pytest.approx(_loss(cut, ids), abs=1e-4)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_plans_survive_their_json_and_lead_to_themselves(seed: int, other: int) -> None:
    anatomy = anatomy_of(_model().config, ALONG)
    structure = tiny.random_structure(anatomy, seed, partial=True)
    about: dict[str, Any] = {"model": "m", "model_type": "llama"}
    plan = PruningPlan.from_structure(structure, tiny.random_ranking(anatomy, seed), anatomy, **about)
    assert plan.structure == structure and plan.along == ALONG
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert Structure.from_json(structure.to_json()) == structure
    ranking = leading(plan, tiny.random_ranking(anatomy, other))
    assert PruningPlan.from_structure(structure, ranking, anatomy, **about) == plan


def test_whole_values_change_nothing() -> None:
    """Sizes that name them, and sizes that do not, cost the same and are the same model, a stock one."""
    model, ids = _model(), tiny.random_ids()
    prunable, plain = Prunable.of(model, along=ALONG), Prunable.of(model)
    for seed in range(3):
        structure = tiny.random_structure(plain.anatomy, seed, partial=True)
        named = Structure(tuple((*size, 16) if len(size) == 2 else size for size in structure))
        for cost in ("parameters", "kv_bytes_per_token", "flops_per_token"):
            assert getattr(prunable.costs, cost)(named) == getattr(plain.costs, cost)(structure)
    ranking = tiny.random_ranking(prunable.anatomy, 1)
    with prunable.in_order(ranking):
        assert torch.allclose(_logits(model, ids), (_logits(_model(), ids)), atol=tiny.ROUNDING)
    plan = PruningPlan.from_structure(prunable.dense, ranking, prunable.anatomy, model="m", model_type="llama")
    whole = apply_plan(model, plan)
    assert type(whole) is type(model) and torch.equal(_logits(whole, ids), _logits(model, ids))


def test_parameters_and_products_fall_and_the_cache_stays() -> None:
    costs = Prunable.of(_model(), along=ALONG).costs
    fewer = costs.dense.replace(0, (2, 2, 4))
    assert costs.parameters(costs.dense) - costs.parameters(fewer) == 12 * (2 + 4) * 48
    assert costs.flops_per_token(costs.dense) - costs.flops_per_token(fewer) == 2 * 12 * (2 + 4) * 48
    assert costs.kv_bytes_per_token(fewer) == costs.kv_bytes_per_token(costs.dense)


@pytest.mark.parametrize("repaired", ["plain", "repaired", "all repaired"])
@pytest.mark.parametrize("variant", ["llama-biased", "qwen2", "gemma2"])
def test_scores_are_those_of_the_model_that_is_written(variant: str, repaired: str) -> None:
    model, text, ids = _model(variant), tiny.random_ids(24, 20), tiny.random_ids(4, 14)
    prunable = Prunable.of(model, along=ALONG)
    statistics = gather(prunable, text)
    ranking = rank("second-order", prunable, statistics, within=["value_dim"])
    structure = Structure(((2, 2, 5), (30,), (1, 2, 16), (40,), (2, 1, 9), (11,)))
    plan = PruningPlan.from_structure(
        structure, ranking, prunable.anatomy, model="m", model_type=prunable.spec.model_type
    )
    pruned = apply_plan(model, plan)
    repair = None if repaired == "plain" else Repair(prunable, statistics, ranking)
    with prunable.in_order(ranking, repair):
        loss = CalibrationObjective(prunable, ids, batch_size=3)(structure)
        if repaired == "all repaired":
            outputs = accumulated(prunable, structure, text)
            with prunable.with_outputs(outputs):
                loss = CalibrationObjective(prunable, ids)(structure)
            write_outputs(pruned, prunable, plan, ranking, outputs)
    if repaired == "repaired":
        assert repair_outputs(pruned, prunable, plan, statistics, 1e-2) == 5
    assert loss == pytest.approx(_loss(pruned, ids), rel=1e-4)


@pytest.mark.parametrize("variant", ["llama-biased", "qwen2", "gemma2", "mixtral"])
def test_turned_values_change_nothing_and_any_number_of_them_is_cut_as_it_is_scored(variant: str) -> None:
    model, text, ids = _model(variant), tiny.random_ids(24, 20), tiny.random_ids(4, 14)
    prunable, expected = Prunable.of(model, along=ALONG), _logits(_model(variant), ids)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    statistics = gather(prunable, text)
    turn_values(prunable, statistics)
    ranking = rank("second-order", prunable, statistics)
    with prunable.in_order(ranking):
        assert (_logits(model, ids) - expected).abs().max() < tiny.ROUNDING
        again = gather(prunable, text)  # of groups in another order
        assert sorted(again.grams[0].diagonal().tolist()) == pytest.approx(
            sorted(statistics.grams[0].diagonal().tolist()), rel=1e-3, abs=1e-5
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    about: dict[str, Any] = {"model": "m", "model_type": prunable.spec.model_type, "bases": ALONG}
    dense = PruningPlan.from_structure(prunable.dense, ranking, prunable.anatomy, **about)
    whole = apply_plan(model, dense)
    write_values(whole, prunable, dense)
    assert (_logits(whole, ids) - expected).abs().max() < tiny.ROUNDING
    structure = prunable.dense.replace(0, (2, 2, 5)).replace(2, (1, 2, 16)).replace(4, (2, 2, 11))
    plan = PruningPlan.from_structure(structure, ranking, prunable.anatomy, **about)
    assert PruningPlan.from_json(plan.to_json()) == plan
    for repaired in (False, True):
        pruned = apply_plan(model, plan)
        write_values(pruned, prunable, plan)
        with prunable.in_order(ranking, Repair(prunable, statistics, ranking) if repaired else None):
            loss = CalibrationObjective(prunable, ids)(structure)
        if repaired:
            assert repair_outputs(pruned, prunable, plan, statistics, 1e-2) == 3
        assert loss == pytest.approx(_loss(pruned, ids), rel=1e-4)


def test_bases_are_the_best_for_every_number_of_dimensions() -> None:
    """No other directions lose less: where all heads see the same moments the singular values say what is lost."""
    generator = torch.Generator().manual_seed(0)
    weights, mixed = (torch.randn(*shape, generator=generator) for shape in ((20, 3, 8), (8, 8)))
    moments = mixed @ mixed.T
    basis = basis_of(weights, moments)
    assert torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-5)
    stacked = weights.flatten(0, 1)
    lost = torch.linalg.svdvals(stacked @ torch.linalg.cholesky(moments)).square().flip(0).cumsum(0).flip(0)
    for kept in range(1, 8):
        rows = basis[:kept]
        refitted = stacked @ moments @ rows.T @ torch.linalg.inv(rows @ moments @ rows.T) @ rows
        error = (stacked - refitted) @ moments @ (stacked - refitted).T
        assert float(error.trace()) == pytest.approx(float(lost[kept]), rel=1e-3)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_a_dimension_that_does_nothing_leaves_first(name: str) -> None:
    model, ids = _model(), tiny.random_ids()
    idle = {0: (3, 12), 1: (0, 7), 2: (5, 15)}  # in every group
    with torch.no_grad():
        for number, dims in idle.items():
            for group in range(2):
                model.model.layers[number].self_attn.v_proj.weight[[16 * group + dim for dim in dims]] = 0
    prunable = Prunable.of(model, along=ALONG)
    ranking = rank(name, prunable, gather(prunable, tiny.random_ids(12, 20)), within=["value_dim"])
    for layer, number in enumerate(prunable.anatomy.of_kind("attention")):
        for order in ranking.blocks[number].axes[2]:
            assert sorted(order) == list(range(16))  # pyright: ignore
            assert name == "none" or set(order[-2:]) == set(idle[layer])  # pyright: ignore
    if name != "none":
        structure = Structure(tuple((2, 2, 14) if len(size) == 3 else size for size in prunable.dense))
        plan = PruningPlan.from_structure(structure, ranking, prunable.anatomy, model="m", model_type="llama")
        assert torch.allclose(_logits(apply_plan(model, plan), ids), _logits(model, ids), atol=tiny.ROUNDING)


@pytest.mark.parametrize("variant", ["llama-biased", "qwen3", "lfm2"])
def test_a_saved_model_gives_the_same_logits(variant: str, tmp_path: Path) -> None:
    model, ids = _model(variant), tiny.random_ids(2, 10)
    structure = tiny.random_structure(anatomy_of(model.config, ALONG), 5, partial=True, drop=0.1)
    plan = tiny.plan_for(model, structure, 3, ALONG)
    pruned = apply_plan(model, plan)
    save(tmp_path / "run", pruned, None, plan=plan, report={}, card="")
    expected = _logits(pruned, ids)
    loaded: Any = multipruner.load(tmp_path / "run").eval()
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "run", trust_remote_code=True).eval()
    assert torch.equal(_logits(loaded, ids), expected) and torch.equal(_logits(trusted, ids), expected)
    assert sum(weight.numel() for weight in loaded.parameters()) == Prunable.of(model, along=ALONG).costs.parameters(
        structure
    )
    with torch.no_grad():
        cache, steps = None, []
        for place in range(ids.shape[1]):  # through the KV cache, token by token
            step = loaded(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
    assert torch.allclose(torch.cat(steps, dim=1), expected, atol=tiny.ROUNDING)


def test_families_whose_values_are_not_alone_are_refused() -> None:
    for family in ("olmo", "phi3", "qwen3_5_text", "deepseek_v3", "mamba"):
        variant = next(row for row in {**tiny.VARIANTS, **tiny.MORE}.values() if row["family"] == family)
        with pytest.raises(UnsupportedModelError, match="value dimensions cannot leave in this family"):
            anatomy_of(tiny.tiny_model(**variant).config, ALONG)


def _arguments(dense: Path, output: Path, *more: str) -> list[str]:
    return arguments(dense, output, "--ratio", "0.08", "--channel-group", "40", "--value-dim-step", "4", *more)


def test_the_command_takes_value_dimensions_out_of_groups(dense: Path, tmp_path: Path, capsys) -> None:
    """Three quarters of them do nothing: without these nothing is lost. The plan gives the same model again."""
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.unflatten(0, (2, 16))[:, 3:15] = 0
    model.save_pretrained(tmp_path / "idle")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "idle")
    output, more = tmp_path / "run", ("--model", str(tmp_path / "idle"), "--rounds", "1")
    assert main(_arguments(dense, output, *more)) == 0
    report, plan = finished(output)
    assert report["ratio"] >= 0.08 and report["recipe"]["value_dim_step"] == 4
    sizes = [plan.structure[n] for n in plan.anatomy.of_kind("attention")]
    assert all(size[:2] == (2, 2) and size[2] in (4, 8, 12, 16) for size in sizes) and min(sizes) < (2, 2, 16)
    assert report["search"]["loss"] == pytest.approx(0, abs=1e-5)
    left = 2 * sum(size[2] for size in sizes)
    assert f"{left} of 128 value" in capsys.readouterr().out
    assert main(_arguments(dense, tmp_path / "again", *more, "--plan", str(output / "plan.json"))) == 0
    assert finished(tmp_path / "again")[1] == plan
    assert plan.bases == ALONG
    assert main(["apply", str(output), "--model", str(tmp_path / "idle"), "--output", str(tmp_path / "o")]) == 2
    assert "take the run's own folder" in capsys.readouterr().err
    assert main(["export", str(output), "--format", "gguf"]) == 2
    assert "heads of fewer value dimensions or RoPE pairs" in capsys.readouterr().err


def test_the_greedy_path_takes_them_too(dense: Path, tmp_path: Path) -> None:
    more = (
        "--method",
        "paper",
        "--shares",
        "0:0:1",
        "--width-sequences",
        "2",
        "--ratio",
        "0.04",
        "--kv-group-step",
        "2",
    )
    assert main(_arguments(dense, tmp_path / "run", *more)) == 0
    _, plan = finished(tmp_path / "run")
    assert any(size and size[2] < 16 for size in (plan.structure[n] for n in plan.anatomy.of_kind("attention")))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--value-dim-step", "16"), "value dim step 16 does not fit the 16 value dimensions"),
        (("--layout", "uniform"), "value_dim_step = 4"),
    ],
)
def test_bad_input_is_one_line(more: tuple[str, ...], expected: str, dense: Path, tmp_path: Path, capsys) -> None:
    assert_refused_in_a_line(_arguments(dense, tmp_path / "bad", *more), expected, tmp_path / "bad", capsys)


def test_a_plan_of_other_sizes_is_refused() -> None:
    model = _model()
    anatomy = anatomy_of(model.config, ALONG)
    with pytest.raises(ConfigError, match=r"would keep \(2, 2, 17\) of \(2, 2, 16\) KV groups, query heads, value dim"):
        tiny.plan_for(model, anatomy.dense.replace(0, (2, 2, 17)), 0, ALONG)


def test_a_search_breeds_them(dense: Path, tmp_path: Path) -> None:
    report, plan = bred(_arguments(dense, tmp_path / "run"), tmp_path / "run")
    assert plan.along == ALONG and report["ratio"] >= 0.06
