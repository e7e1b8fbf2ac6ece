"""RoPE pairs that leave inside KV groups: what is cut computes what is masked, everywhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

import multipruner
from multipruner.checkpoint.config import sizes_in
from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.save import save
from multipruner.commands.main import main
from multipruner.core.axes import AXES
from multipruner.core.errors import UnsupportedModelError
from multipruner.core.families import FAMILIES, anatomy_of, spec_for
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Structure
from multipruner.engine.moments import gather
from multipruner.engine.objective import CalibrationObjective, PlainObjective
from multipruner.engine.precision import Held
from multipruner.engine.prunable import Prunable
from multipruner.engine.values.asked import queries_and_keys
from multipruner.importance.rope_pairs import elimination, pair_errors, with_pairs
from multipruner.jobs.prune.given_plan import leading
from multipruner.repair.scoring import Repair
from tests.support import tiny
from tests.support.commands import arguments, assert_refused_in_a_line, bred, finished

ALONG = ("value_dim", "rope_pairs")
ALL = {**tiny.VARIANTS, **tiny.MORE}
PAIRS = AXES["rope_pairs"]
WITH = [name for name, row in ALL.items() if PAIRS in FAMILIES[row["family"]].further and name != "phi-normed"]
TURNED = ["llama", "qwen2", "glm", "phi", "cohere2", "gemma2"]
"""Rotations of each kind: halves and neighbours, of whole heads and of half of them."""


def _model(variant: str = "llama") -> Any:
    return tiny.tiny_model(**ALL[variant])


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@torch.no_grad()
def _loss(model: Any, ids: torch.Tensor) -> float:
    logs = _logits(model, ids)[:, :-1].flatten(0, 1).log_softmax(-1)
    return float(-logs.gather(1, ids[:, 1:].reshape(-1, 1)).mean())


def _dims(pairs: int, width: int, neighbours: bool) -> list[tuple[int, int]]:
    """The dimensions of every pair of a head, written out by hand."""
    return [(2 * p, 2 * p + 1) if neighbours else (p, pairs + p) for p in range(pairs)]


def _without_pairs(model: Any, plan: PruningPlan) -> Any:
    """The dense model, all else masked as ever, whose queries and keys are zero in the pairs that left."""
    masked, spec = tiny.masked_model(model, plan), spec_for(model.config)
    for number, place in enumerate(plan.anatomy):
        kept = plan.blocks[number].axes
        if place.kind != "attention" or not kept:
            continue
        layer = masked.get_submodule(f"{spec.decoder}.{spec.layers}.{place.layer}")
        attention: Any = layer.get_submodule(spec.block("attention").path)
        width, whole, queries = attention.head_dim, place.dense[3], place.dense[1]
        both = _dims(whole, width, spec.model_type in ("glm", "glm4", "cohere2", "ernie4_5", "ernie4_5_moe"))
        for group, pairs in zip(kept[0], kept[3], strict=True):
            gone = [dim for pair in set(range(whole)) - set(pairs) for dim in both[pair]]  # pyright: ignore
            rows = [group * width + dim for dim in gone]  # pyright: ignore
            wide = [(group * queries + query) * width + dim for query in range(queries) for dim in gone]  # pyright: ignore
            for projection, some in ((attention.k_proj, rows), (attention.q_proj, wide)):
                with torch.no_grad():
                    projection.weight[some] = 0
                    if projection.bias is not None:
                        projection.bias[some] = 0
    return masked


@pytest.mark.parametrize("variant", WITH)
def test_cut_computes_what_masked_does_and_weighs_what_is_counted(variant: str) -> None:
    model, ids = _model(variant), tiny.random_ids()
    prunable = Prunable.of(model, along=ALONG)
    for seed in range(2):
        structure = tiny.random_structure(prunable.anatomy, seed, partial=True)
        plan = tiny.plan_for(model, structure, seed, ALONG)
        cut = apply_plan(model, plan)
        assert (_logits(cut, ids) - _logits(_without_pairs(model, plan), ids)).abs().max() < tiny.ROUNDING
        assert sum(weight.numel() for weight in cut.parameters()) == prunable.costs.parameters(structure)
        with prunable.in_order(tiny.random_ranking(prunable.anatomy, seed)):
            losses = [kind(prunable, ids)(structure) for kind in (CalibrationObjective, PlainObjective)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5) == pytest.approx(_loss(cut, ids), abs=1e-4)


@pytest.mark.parametrize("variant", WITH)
def test_nothing_but_a_rotation_is_between_the_projections_and_the_scores(variant: str) -> None:
    """Which is what a row claims: a norm there would be another one where pairs have left. And what the row calls a
    pair is turned within itself: its length is the same behind the rotation.
    """
    model, ids = _model(variant), tiny.random_ids()
    prunable = Prunable.of(model)
    block = prunable.anatomy.of_kind("attention")[0]
    spec, module = prunable.block_spec(block), prunable.module(block)
    assert {name for name, _ in module.named_children()} == {"q_proj", "k_proj", "v_proj", spec.output}
    given_keys: list[torch.Tensor] = []
    hook = module.get_submodule("k_proj").register_forward_hook(lambda *seen: given_keys.append(seen[2]))
    inputs = prunable.inputs(ids)
    state = inputs.hidden
    for before in range(block):
        state = prunable.block(state, inputs, before, prunable.dense[before])
    size = prunable.dense[block]
    with torch.no_grad():
        _, keys = queries_and_keys(module, lambda: prunable.block(state, inputs, block, size))
    hook.remove()
    counts = prunable.counts(block)
    units = torch.tensor(spec.giving(PAIRS.name)[1].dims[0].units(PAIRS.name, counts))
    plain, turned = given_keys[0], keys.transpose(1, 2).flatten(2)
    assert plain.shape == turned.shape
    lengths = [each[..., units].square().sum(dim=-1) for each in (plain, turned)]
    ratio = lengths[1] / lengths[0]  # a family may scale all of them alike
    assert torch.allclose(ratio, ratio.mean(dim=-1, keepdim=True), rtol=1e-3)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_plans_survive_their_json_and_lead_to_themselves(seed: int, other: int) -> None:
    anatomy = anatomy_of(_model("glm").config, ALONG[1:])
    structure = tiny.random_structure(anatomy, seed, partial=True)
    about: dict[str, Any] = {"model": "m", "model_type": "glm"}
    plan = PruningPlan.from_structure(structure, tiny.random_ranking(anatomy, seed), anatomy, **about)
    assert plan.structure == structure and plan.along == ALONG
    assert PruningPlan.from_json(plan.to_json()) == plan
    ranking = leading(plan, tiny.random_ranking(anatomy, other))
    assert PruningPlan.from_structure(structure, ranking, anatomy, **about) == plan


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(TURNED), st.integers(0, 10**6))
def test_whole_pairs_change_nothing_and_what_is_counted_is_there(variant: str, seed: int) -> None:
    """Sizes that name them, and sizes that do not, cost the same and are the same model, a stock one."""
    model, ids = _model(variant), tiny.random_ids()
    prunable, plain = Prunable.of(model, along=ALONG), Prunable.of(model)
    structure = tiny.random_structure(plain.anatomy, seed, partial=True)
    rest = prunable.dense[0][2:]
    named = Structure(tuple((*size, *rest) if len(size) == 2 else size for size in structure))
    for cost in ("parameters", "kv_bytes_per_token", "flops_per_token"):
        assert getattr(prunable.costs, cost)(named) == getattr(plain.costs, cost)(structure)
    ranking = tiny.random_ranking(prunable.anatomy, seed)
    plan = PruningPlan.from_structure(prunable.dense, ranking, prunable.anatomy, model="m", model_type=variant)
    whole = apply_plan(model, plan)
    assert type(whole) is type(model) and torch.equal(_logits(whole, ids), _logits(model, ids))
    fewer = tiny.random_structure(prunable.anatomy, seed, partial=True)
    cut = apply_plan(model, tiny.plan_for(model, fewer, seed, ALONG))
    assert sum(weight.numel() for weight in cut.parameters()) == prunable.costs.parameters(fewer)


def test_parameters_and_products_fall_and_the_cache_stays() -> None:
    costs = Prunable.of(_model("qwen2"), along=ALONG).costs
    fewer = costs.dense.replace(0, (2, 2, 16, 3))
    rows = 5 * 2 * (2 + 4)  # five pairs of two dimensions, of two keys and four queries
    assert costs.parameters(costs.dense) - costs.parameters(fewer) == rows * (48 + 1)
    assert costs.flops_per_token(costs.dense) - costs.flops_per_token(fewer) == 2 * rows * 48
    assert costs.kv_bytes_per_token(fewer) == costs.kv_bytes_per_token(costs.dense)


@pytest.mark.parametrize("variant", ["llama-biased", "qwen2", "glm", "smollm3"])
def test_a_saved_model_gives_the_same_logits(variant: str, tmp_path: Path) -> None:
    model, ids = _model(variant), tiny.random_ids(2, 10)
    structure = tiny.random_structure(anatomy_of(model.config, ALONG), 5, partial=True, drop=0.1)
    pruned = apply_plan(model, plan := tiny.plan_for(model, structure, 3, ALONG))
    save(tmp_path / "run", pruned, None, plan=plan, report={}, card="")
    expected = _logits(pruned, ids)
    loaded: Any = multipruner.load(tmp_path / "run").eval()
    trusted = AutoModelForCausalLM.from_pretrained(tmp_path / "run", trust_remote_code=True).eval()
    assert torch.equal(_logits(loaded, ids), expected) and torch.equal(_logits(trusted, ids), expected)
    assert torch.equal(_logits(copy.deepcopy(loaded), ids), expected)
    _, written = sizes_in(loaded.config.to_dict(), spec_for(model.config))
    there = [size for place, size in zip(plan.anatomy, structure, strict=True) if place.layer in plan.layers]
    assert list(written) == there
    with torch.no_grad():
        cache, steps = None, []
        for place in range(ids.shape[1]):  # through the KV cache, token by token
            step = loaded(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
    assert torch.allclose(torch.cat(steps, dim=1), expected, atol=tiny.ROUNDING)


@pytest.mark.parametrize("form", ["onnx", "openvino"])
def test_graphs_compute_it_too(form: str, tmp_path: Path) -> None:
    """Exports are opened again and compared before the file takes its name."""
    pytest.importorskip("onnxruntime" if form == "onnx" else form)
    model = _model("glm")
    structure = tiny.random_structure(anatomy_of(model.config, ALONG), 5, partial=True, drop=0.1)
    pruned = apply_plan(model, plan := tiny.plan_for(model, structure, 3, ALONG))
    save(tmp_path / "run", pruned, None, plan=plan, report={}, card="")
    assert main(["export", str(tmp_path / "run"), "--format", form, "--outtype", "f32"]) == 0
    assert (tmp_path / f"run-f32.{form}").exists()


def test_layers_on_disk_give_the_same_bits(tmp_path: Path) -> None:
    _model("qwen2").save_pretrained(tmp_path)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path).eval() for _ in range(2))
    whole, walked = (Prunable.of(model, torch.float32, ALONG) for model in (first, second))
    walked.on_disk = Held(second, torch.float32, torch.float32, walked.layers).on_disk
    ids, found = tiny.random_ids(4, 12), list[Any]()
    structure = tiny.random_structure(whole.anatomy, 1, partial=True)
    for prunable in (whole, walked):
        ranking = with_pairs(prunable, tiny.random_ranking(prunable.anatomy, 2), ids)
        errors = pair_errors(prunable, ranking, ids, lambda b: [(2, 2, 16, 3)] if b in (0, 2, 4) else [])
        with prunable.in_order(ranking, Repair(prunable, gather(prunable, ids), ranking)):
            found.append((ranking, errors, CalibrationObjective(prunable, ids)(structure)))
    assert found[0] == found[1] and len(found[0][1]) == 3


def test_families_whose_queries_and_keys_are_normed_or_not_alone_are_refused() -> None:
    for family in ("qwen3", "gemma3_text", "phi3", "cohere", "glm4_moe", "lfm2", "deepseek_v3", "gpt_neox"):
        variant = next(row for row in ALL.values() if row["family"] == family)
        with pytest.raises(UnsupportedModelError, match=r"RoPE pairs cannot leave in this family.*\(rope_pair_step\)"):
            anatomy_of(tiny.tiny_model(**variant).config, ALONG[1:])


def test_elimination_is_the_greedy_one() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    shared = rows @ rows.T
    gone: list[int] = []
    for unit in reversed(elimination(shared)):
        errors = {
            other: float(shared[[*gone, other]][:, [*gone, other]].sum()) for other in range(6) if other not in gone
        }
        assert unit == min(errors, key=errors.__getitem__)
        gone.append(unit)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("variant", TURNED)
def test_a_pair_that_does_nothing_leaves_first(variant: str, text: bool) -> None:
    """Only the keys of one group, or only the queries, are without it, and every group has others."""
    model, ids = _model(variant), tiny.random_ids(6, 20)
    prunable = Prunable.of(model, along=ALONG)
    idle: dict[int, dict[int, int]] = {}
    for block in prunable.anatomy.of_kind("attention"):
        counts = prunable.counts(block)
        queries, keys = prunable.block_spec(block).giving(PAIRS.name)
        for group in range(2):
            pair = (block + 3 * group) % counts["rope_pairs"]
            idle.setdefault(block, {})[group] = pair
            tensor = (queries, keys)[group]
            units = tensor.dims[0].units(PAIRS.name, counts)[group * counts["rope_pairs"] + pair]
            module = prunable.module(block)
            with torch.no_grad():
                module.get_parameter(tensor.path)[list(units)] = 0
                if (bias := dict(module.named_parameters()).get(tensor.path.replace("weight", "bias"))) is not None:
                    bias[list(units)] = 0
    ranking = with_pairs(prunable, Ranking.identity(prunable.anatomy), ids if text else None)
    for block, groups in idle.items():
        orders: Any = ranking.blocks[block].axes[3]
        assert {group: order[-1] for group, order in enumerate(orders)} == groups
        assert all(sorted(order) == list(range(len(order))) for order in orders)
    if text:
        sizes = {block: [(*prunable.dense[block][:3], kept) for kept in (1, 2)] for block in idle}
        errors = pair_errors(prunable, ranking, ids, lambda block: sizes.get(block, []))
        assert set(errors) == set(idle) and all(one[1] > one[2] > 0 for one in errors.values())


def _arguments(dense: Path, output: Path, *more: str) -> list[str]:
    return arguments(dense, output, "--ratio", "0.06", "--channel-group", "40", "--rope-pair-step", "2", *more)


def test_the_command_takes_pairs_out_of_groups(dense: Path, tmp_path: Path, capsys) -> None:
    """Three quarters of them do nothing: without these nothing is lost. The plan alone gives the same model again."""
    model: Any = AutoModelForCausalLM.from_pretrained(dense)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.k_proj.weight.unflatten(0, (2, 2, 8))[:, :, 1:7] = 0
    model.save_pretrained(tmp_path / "idle")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "idle")
    output, more = tmp_path / "run", ("--model", str(tmp_path / "idle"), "--rounds", "1")
    assert main(_arguments(dense, output, *more)) == 0
    report, plan = finished(output)
    assert report["ratio"] >= 0.06 and report["recipe"]["rope_pair_step"] == 2
    blocks = [plan.blocks[n] for n in plan.anatomy.of_kind("attention")]
    assert min(block.size for block in blocks)[3] < 8
    for block in blocks:
        assert block.size[:3] == (2, 2, 16) and block.size[3] in (2, 4, 6, 8)
        assert all({0, 7} <= set(pairs) for pairs in block.axes[3])  # pyright: ignore
    assert report["search"]["loss"] == pytest.approx(0, abs=1e-5)
    assert f"{2 * sum(block.size[3] for block in blocks)} of 64 RoPE" in capsys.readouterr().out
    assert plan.bases == () and plan.along == ALONG
    assert main(_arguments(dense, tmp_path / "again", *more, "--plan", str(output / "plan.json"))) == 0
    assert finished(tmp_path / "again")[1] == plan
    assert main(["apply", str(output), "--model", str(tmp_path / "idle"), "--output", str(tmp_path / "o")]) == 0
    ids = tiny.random_ids()
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "idle")
    applied: Any = multipruner.load(tmp_path / "o")
    assert torch.allclose(_logits(applied, ids), _logits(whole, ids), atol=tiny.ROUNDING)
    capsys.readouterr()
    assert main(["export", str(output), "--format", "gguf"]) == 2
    assert "heads of fewer value dimensions or RoPE pairs" in capsys.readouterr().err


def test_with_value_dimensions_and_without_moments(dense: Path, tmp_path: Path) -> None:
    more = ("--method", "paper", "--shares", "0:0:1", "--width-sequences", "2", "--ratio", "0.04", "--kv-group-step",
            "2", "--value-dim-step", "4")  # fmt: skip
    assert main(_arguments(dense, tmp_path / "run", *more)) == 0
    _, plan = finished(tmp_path / "run")
    sizes = [plan.structure[n] for n in plan.anatomy.of_kind("attention")]
    assert all(len(size) == 4 for size in sizes if size) and any(size and size[2:] < (16, 8) for size in sizes)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--rope-pair-step", "8"), "RoPE pair step 8 does not fit the 8 RoPE pairs"),
        (("--layout", "uniform"), "rope_pair_step = 2"),
    ],
)
def test_bad_input_is_one_line(more: tuple[str, ...], expected: str, dense: Path, tmp_path: Path, capsys) -> None:
    assert_refused_in_a_line(_arguments(dense, tmp_path / "bad", *more), expected, tmp_path / "bad", capsys)


def test_a_search_breeds_them(dense: Path, tmp_path: Path) -> None:
    report, plan = bred(_arguments(dense, tmp_path / "run"), tmp_path / "run")
    assert plan.along == ALONG and report["ratio"] >= 0.06


def test_a_killed_run_goes_on_to_the_same_plan(dense: Path, tmp_path: Path) -> None:
    """One that was killed while it wrote its journal, half of it done."""
    assert main(_arguments(dense, tmp_path / "whole")) == 0
    lines = (tmp_path / "whole" / "measurements.jsonl").read_text().splitlines(keepends=True)
    half = len(lines) // 2
    partial = tmp_path / "run.partial"
    partial.mkdir()
    (partial / "measurements.jsonl").write_text("".join(lines[:half]) + lines[half][:9])
    assert main(_arguments(dense, tmp_path / "run")) == 0
    reports, plans = zip(*(finished(tmp_path / name) for name in ("whole", "run")), strict=True)
    assert plans[0] == plans[1]
    first, second = (report["search"]["work_of_this_process"]["structures"]["evaluations"] for report in reports)
    assert 0 < second < first
