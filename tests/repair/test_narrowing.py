"""The repair of a narrower residual stream, and the order of its dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Structure
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Prunable, Wider
from multipruner.importance.hidden_dims import order_of_stream
from multipruner.repair.narrowing import fit_to_wider
from multipruner.repair.stream import accumulated
from tests.support import tiny

KEPT = 40
VARIANTS = {"llama-tied": tiny.VARIANTS["llama-tied"], "llama-biased": tiny.VARIANTS["llama-biased"],
            **{name: tiny.MORE[name] for name in ("olmo2", "glm4", "granite", "starcoder2")}}  # fmt: skip


def _narrower(model: Any, order: tuple[int, ...], kept: int = KEPT) -> Prunable:
    dense = Prunable.of(model)
    ranking = Ranking(Ranking.identity(dense.anatomy).blocks, order)
    structure = Structure(dense.dense.blocks, kept)
    plan = PruningPlan.from_structure(structure, ranking, dense.anatomy, model="", model_type=dense.spec.model_type)
    return Prunable.narrower(apply_plan(model, plan), Wider(dense, torch.tensor(plan.stream)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_brings_the_model_back_towards_the_dense_one(variant: str) -> None:
    model, ids = tiny.tiny_model(**VARIANTS[variant]), tiny.random_ids(16, 32)
    order = order_of_stream(Prunable.of(model), ids)
    assert sorted(order) == list(range(48))
    losses = {}
    for refit in (None, False, True):
        prunable = _narrower(model, order)
        if refit is not None:
            fit_to_wider(prunable, ids, refit=refit)
        losses[refit] = CalibrationObjective(prunable, ids, loss="kl")(prunable.dense)
    assert losses[True] < 0.9 * min(losses[False], losses[None])


def test_gains_of_norms_are_the_closed_form() -> None:
    """Where the stream is what it was: the root of the mean of squares of what stays over that of all."""
    model, ids = tiny.tiny_model("llama", tied=True), tiny.random_ids(4, 16)
    prunable = _narrower(model, tuple(range(48)))
    norm = model.model.layers[0].input_layernorm
    before = norm.weight.detach()[:KEPT].clone()
    fit_to_wider(prunable, ids, refit=False)
    states = model.model.embed_tokens(ids).float()
    factor = (states[..., :KEPT].square().mean(-1) / states.square().mean(-1)).mean().sqrt()
    now = prunable.model.get_submodule("model.layers.0.input_layernorm").weight
    assert (now - before * factor).abs().max() < 1e-5


def test_dimensions_that_nobody_misses_leave_first() -> None:
    """Those that hold nothing, and one of two that hold the same."""
    model: Any = tiny.tiny_model("llama")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight[[5, 17]], weight[9] = 0, weight[30]
        model.model.embed_tokens.weight[:, [5, 17]] = 0
        model.model.embed_tokens.weight[:, 9] = model.model.embed_tokens.weight[:, 30]
        model.lm_head.weight[:, [9, 30]] = 0
    order = order_of_stream(Prunable.of(model), tiny.random_ids(32, 32))
    assert {5, 17} == set(order[-2:]) and order[-3] in (9, 30)
    some = order_of_stream(Prunable.of(model), tiny.random_ids(32, 32), 45)
    assert some == (*sorted(order[:45]), *order[45:])


def test_a_narrower_model_is_measured_and_repaired_against_the_dense_one() -> None:
    model, ids = tiny.tiny_model("llama", tied=True), tiny.random_ids(8, 32)
    whole = _narrower(model, tuple(range(48)), 47)
    assert CalibrationObjective(whole, ids, loss="kl")(whole.dense) > 1e-3
    prunable = _narrower(model, tuple(range(48)))
    before = CalibrationObjective(prunable, ids, loss="kl")(prunable.dense)
    with prunable.in_order(Ranking.identity(prunable.anatomy)):
        outputs = accumulated(prunable, prunable.dense, ids)
        assert len(outputs) == len(prunable.anatomy), "the first block too: its stream is narrower"
        with prunable.with_outputs(outputs):
            assert CalibrationObjective(prunable, ids, loss="kl")(prunable.dense) < before
