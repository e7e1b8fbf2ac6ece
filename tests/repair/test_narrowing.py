"""The repair of a narrower residual stream, and the order of its dimensions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.plan import PruningPlan, Ranking
from multipruner.core.structure import Structure
from multipruner.engine.layer_calls import stream_of
from multipruner.engine.objective import CalibrationObjective
from multipruner.engine.prunable import Prunable, Wider
from multipruner.importance.hidden_dims import order_of_stream
from multipruner.importance.stream_bases import basis_of_stream
from multipruner.repair.narrowing import INPUT_RIDGE, fit_to_wider
from multipruner.repair.rotation import write_turned
from multipruner.repair.stream import Fit, accumulated
from tests.support import tiny

KEPT = 40
VARIANTS = {"llama-tied": tiny.VARIANTS["llama-tied"], "llama-biased": tiny.VARIANTS["llama-biased"],
            **{name: tiny.MORE[name] for name in ("olmo2", "glm4", "granite", "starcoder2")}}  # fmt: skip


def _narrower(model: Any, order: tuple[int, ...], kept: int = KEPT, basis: torch.Tensor | None = None) -> Prunable:
    dense = Prunable.of(model)
    ranking = Ranking(Ranking.identity(dense.anatomy).blocks, order)
    structure = Structure(dense.dense.blocks, kept)
    plan = PruningPlan.from_structure(structure, ranking, dense.anatomy, model="", model_type=dense.spec.model_type)
    basis = None if basis is None else basis[:, :kept]
    prunable = Prunable.narrower(apply_plan(model, plan), Wider(dense, torch.tensor(plan.stream), basis))
    if basis is not None:
        write_turned(prunable)
    return prunable


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


@torch.no_grad()
def _on_a_subspace(variant: str) -> tuple[Any, torch.Tensor]:
    """A model whose stream has nothing but in ``KEPT`` directions, none of them an axis; and these."""
    model: Any = tiny.tiny_model(**VARIANTS[variant], tied=False)
    directions = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(3)))[0][:, :KEPT]
    project = directions @ directions.T
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ project)
    for layer in model.model.layers:
        for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
            output.weight.copy_(project @ output.weight)
            if output.bias is not None:
                output.bias.copy_(project @ output.bias)
    return model, directions


@pytest.mark.parametrize("variant", ["llama-biased", "granite"])
def test_directions_that_hold_nothing_leave_without_a_trace(variant: str) -> None:
    """In the basis that is found, with gains of norms alone."""
    model, directions = _on_a_subspace(variant)
    ids = tiny.random_ids(16, 32)
    basis = basis_of_stream(Prunable.of(model), ids)
    assert (basis.T @ basis - torch.eye(48)).abs().max() < 1e-5
    assert (basis[:, :KEPT] @ (basis[:, :KEPT].T @ directions) - directions).abs().max() < 1e-3
    prunable = _narrower(model, tuple(range(48)), basis=basis)
    fit_to_wider(prunable, ids, refit=False)
    with torch.no_grad():
        wanted = model(tiny.random_ids()).logits
        assert (prunable.model(tiny.random_ids()).logits - wanted).abs().max() < 5e-3


@pytest.mark.parametrize("variant", ["llama-biased", "granite"])
def test_a_turned_model_is_brought_back_towards_the_dense_one(variant: str) -> None:
    model, ids = tiny.tiny_model(**VARIANTS[variant], tied=False), tiny.random_ids(16, 32)
    basis, losses = basis_of_stream(Prunable.of(model), ids), {}
    for refit in (False, True):
        prunable = _narrower(model, tuple(range(48)), basis=basis)
        fit_to_wider(prunable, ids, refit=refit)
        losses[refit] = CalibrationObjective(prunable, ids, loss="kl")(prunable.dense)
    assert losses[True] < 0.9 * losses[False]


def test_the_basis_keeps_most_of_what_is_read() -> None:
    """Of the sum over readers, whatever the gains of norms: more than as many axes, and than random directions."""
    model, ids = tiny.tiny_model("llama"), tiny.random_ids(16, 32)
    prunable, read = Prunable.of(model), list[torch.Tensor]()
    norms = [norm for name, norm in model.named_modules() if name.endswith("norm")]
    hooks = [norm.register_forward_hook(lambda norm, _, y: read.append(y / norm.weight)) for norm in norms]
    with torch.no_grad():
        model(ids)
    assert len(read) == len(prunable.anatomy) + 1 and all(hook.remove() is None for hook in hooks)
    seen = torch.cat(read).flatten(0, 1).detach()
    basis, generator = basis_of_stream(prunable, ids), torch.Generator().manual_seed(0)
    for count in (1, 20, 47):
        others = (torch.linalg.qr(torch.randn(48, count, generator=generator))[0] for _ in range(20))
        axes = seen.square().mean(dim=0).topk(count).values.sum()
        least = max(axes, *((seen @ other).square().mean(dim=0).sum() for other in others))
        assert (seen @ basis[:, :count]).square().mean(dim=0).sum() > least


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("options", [{"family": "llama"}, tiny.MORE["nanochat"]], ids=["llama", "norms without gain"])
@torch.no_grad()
def test_a_head_of_its_own_is_refitted_as_one_projection(options: dict[str, Any], turned: bool) -> None:
    """To the logits of the dense model, from what it reads at the end: the plain equations, a row for every token."""
    model, ids = tiny.tiny_model(**{**options, "tied": False}), tiny.random_ids(16, 32)
    dense = Prunable.of(model)
    basis = basis_of_stream(dense, ids) if turned else None
    prunable = _narrower(model, tuple(range(48)), basis=basis)
    before = prunable.head_weight.detach().clone()
    fit_to_wider(prunable, ids)
    states = [_ends(one, ids) for one in (dense, prunable)]
    wanted, x = model.lm_head(model.model.norm(states[0])), prunable.decoder.get_submodule("norm")(states[1])
    fit = Fit()
    fit.add(x, wanted, False)
    assert (prunable.head_weight - fit.solve(before, INPUT_RIDGE)).abs().max() < 1e-4
    assert (prunable.head_weight - before).abs().max() > 1e-2


def _ends(prunable: Prunable, ids: torch.Tensor) -> torch.Tensor:
    inputs = prunable.inputs(ids)
    state = inputs.hidden
    for block, size in enumerate(prunable.dense):
        state = stream_of(prunable.block(state, inputs, block, size))
    return state


def test_a_head_that_is_the_embeddings_stays() -> None:
    model, ids = tiny.tiny_model("llama", tied=True), tiny.random_ids(4, 16)
    prunable = _narrower(model, tuple(range(48)))
    before = prunable.head_weight.detach().clone()
    fit_to_wider(prunable, ids)
    assert torch.equal(prunable.head_weight, before)
