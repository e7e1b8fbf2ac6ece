"""The contract of every family: cutting a model gives the same logits as silencing the same parts of it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.checkpoint import classes
from multipruner.checkpoint.classes import family_of, model_class, modeling_source
from multipruner.checkpoint.config import pruned_config
from multipruner.checkpoint.cut import apply_plan
from multipruner.core.errors import ConfigError, UnsupportedModelError
from multipruner.core.families import FAMILIES, anatomy_of, spec_for
from multipruner.core.plan import BlockUnits, PruningPlan
from multipruner.core.structure import GONE
from multipruner.engine.prunable import Prunable
from tests.support import tiny
from tests.support.layers import changed, structure_of, uniform

TOLERANCE = 3e-5
variants = pytest.mark.parametrize("variant", tiny.VARIANTS)


@torch.no_grad()
def _difference(one, other, ids=None) -> float:
    ids = tiny.random_ids() if ids is None else ids
    return (one(ids).logits - other(ids).logits).abs().max().item()


@variants
@pytest.mark.parametrize("seed", range(6))
def test_sliced_equals_masked(variant: str, seed: int) -> None:
    model = tiny.tiny_model(**tiny.VARIANTS[variant])
    plan = tiny.random_plan(model, seed, drop=0.4)
    pruned = apply_plan(model, plan)
    assert _difference(pruned, tiny.masked_model(model, plan)) < TOLERANCE
    assert _difference(pruned, model) > 0.01, "the plan removed nothing that matters"


@variants
def test_removed_blocks_alone_change_no_bit(variant: str) -> None:
    model = tiny.tiny_model(**tiny.VARIANTS[variant])
    anatomy = anatomy_of(model.config)
    structure = anatomy.dense.replace(anatomy.at(0, "attention"), GONE).replace(anatomy.at(2, "mlp"), GONE)
    plan = tiny.plan_for(model, structure)
    assert _difference(apply_plan(model, plan), tiny.masked_model(model, plan)) == 0


@variants
def test_nothing_removed_changes_no_bit(variant: str) -> None:
    model = tiny.tiny_model(**tiny.VARIANTS[variant])
    assert _difference(apply_plan(model, tiny.plan_for(model, anatomy_of(model.config).dense)), model) == 0


@variants
def test_the_same_bits_every_time_and_the_dense_model_is_left_alone(variant: str) -> None:
    model = tiny.tiny_model(**tiny.VARIANTS[variant])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = tiny.random_plan(model, 1)
    one, other = apply_plan(model, plan), apply_plan(model, PruningPlan.from_json(plan.to_json()))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@variants
def test_parameters_are_those_the_costs_promise(variant: str) -> None:
    model = tiny.tiny_model(**tiny.VARIANTS[variant])
    costs = Prunable.of(model).costs
    for seed in range(4):
        plan = tiny.random_plan(model, seed, drop=0.4)
        pruned = apply_plan(model, plan)
        assert pruned.num_parameters() == costs.parameters(plan.structure)
        assert {parameter.dtype for parameter in pruned.parameters()} == {torch.float32}


def test_a_layer_without_blocks_disappears() -> None:
    model = tiny.tiny_model(
        "qwen2", layers=4, layer_types=tiny.MIXED_WINDOWS, use_sliding_window=True, sliding_window=3
    )
    plan = tiny.plan_for(model, changed(anatomy_of(model.config).dense, 1, (0, 0, 0)))
    pruned = apply_plan(model, plan)
    assert pruned.config.num_hidden_layers == 3
    assert pruned.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert _difference(pruned, tiny.masked_model(model, plan)) == 0


def test_query_heads_can_be_pruned_within_groups() -> None:
    model = tiny.tiny_model("llama")
    heads, channels = BlockUnits(((0, 1), ((1,), (0,)))), BlockUnits((tuple(range(0, 40, 3)),))
    plan = PruningPlan("tiny", None, None, "llama", anatomy_of(model.config), (heads, channels) * 3)
    pruned = apply_plan(model, plan)
    assert plan.structure == structure_of(*[(2, 2, 14)] * 3)
    assert _difference(pruned, tiny.masked_model(model, plan)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_generation_settings_and_attention_are_carried_over(dtype: torch.dtype) -> None:
    model = tiny.tiny_model("llama", dtype=dtype)
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 7
    pruned = apply_plan(model, tiny.random_plan(model, 2))
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    assert pruned.generation_config.max_new_tokens == 7
    assert pruned.config._attn_implementation == "eager"
    assert not pruned.training


def test_tied_embeddings_stay_tied() -> None:
    model = tiny.tiny_model("llama", tied=True)
    pruned = apply_plan(model, tiny.random_plan(model, 3))
    head = pruned.get_output_embeddings()
    assert head is not None and pruned.get_input_embeddings().weight is head.weight
    assert pruned.get_input_embeddings().weight is not model.get_input_embeddings().weight


def test_configuration_says_what_is_left() -> None:
    model = tiny.tiny_model("llama")
    dense = anatomy_of(model.config).dense
    plan = tiny.plan_for(model, changed(changed(dense, 1, (0, 0, 24)), 2, (2, 1, 0)))
    config = pruned_config(model.config, plan)
    assert config.model_type == "multipruner_llama"
    assert family_of(config) is spec_for(model.config)
    record = config.to_dict()
    assert record["head_dim"] == 16
    assert record["rope_theta"] == record["rope_parameters"]["rope_theta"] == 50000.0
    removed = {"num_attention_heads": 1, "num_key_value_heads": 1, "skip": ["attention"], "intermediate_size": 24}
    kept = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 1, "skip": ["mlp"]}
    assert record["per_layer_config"] == {"1": removed, "2": kept}
    assert model.config.model_type == "llama"


def test_head_counts_need_not_divide_the_hidden_size() -> None:
    model = tiny.tiny_model("llama", num_attention_heads=6, num_key_value_heads=6)
    plan = tiny.plan_for(model, changed(anatomy_of(model.config).dense, 0, (5, 5, 40)))
    config = apply_plan(model, plan).config
    config.validate()
    assert type(config)(**config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.parametrize("rope_type", ["linear", "dynamic", "yarn"])
def test_scaled_rotary_embeddings_survive_differing_layers(rope_type: str, tmp_path) -> None:
    rope = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    model = tiny.tiny_model("llama", rope_parameters=rope, max_position_embeddings=32)
    plan = tiny.random_plan(model, 5)
    pruned, ids = apply_plan(model, plan), tiny.random_ids(batch=2, length=14)
    assert pruned.config.model_type != model.config.model_type, "mixed layers"
    assert _difference(pruned, tiny.masked_model(model, plan), ids) < TOLERANCE
    pruned.save_pretrained(tmp_path)
    loaded = type(pruned).from_pretrained(tmp_path)
    assert _difference(pruned, loaded, ids) == 0


def test_a_plan_for_another_model_is_refused() -> None:
    llama, qwen = tiny.tiny_model("llama"), tiny.tiny_model("qwen2")
    with pytest.raises(ConfigError, match="made for a 'qwen2' model"):
        apply_plan(llama, tiny.random_plan(qwen))
    with pytest.raises(ConfigError, match="2 layers"):
        apply_plan(llama, tiny.random_plan(tiny.tiny_model("llama", layers=2)))
    with pytest.raises(ConfigError, match="no decoder layer"):
        apply_plan(llama, tiny.plan_for(llama, anatomy_of(llama.config).empty))


def test_offloaded_weights_are_refused() -> None:
    model = tiny.tiny_model("llama")
    plan = tiny.random_plan(model)
    with pytest.raises(UnsupportedModelError, match="offloaded"):
        apply_plan(model.to(torch.device("meta")), plan)  # pyright: ignore


def test_a_pruned_model_is_not_a_dense_one() -> None:
    model = tiny.tiny_model("llama")
    pruned = apply_plan(model, tiny.random_plan(model))
    with pytest.raises(UnsupportedModelError):
        spec_for(pruned.config)


def test_modelling_code_names_one_family_and_imports_no_multipruner() -> None:
    for family in tiny.STOCK:
        spec = spec_for(tiny.tiny_model(family).config)
        source = modeling_source(spec)
        assert "import multipruner" not in source and "from multipruner" not in source
        assert "# family:" not in source
        assert ("lama" in source.replace("multipruner_llama", "llama")) == (family == "llama")
        assert model_class(spec) is model_class(spec)
    baichuan = tiny.tiny_model("baichuan")
    with pytest.raises(ConfigError, match="trust_remote_code"):
        model_class(spec_for(baichuan.config))


def test_the_template_is_the_llama_that_is_rendered() -> None:
    template = (Path(classes.__file__).parent / "template.py").read_text()
    marks = ("# family: begin\n", "# family: end\n")
    for mark in marks:
        template = template.replace(mark, "")
    assert modeling_source(FAMILIES["llama"]) == template


def test_lists_with_a_value_per_layer_lose_those_of_layers_that_are_gone() -> None:
    model = tiny.tiny_model("llama", layers=4)
    model.config.window_of_layer, model.config.extra_token_ids = [1, 2, 3, 4], [5, 6, 7, 8]
    dense = anatomy_of(model.config).dense
    for change in ((0, 0, 0), (2, 1, 0)):
        plan = tiny.plan_for(model, changed(changed(dense, 1, (0, 0, 0)), 2, change))
        record = pruned_config(model.config, plan).to_dict()
        assert record["window_of_layer"] == ([1, 3, 4] if any(change) else [1, 4])
        assert record["extra_token_ids"] == [5, 6, 7, 8], "four by chance"


def test_weights_of_other_shapes_than_the_rows_are_refused() -> None:
    model = tiny.tiny_model("llama")
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(48, 39, bias=False)
    with pytest.raises(UnsupportedModelError, match=r"up_proj.weight is \(39, 48\).*channels x hidden.*\(40, 48\)"):
        Prunable.of(model)
    with pytest.raises(ConfigError, match=r"up_proj.weight is \(39, 48\), the plan was made"):
        apply_plan(model, tiny.plan_for(model, anatomy_of(model.config).dense))


@st.composite
def plans(draw: st.DrawFn) -> PruningPlan:
    groups, per_group, channels = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 70))
    anatomy = uniform(draw(st.integers(1, 4)), groups * per_group, groups, channels)
    rng = random.Random(draw(st.integers(0, 2**32)))
    structure = tiny.random_structure(anatomy, rng.randrange(1000), drop=draw(st.floats(0, 1)))
    model, revision = draw(st.text(max_size=20)), draw(st.none() | st.text(max_size=8))
    ranking = tiny.random_ranking(anatomy, rng.randrange(1000))
    return PruningPlan.from_structure(structure, ranking, anatomy, model=model, revision=revision, model_type="llama")


@settings(max_examples=60)
@given(plans())
def test_plans_survive_their_json(plan: PruningPlan) -> None:
    text = plan.to_json()
    assert PruningPlan.from_json(text) == plan
    assert PruningPlan.from_json(text).to_json() == text
