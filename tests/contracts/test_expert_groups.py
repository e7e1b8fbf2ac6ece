"""What is particular to routers that choose groups of experts first: all groups stay as large as each other."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.rehearsal import structures
from multipruner.commands.main import main
from multipruner.core.errors import ConfigError
from multipruner.core.families import anatomy_of, spec_for
from multipruner.core.latency_table import Workload
from multipruner.core.plan import PruningPlan
from multipruner.core.structure import GONE, kept_in_words
from multipruner.engine.moments import gather
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.latency.bench import Effort, measure_table
from multipruner.search import Grid
from multipruner.search.genome import StructureSpace
from multipruner.search.grid import candidates
from tests.support import tiny
from tests.support.commands import paper_arguments
from tests.support.inputs import short_run, write_model

VARIANTS = [name for name, options in tiny.MORE.items() if options.get("n_group", 1) > 1]
variants = pytest.mark.parametrize("variant", VARIANTS)
KIND = "grouped_experts"


def _anatomy(variant: str, **more: Any) -> Any:
    return anatomy_of(tiny.tiny_model(**{**tiny.MORE[variant], **more}).config)


@variants
def test_a_step_takes_experts_of_every_group(variant: str) -> None:
    anatomy = _anatomy(variant)
    place = anatomy.of_kind(KIND)[0]
    grid = Grid({"kv_groups": 1, "group_experts": 1}).of_model(anatomy)
    assert grid.of(anatomy[place]) == ((3,), (2, 3, 4)), "a token takes 3 of 2 groups, so 2 of each"
    fewer = anatomy.dense.replace(place, (3, 3))
    assert (place, (3, 2)) in candidates("mlp", fewer, anatomy, grid)
    least = anatomy.dense.replace(place, (3, 2))
    assert place not in {number for number, _ in candidates("mlp", least, anatomy, grid)}
    blocks = len(anatomy.of_kind(KIND))
    some = f"{blocks} of {blocks} MoE blocks ({12 * blocks - 6} of {12 * blocks} experts)"
    assert some in kept_in_words(least, anatomy)
    (whole,) = structures(anatomy, uniform=False)
    assert {size for size, own in zip(whole, anatomy, strict=True) if own.kind == KIND} <= {(2, 3), (3, 4), GONE}


def test_a_search_finds_sizes_of_groups_alone() -> None:
    anatomy = _anatomy("deepseek_v3-groups")
    grid = Grid({"channels": 8, "kv_groups": 1, "group_experts": 1}).of_model(anatomy)
    space, found = StructureSpace(anatomy, grid), set()
    for seed in range(20):
        structure = space.mutate(space.random(random.Random(seed)), random.Random(seed))
        anatomy.check(structure)
        found |= {structure[number] for number in anatomy.of_kind(KIND)}
    assert found == {GONE, (3, 2), (3, 3), (3, 4)}


def test_no_group_becomes_smaller_than_its_router_compares_or_a_token_takes() -> None:
    for variant, more, least in (
        ("deepseek_v3-groups", {"num_experts_per_tok": 1}, 2),  # the two best of a group are summed
        ("deepseek_v2-groups", {"num_experts_per_tok": 1}, 1),  # the best alone says what a group is worth
        ("deepseek_v2-groups", {"num_experts_per_tok": 5, "topk_group": 2}, 3),
    ):
        anatomy = _anatomy(variant, **more)
        assert anatomy.least("group_experts") == least
        place = anatomy.of_kind(KIND)[0]
        anatomy.check(anatomy.dense.replace(place, (3, least)))
        if least > 1:
            with pytest.raises(ConfigError, match=r"keep 1 experts in each of the expert groups.* at least [23]"):
                anatomy.check(anatomy.dense.replace(place, (3, 1)))
        with pytest.raises(ConfigError, match="keep 1 expert groups, and a token goes through 2"):
            anatomy.check(anatomy.dense.replace(place, (1, 4)))


def test_groups_that_a_router_does_not_look_at_are_none() -> None:
    """DeepSeek-V2's plain routers have them in the configuration, too; so has a model with one group."""
    anatomy = _anatomy("deepseek_v2-groups", topk_method="greedy")
    assert [place.dense for place in anatomy if place.kind == "experts"] == [(12,), (12,)]
    assert _anatomy("deepseek_v3-groups", n_group=1, topk_group=1).kinds == ("attention", "mlp", "experts")


