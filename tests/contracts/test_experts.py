"""What is particular to mixtures of experts, for every family: routers, layouts on disk, layers of two kinds."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.rehearsal import structures
from multipruner.checkpoint.save import save
from multipruner.commands.main import main
from multipruner.core.errors import ConfigError
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.latency_table import Workload
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import GONE, Anatomy, Structure
from multipruner.engine.moments import Routes, Statistics, gather, seldom_routed
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.latency.bench import Effort, measure_table
from multipruner.latency.deal import Deck, deal
from multipruner.search import Grid
from multipruner.search.genome import StructureSpace
from multipruner.search.grid import candidates
from multipruner.sources.intake.accounting import account
from tests.support import tiny
from tests.support.inputs import short_run, write_model

_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
VARIANTS = [name for name, options in tiny.MORE.items() if any(map(options.get, _KEYS))]
variants = pytest.mark.parametrize("variant", VARIANTS)
PUBLISHED_STACKED = ["gpt_oss"]
OF_BOTH_KINDS = "qwen3_moe"
_STOCK = """
import sys
sys.modules["multipruner"] = None
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        torch.save(model.eval()(torch.load(sys.argv[1])).logits, folder + "/logits.pt")
"""


def _model(variant: str, **more: Any) -> PreTrainedModel:
    options: dict[str, Any] = {**tiny.MORE[variant], **more}
    for key in ("layer_types", "mlp_layer_types"):
        if options.get(key):
            options[key] = (2 * options[key])[: options.get("layers", 3)]
    return tiny.tiny_model(**options)


def kind_of(variant: str) -> str:
    """What the blocks of experts of a tiny model are."""
    return "grouped_experts" if tiny.MORE[variant].get("n_group", 1) > 1 else "experts"


def _fewer(anatomy: Anatomy, experts: int, without: int) -> Structure:
    """So many experts in every layer that has some, or in every group of them, and a whole layer gone."""
    sizes = ((*p.dense[:-1], experts) if p.kind.endswith("experts") else p.dense for p in anatomy)
    rows = zip(anatomy, sizes, strict=True)
    return Structure(tuple(GONE if place.layer == without else size for place, size in rows))


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(tiny.random_ids(), use_cache=False).logits


def test_equally_many_experts_everywhere_are_a_stock_checkpoint(tmp_path: Path) -> None:
    """Also where a layer is gone and the numbers of those with an MLP are others."""
    torch.save(tiny.random_ids(), tmp_path / "ids.pt")
    wanted = {}
    for variant in VARIANTS:
        model = _model(variant, layers=4)
        plan = tiny.plan_for(model, _fewer(anatomy_of(model.config), 3, 0))
        cut = apply_plan(model, plan)
        assert type(cut) is type(model)
        assert (_logits(cut) - _logits(tiny.masked_model(model, plan))).abs().max() < 1e-4, variant
        folder = tmp_path / variant
        save(folder, cut, tiny.tiny_tokenizer(), plan=plan, report={}, card="")
        assert not list(folder.glob("*.py"))
        assert (_logits(load(folder)) - _logits(cut)).abs().max() < tiny.ROUNDING
        wanted[str(folder)] = _logits(cut)
    command = [sys.executable, "-c", _STOCK, str(tmp_path / "ids.pt"), *wanted]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, logits in wanted.items():
        assert (torch.load(f"{folder}/logits.pt") - logits).abs().max() < tiny.ROUNDING, folder


@variants
def test_both_layouts_on_disk_are_the_same_model(variant: str, tmp_path: Path) -> None:
    """One matrix for each expert, as published, or stacks of them, as transformers hold them."""
    model = _model(variant)
    spec, names = spec_for(model.config), {}
    for layout, published in (("published", True), ("stacked", False)):
        model.save_pretrained(tmp_path / layout, save_original_format=published)
        account(tmp_path / layout, variant, model.config, spec)  # refuses a tensor without a place
        names[layout] = set(load_file(tmp_path / layout / "model.safetensors"))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / layout).eval()
        weights = zip(again.state_dict().values(), model.state_dict().values(), strict=True)
        assert all(torch.equal(*pair) for pair in weights)
        assert (_logits(again) - _logits(model)).abs().max() < tiny.ROUNDING
        plan = tiny.plan_for(again, _fewer(anatomy_of(again.config), 3, -1))
        folder = save(tmp_path / f"{layout}-cut", apply_plan(again, plan), None, plan=plan, report={}, card="")
        names[f"{layout}-cut"] = set(load_file(folder / "model.safetensors"))
    assert (names["published"] == names["stacked"]) == (variant in PUBLISHED_STACKED)
    assert names["published-cut"] <= names["published"] and names["stacked-cut"] == names["stacked"]


def test_fewer_experts_than_a_token_takes_are_neither_offered_nor_cut() -> None:
    model = _model("mixtral")
    anatomy = anatomy_of(model.config)
    grid = Grid({"channels": 8, "kv_groups": 1, "experts": 1}).of_model(anatomy)
    place = anatomy.of_kind("experts")[0]
    assert grid.of(anatomy[place]) == ((2, 3, 4, 5),)
    least = anatomy.dense.replace(place, (2,))
    assert place not in {number for number, _ in candidates("mlp", least, anatomy, grid)}
    (whole,) = structures(anatomy_of(_model("mixtral", num_local_experts=2).config), uniform=False)
    assert {size for size in whole if len(size) == 1} == {(2,)}, "as many as a token takes: there is nothing to try"
    too_few = anatomy.dense.replace(place, (1,))
    with pytest.raises(ConfigError, match="MoE block of layer 0 would keep 1 experts, and a token goes through 2"):
        tiny.plan_for(model, too_few)
    plan = PruningPlan.from_json(tiny.plan_for(model, least).to_json().replace(_kept(model, least), '"experts": "3"'))
    with pytest.raises(ConfigError, match="keep at least 2"):
        apply_plan(model, plan)


def _kept(model: PreTrainedModel, structure: Structure) -> str:
    plan = tiny.plan_for(model, structure)
    first = plan.blocks[plan.anatomy.of_kind("experts")[0]].axes[0]
    return f'"experts": "{first[0]}-{first[1]}"' if first[1] == first[0] + 1 else f'"experts": "{first[0]},{first[1]}"'  # pyright: ignore


@torch.no_grad()
def test_experts_are_ordered_by_routed_weight_times_output_norm() -> None:
    """Against a loop over tokens and their experts, with each expert's matrices multiplied by hand."""
    model: Any = _model("mixtral")
    prunable, ids, inputs = Prunable.of(model), tiny.random_ids(3, 16), []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0][0]))
    for row in ids:
        model(row[None])
    hook.remove()
    block, found = model.model.layers[1].mlp, gather(prunable, ids)
    seen: dict[int, list[float]] = {expert: [] for expert in range(5)}
    for token in torch.cat(inputs):
        shares = (block.gate.weight @ token).softmax(0)
        best = shares.topk(2).indices.tolist()
        for expert in best:
            gate, up = (block.experts.gate_up_proj[expert] @ token).chunk(2)
            out = block.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
            seen[expert].append(float(shares[expert] / shares[best].sum() * out.norm()))
    number = prunable.anatomy.at(1, "experts")
    routes = found.routes[number]
    means = [sum(each) / max(len(each), 1) for each in seen.values()]
    squares = [sum(s * s for s in each) / ids.numel() for each in seen.values()]
    assert routes.tokens.tolist() == [len(each) for each in seen.values()]
    assert routes.mean.tolist() == pytest.approx(means, rel=1e-4)
    assert routes.squares.tolist() == pytest.approx(squares, rel=1e-4)
    for importance, scores in (("second-order", means), ("activation", squares)):
        (order,) = rank(importance, prunable, found).blocks[number].axes
        assert order == tuple(sorted(range(5), key=lambda expert: -scores[expert]))
    sums = [float(block.experts.gate_up_proj[expert].abs().sum()) for expert in range(5)]
    (order,) = rank("magnitude", prunable).blocks[number].axes
    assert order == tuple(sorted(range(5), key=lambda expert: -sums[expert]))


