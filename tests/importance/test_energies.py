"""Sensitivities are what the divergence does: by definition, and by many draws of errors; no weight learns."""

from __future__ import annotations

import pytest
import torch

from multipruner.engine.layer_calls import State, stream_of
from multipruner.engine.prunable import Prunable
from multipruner.importance import energies
from tests.support.tiny import MORE, VARIANTS, random_ids, tiny_model


def plain_gradients(prunable: Prunable, ids: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Energies of every token behind every block, by one graph through the whole model."""
    generator = torch.Generator().manual_seed(seed)
    found: list[list[torch.Tensor]] = [[] for _ in prunable.anatomy]
    for row in ids.split(1):
        inputs = prunable.inputs(row)
        state: State = inputs.hidden.detach()
        states = []
        for block, size in enumerate(prunable.dense):
            state = prunable.block(state, inputs, block, size)
            states.append(stream_of(state).requires_grad_() if not block else stream_of(state))
        logits = prunable.head(prunable.normed(stream_of(state)))[0]
        root = logits.detach().softmax(-1).sqrt()
        drawn = root * torch.randn(root.shape, generator=generator)
        gradients = torch.autograd.grad(logits, states, drawn - root.square() * drawn.sum(1, keepdim=True))
        for block, gradient in enumerate(gradients):
            found[block].append(gradient.square().sum(-1).flatten())
    return [torch.cat(one) for one in found]


@pytest.mark.parametrize("variant", ["llama-tied", "qwen2", "cohere", "falcon-40b", "qwen3_moe"])
def test_block_by_block_is_one_graph(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where blocks run side by side, too, and where some are experts."""
    model, ids = tiny_model(**{**VARIANTS, **MORE}[variant]), random_ids(3, 12)
    prunable = Prunable.of(model)
    monkeypatch.setattr(energies, "QUANTILE", 1.0)
    learning = [weight.requires_grad for weight in model.parameters()]
    calls: list[tuple[int, int]] = []
    found = energies.sensitivities(prunable, ids, seed=4, progress=lambda *at: calls.append(at))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert [weight.requires_grad for weight in model.parameters()] == learning
    assert all(weight.grad is None for weight in model.parameters())
    width = prunable.head_weight.shape[1]
    expected = [energies.FACTOR / 2 * float(one.mean()) / width for one in plain_gradients(prunable, ids, 4)]
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_divergence_of_small_errors_is_foretold() -> None:
    """Errors in random directions behind one block, small enough for the second order; many draws of both."""
    model = tiny_model("llama", dtype=torch.float64)
    prunable, ids = Prunable.of(model), random_ids(2, 12)
    block, draws = 1, 40
    per_token = (
        sum((plain_gradients(prunable, ids, seed)[block].view(2, 12) for seed in range(draws)), torch.zeros(2, 12))
        / draws
    )
    inputs = prunable.inputs(ids)
    generator = torch.Generator().manual_seed(0)

    def logs(noise: torch.Tensor | float) -> torch.Tensor:
        hidden = inputs.hidden
        for number, size in enumerate(prunable.dense):
            hidden = stream_of(prunable.block(hidden, inputs, number, size))
            hidden = hidden + noise if number == block else hidden
        return prunable.head(prunable.normed(hidden)).log_softmax(-1)

    with torch.no_grad():
        before, total, scale = logs(0.0), 0.0, 1e-3
        for _ in range(draws):
            noise = scale * torch.randn(inputs.hidden.shape, generator=generator, dtype=torch.float64)
            total += float((before.exp() * (before - logs(noise))).sum())
    expected = 0.5 * scale**2 * float(per_token.sum())
    assert total / draws == pytest.approx(expected, rel=0.25)