@variants
def test_experts_are_ordered_within_their_groups(variant: str) -> None:
    model: Any = tiny.tiny_model(**tiny.MORE[variant])
    prunable, ids = Prunable.of(model), tiny.random_ids(4, 32)
    moments, number = gather(prunable, ids), prunable.anatomy.of_kind(KIND)[0]
    stack = prunable.module(number).get_parameter(prunable.block_spec(number).inputs[0].path)
    scores = {
        "second-order": moments.routes[number].mean,
        "activation": moments.routes[number].squares,
        "magnitude": stack.abs().sum((1, 2)),
    }
    for name, each in scores.items():
        groups, order = rank(name, prunable, moments, within=("group_experts",)).blocks[number].axes
        assert groups == (0, 1, 2)
        rows = each.view(3, 4).argsort(descending=True, stable=True)
        assert order == tuple(map(tuple, rows.tolist())), name
    assert rank("activation", prunable, moments).blocks[number].axes[1] == ((0, 1, 2, 3),) * 3


def test_a_run_prunes_groups_alike_and_goes_on_where_it_was_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_model(tmp_path / "dense", **{"layers": 3, **tiny.MORE["deepseek_v3-groups"]})
    output = tmp_path / "program"
    asked = ("--repair", "none", "--dimensions", "mlp,heads")
    assert main([*short_run(folder, output), *asked]) == 0, capsys.readouterr().err
    report = json.loads((output / "report.json").read_text())
    count = sum(weight.numel() for weight in load(output).parameters())
    assert report["parameters"]["after"] == count and 0.15 < report["ratio"] < 0.3
    plan = PruningPlan.from_json((output / "plan.json").read_text())
    sizes = [kept.size for place, kept in zip(plan.anatomy, plan.blocks, strict=True) if place.kind == KIND]
    assert all(size in ((3, 2), (3, 3), (3, 4)) for size in sizes) and any(size != (3, 4) for size in sizes)
    assert main([*short_run(folder, tmp_path / "x"), "--expert-step", "7"]) == 2
    assert "expert step 7 does not fit the 4 experts of one of the expert groups" in capsys.readouterr().err
    arguments = paper_arguments(folder, tmp_path / "greedy", "--ratio", "0.3", "--repair", "none")
    arguments += ["--freeze", "experts:1"]
    assert main(arguments) == 0, capsys.readouterr().err
    lines = (tmp_path / "greedy" / "trajectory.jsonl").read_text().splitlines(keepends=True)
    wanted = (tmp_path / "greedy" / "plan.json").read_bytes()
    first = PruningPlan.from_json(wanted.decode())
    assert first.blocks[first.anatomy.at(1, KIND)].size == (3, 4), "it is frozen"
    (tmp_path / "greedy").rename(tmp_path / "before")
    partial = tmp_path / "greedy.partial"
    partial.mkdir()
    (partial / "trajectory.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    assert main(arguments) == 0
    assert (tmp_path / "greedy" / "plan.json").read_bytes() == wanted


def test_a_latency_table_knows_sizes_of_groups_alone() -> None:
    model = tiny.tiny_model(**tiny.MORE["deepseek_v2-groups"])
    effort = Effort(probes=1, placements=1, repeats=1, warmup=0, tries=1)
    table = measure_table(model, [Workload("prefill", 1, 4)], channel_step=20, effort=effort)
    assert set(table.row("prefill-b1-t4").blocks[KIND]) == {GONE, (3, 2), (3, 3), (3, 4)}


@torch.no_grad()
def test_groups_may_be_named_in_a_plan() -> None:
    """No search takes one out; a plan may, down to as many as a token chooses."""
    model: Any = tiny.tiny_model(**tiny.MORE["glm4_moe-groups"])
    anatomy = anatomy_of(model.config)
    structure = anatomy.dense
    for number in anatomy.of_kind(KIND):
        structure = structure.replace(number, (2, 3))
    plan = tiny.plan_for(model, structure)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    cut: Any = apply_plan(model, plan)
    assert type(cut) is type(model) and (cut.config.n_group, cut.config.n_routed_experts) == (2, 6)
    ids = tiny.random_ids()
    assert (cut(ids).logits - tiny.masked_model(model, plan)(ids).logits).abs().max() < 1e-4  # pyright: ignore
    assert spec_for(cut.config).kinds[-1] == KIND
