"""The gain of the last norm: what it is on planted answers, and that the written model has it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multipruner.checkpoint.cut import apply_plan
from multipruner.core.plan import PruningPlan
from multipruner.engine.moments import gather
from multipruner.engine.objective import CalibrationObjective, PlainObjective
from multipruner.engine.prunable import Prunable
from multipruner.importance.table import rank
from multipruner.repair import final_norm
from multipruner.repair.final_norm import GainFit
from multipruner.repair.stream import accumulated
from multipruner.repair.write import write_outputs
from tests.support.tiny import VARIANTS, random_ids, random_structure, tiny_model


def _states(prunable: Prunable, tokens: int = 400) -> torch.Tensor:
    chance = torch.Generator().manual_seed(5)
    return torch.randn(4, tokens // 4, prunable.head_weight.shape[1], generator=chance)


def _divergence(prunable: Prunable, dense: torch.Tensor, pruned: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """Summed over tokens; differentiable by the gain."""
    weight = prunable.head_weight.detach()
    logs = [(states @ weight.T).log_softmax(dim=-1) for states in (dense, pruned * gain)]
    return (logs[0].exp() * (logs[0] - logs[1])).sum()


def test_equal_states_ask_for_no_gain() -> None:
    prunable = Prunable.of(tiny_model("llama"))
    states, fit = _states(prunable), GainFit(prunable, 400)
    fit.see(states, states)
    gain = fit.solve()
    assert gain is not None and torch.allclose(gain, torch.ones(48), atol=1e-5)


def test_the_step_is_newtons(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many draws and hardly any damping, it is the exact step of the written formula."""
    monkeypatch.setattr(final_norm, "DRAWS", 400)
    monkeypatch.setattr(final_norm, "RIDGE", 1e-6)
    prunable = Prunable.of(tiny_model("llama"))
    dense = _states(prunable)
    chance = torch.Generator().manual_seed(6)
    pruned = dense + 0.3 * torch.randn(dense.shape, generator=chance)
    fit = GainFit(prunable, 400)
    fit.see(dense, pruned)
    gain = fit.solve()
    assert gain is not None
    first, second = (prunable.normed(states.flatten(0, 1)).detach() for states in (dense, pruned))
    one = torch.ones(48, requires_grad=True)

    def loss(gain: torch.Tensor) -> torch.Tensor:
        return _divergence(prunable, first, second, gain)

    slope = torch.autograd.grad(loss(one), one)[0]
    curvature = torch.autograd.functional.hessian(loss, one.detach())
    assert isinstance(curvature, torch.Tensor)
    exact = 1 - torch.linalg.solve(curvature, slope)
    assert torch.linalg.norm(gain - exact) < 0.1 * torch.linalg.norm(exact - 1)
    assert float(loss(gain)) < float(loss(torch.ones(48)))


def test_a_planted_temperature_is_found_whatever_the_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(final_norm, "RIDGE", 1e6)
    prunable = Prunable.of(tiny_model("llama"))
    states, fit = _states(prunable), GainFit(prunable, 400)
    with prunable.with_outputs({}, torch.full((48,), 1.05)):
        louder = prunable.normed(states)
    fit._states = [(prunable.normed(states.flatten(0, 1)), louder.flatten(0, 1))]
    gain = fit.solve()
    assert gain is not None and torch.allclose(gain, torch.full((48,), 1 / 1.05), atol=5e-3)


def test_tokens_are_taken_evenly_across_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(final_norm, "TOKENS", 60)
    prunable = Prunable.of(tiny_model("llama"))
    states, fit = _states(prunable), GainFit(prunable, 400)
    for batch in states.split(1):
        fit.see(batch, -batch)
    whole = prunable.normed(states.flatten(0, 1))[::7]
    kept = [torch.cat(side) for side in zip(*fit._states, strict=True)]
    assert torch.equal(kept[0], whole) and torch.equal(kept[1], -whole) and len(whole) == 58


def test_a_head_that_is_not_linear_leaves_the_norm_alone() -> None:
    class NormalisedHead(nn.Linear):
        pass

    model = tiny_model("llama", tied=True)
    head = NormalisedHead(48, model.config.vocab_size, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    prunable = Prunable.of(model)
    states, fit = _states(prunable), GainFit(prunable, 400)
    fit.see(states, states)
    assert fit.solve() is None


@pytest.mark.parametrize("factor", [torch.nan, 0.0])
def test_states_that_say_nothing_leave_the_norm_alone(factor: float) -> None:
    prunable = Prunable.of(tiny_model("llama"))
    states, fit = _states(prunable), GainFit(prunable, 400)
    fit.see(states, states * factor)
    assert fit.solve() is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gain_is_what_the_written_model_computes(variant: str) -> None:
    model = tiny_model(**VARIANTS[variant])
    prunable = Prunable.of(model)
    text, ids = random_ids(batch=24, length=20), random_ids(batch=4, length=14)
    ranking = rank("second-order", prunable, gather(prunable, text))
    structure, family = random_structure(prunable.anatomy, 4), prunable.spec.model_type
    plan = PruningPlan.from_structure(structure, ranking, prunable.anatomy, model="m", model_type=family)
    pruned = apply_plan(model, plan)
    fit = GainFit(prunable, text.numel())
    before = prunable.normed(_states(prunable)).detach()
    with prunable.in_order(ranking):
        outputs = accumulated(prunable, structure, text, ends=fit.see)
        gain = fit.solve()
        assert gain is not None and float((gain - 1).abs().max()) > 1e-3
        with prunable.with_outputs(outputs, gain):
            loss, plain = (kind(prunable, ids)(structure) for kind in (CalibrationObjective, PlainObjective))
        without = CalibrationObjective(prunable, ids)(structure)
    assert torch.equal(prunable.normed(_states(prunable)), before), "the dense model is as it was"
    write_outputs(pruned, prunable, plan, ranking, outputs, gain)
    with torch.no_grad():
        logs = pruned(input_ids=ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
    assert loss == pytest.approx(float(-logs.gather(1, ids[:, 1:].reshape(-1, 1)).mean()), rel=1e-4)
    assert loss == pytest.approx(plain, rel=1e-4) and loss != pytest.approx(without, rel=1e-6)