@pytest.mark.parametrize("variant", ["gpt_oss", "deepseek_v3"])
def test_norms_are_of_what_feeds_a_unit(variant: str) -> None:
    """Of stacks that lie transposed, and of matrices that make heads of low-rank states."""
    model: Any = _model(variant)
    prunable, layer = Prunable.of(model), model.model.layers[1]
    if variant == "gpt_oss":
        number, sums = prunable.anatomy.at(1, "experts"), layer.mlp.experts.gate_up_proj.abs().sum((1, 2))
    else:
        number, made = prunable.anatomy.at(1, "attention"), (layer.self_attn.q_b_proj, layer.self_attn.kv_b_proj)
        sums = torch.stack([each.weight.abs().reshape(4, -1).sum(1) for each in made]).sum(0)
    assert rank("magnitude", prunable).blocks[number].axes[0] == tuple(sums.argsort(descending=True).tolist())


def test_experts_that_saw_few_tokens_are_named_in_one_line() -> None:
    anatomy = anatomy_of(_model(OF_BOTH_KINDS).config)
    first, last = anatomy.of_kind("experts")
    zeros = torch.zeros(5)
    many, few = torch.tensor([90, 80, 70, 60, 50]), torch.tensor([90, 31, 70, 0, 50])
    moments = Statistics(routes={first: Routes(many, zeros, zeros)})
    assert seldom_routed(moments, anatomy) is None
    moments.routes[last] = Routes(few, zeros, zeros)
    said = seldom_routed(moments, anatomy)
    assert said is not None and "layer 2: 2 of 5 (one of them 0)" in said and "\n" not in said


