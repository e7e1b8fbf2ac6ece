"""Repair of the last norm: its gain refitted, so that the next token's distribution comes back to the dense model's.

The hidden states that a pruned model ends with are the dense model's plus noise, and a head that takes noise for signal
is too sure of itself. With h the pruned model's states after the last norm, W the head and p the dense model's
distribution over the next token, the gain g is to minimise

    E KL(p || q),      q = softmax(W (g . h)),

which is convex in g, since the logits are linear in it. One Newton step from g = 1, first along the direction in which
all gains are equal (a temperature), then, damped, in all:

    g = (1 + s) 1 - (H + r mean(diag H) I)^-1 (d + s H 1),      s = -(1.d) / (1.H 1),
    d = E[h . W^T (q - p)],      H = E[(h . v)(h . v)^T],  v = W^T (e_y - q),  y drawn from q.

The norm's weight is multiplied by g: nothing is added to the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from multipruner.engine.moments import add_moments, mirrored
from multipruner.engine.prunable import Prunable
from multipruner.engine.token_losses import drawn, tokens_at_once

TOKENS = 8192
"""That the step is computed from, spread evenly over the text."""
DRAWS = 4
"""Next tokens drawn for every one of them; the second derivatives are means over these."""
RIDGE = 0.1
"""Of the mean second derivative."""


class GainFit:
    """Final hidden states of both models on some text, and the gain that they ask for.

    Args:
        prunable: the dense model.
        tokens: of the whole text that :meth:`see` will be shown; one in so many is kept that ``TOKENS`` remain.
        seed: of the draws.
    """

    def __init__(self, prunable: Prunable, tokens: int, seed: int = 0) -> None:
        self.prunable, self.seed = prunable, seed
        self._every = -(-tokens // TOKENS)
        self._states: list[tuple[Tensor, Tensor]] = []
        self._seen = 0

    @torch.inference_mode()
    def see(self, dense: Tensor, pruned: Tensor) -> None:
        """Take in final hidden states of the same tokens in both models, before the last norm, [sequences, length,
        hidden_size].
        """
        place = slice(-self._seen % self._every, None, self._every)
        self._seen += dense.shape[0] * dense.shape[1]
        models = ((self.prunable.original, dense), (self.prunable, pruned))
        first, second = (prunable.normed(states.flatten(0, 1)[place]) for prunable, states in models)
        self._states.append((first, second))

    @torch.inference_mode()
    def solve(self) -> Tensor | None:
        """Return the gain, float32 [hidden_size]; ``None`` where logits are not linear in it, or nothing finite
        solves the equations: a run ends without this step rather than not at all.
        """
        head, source = self.prunable.head, self.prunable.original.head
        if type(head) is not nn.Linear or self.prunable.cap is not None:
            return None
        width, device = head.weight.shape[1], head.weight.device
        slope, curvature = torch.zeros(width, device=device), torch.zeros(width, width, device=device)
        generator = torch.Generator().manual_seed(self.seed)
        for dense, pruned in self._states:
            rows = tokens_at_once(self.prunable.head_weight)
            for wanted, states in zip(dense.split(rows), pruned.split(rows), strict=True):
                p, q = (of(part).float().softmax(dim=1) for of, part in ((source, wanted), (head, states)))
                _add(slope, curvature, head, states, p, q, generator)
        curvature = mirrored(curvature)
        damped = curvature.clone()
        damped.diagonal().add_(RIDGE * float(curvature.diagonal().mean()))
        factor, status = torch.linalg.cholesky_ex(damped)
        temperature = -slope.sum() / curvature.sum()
        left = slope + temperature * curvature.sum(dim=1)
        gain = 1 + temperature - torch.cholesky_solve(left[:, None], factor)[:, 0]
        return None if int(status) or not bool(torch.isfinite(gain).all()) else gain


def _add(
    slope: Tensor, curvature: Tensor, head: nn.Linear, pruned: Tensor, p: Tensor, q: Tensor, generator: torch.Generator
) -> None:
    """Add first and second derivatives of the divergence by the gain, summed over tokens.

    Args:
        slope, curvature: added to.
        head: the output projection of the pruned model.
        pruned: its final hidden states after the last norm, [tokens, hidden_size].
        p, q: the distributions over the next token of the dense and of the pruned model, [tokens, vocabulary].
        generator: of the draws.
    """
    weight, states = head.weight, pruned.float()
    slope += (states * ((q - p).to(weight.dtype) @ weight).float()).sum(dim=0)
    mean = (q.to(weight.dtype) @ weight).float()
    for tokens in drawn(q, torch.rand(len(q), DRAWS, generator=generator)).T:
        add_moments(curvature, states * (weight[tokens].float() - mean) / math.sqrt(DRAWS))