@variants
def test_operations_count_the_experts_that_a_token_takes(variant: str) -> None:
    """The matrices that a token meets, as the model has them; a smaller choice saves the router's rows alone."""
    model: Any = _model(variant)
    prunable = Prunable.of(model)
    costs, met, looked_up = (
        prunable.costs,
        0,
        None if model.config.tie_word_embeddings else model.get_input_embeddings(),
    )
    for name, weight in model.named_parameters():
        if ".experts." in name and weight.dim() == 3:
            met += prunable.anatomy.constants["active"] * weight[0].numel()
        elif weight.dim() >= 2 and weight is not getattr(looked_up, "weight", None) and not name.endswith("bias"):
            met += weight.numel()
    assert costs.flops_per_token(prunable.dense) == 2 * met
    number = prunable.anatomy.of_kind(kind_of(variant))[-1]
    dense, size = prunable.dense[number], (*prunable.dense[number][:-1], 3)
    saved = costs.flops_per_token(prunable.dense) - costs.flops_per_token(prunable.dense.replace(number, size))
    assert saved == 2 * (prod(dense) - prod(size)) * prunable.anatomy.constants["hidden"]


def test_layers_of_two_kinds_are_dealt_and_searched_as_they_are() -> None:
    """A probe shows every option of every kind; a search knows its ends though kinds are not equally many."""
    model = _model(OF_BOTH_KINDS, layers=6, mlp_only_layers=[0, 4])
    anatomy, rng = anatomy_of(model.config), random.Random(1)
    assert [anatomy.of_kind(kind) for kind in anatomy.kinds] == [(0, 2, 4, 6, 8, 10), (1, 9), (3, 5, 7, 11)]
    options = {"attention": [GONE, (2, 2)], "mlp": [GONE, (40,)], "experts": [GONE, (2,), (5,)]}
    structure = deal({kind: Deck(sizes, rng) for kind, sizes in options.items()}, 4, anatomy, rng)
    assert anatomy.living_layers(structure) == [0, 1, 2, 3]
    for kind, sizes in options.items():
        assert {structure[number] for number in anatomy.of_kind(kind)} <= set(sizes)
    grid = Grid({"channels": 8, "kv_groups": 1, "experts": 1}).of_model(anatomy)
    space = StructureSpace(anatomy, grid)
    ends = space._extremes()
    assert {number for end in ends[1:] for number, size in enumerate(end) if size} == set(range(len(anatomy)))
    for seed in range(5):
        found = space.mutate(space.random(random.Random(seed)), random.Random(seed))
        assert all(anatomy.count(found, kind) for kind in anatomy.kinds)
        anatomy.check(found)


def test_a_run_prunes_experts_and_writes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method; the MLP of the layer that has one has its own channels. First tables from energies measure experts,
    whose errors nobody knows.
    """
    folder = write_model(tmp_path / "dense", **{"layers": 3, **tiny.MORE[OF_BOTH_KINDS]})
    for asked in (
        ("--repair", "none"),
        ("--method", "paper", "--repair", "none"),
        ("--tables", "energies", "--repair", "lstsq"),
    ):
        output = tmp_path / asked[1]
        assert main([*short_run(folder, output), *asked]) == 0, capsys.readouterr().err
        report = json.loads((output / "report.json").read_text())
        assert 0.15 < report["ratio"] < 0.3
        plan = PruningPlan.from_json((output / "plan.json").read_text())
        anatomy = anatomy_of(AutoModelForCausalLM.from_pretrained(folder).config)
        assert plan.anatomy == anatomy and anatomy.kinds == ("attention", "experts", "mlp")
        assert "MoE" in capsys.readouterr().out
        assert load(output) is not None
    assert main([*short_run(folder, tmp_path / "x"), "--expert-step", "7"]) == 2
    assert "expert step 7 does not divide the 5 experts" in capsys.readouterr().err


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They stand behind the others in a checkpoint, and stock models do not load them."""
    folder = write_model(tmp_path / "dense", **{"layers": 3, **tiny.MORE["deepseek_v3"]})
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name.replace("layers.2", "layers.3"): each + 1 for name, each in tensors.items() if "layers.2." in name}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    record = json.loads((folder / "config.json").read_text())
    assert main([*short_run(folder, tmp_path / "out"), "--repair", "none"]) == 0, capsys.readouterr().err
    assert "num_nextn_predict_layers = 1" in capsys.readouterr().out
    assert load(tmp_path / "out").config.num_nextn_predict_layers == 0
    (folder / "config.json").write_text(json.dumps({**record, "num_nextn_predict_layers": 0}))
    assert main([*short_run(folder, tmp_path / "more"), "--repair", "none"]) == 2
    assert "tensors without a place: layer 3" in capsys.readouterr().err


def test_a_latency_table_knows_every_kind_of_block() -> None:
    """One probe at least shows every option of every kind; what a token takes is the least of experts."""
    model = _model(OF_BOTH_KINDS)
    effort = Effort(probes=1, placements=1, repeats=1, warmup=0, tries=1)
    workload = Workload("prefill", 1, 4)
    table = measure_table(model, [workload], channel_step=20, effort=effort)
    entries = table.row(workload.name).blocks
    assert {kind: set(sizes) for kind, sizes in entries.items() if kind != "attention"} == {
        "experts": {GONE, (2,), (3,), (4,), (5,)},
        "mlp": {GONE, (20,), (40,)},
    }
    anatomy = anatomy_of(model.config)
    assert table.milliseconds(anatomy.dense, anatomy, workload.name) > 0
