"""What one token of calibration text costs: the negative log-likelihood, or the divergence from the dense model.

Both see the logits of a few tokens at a time in one float32 buffer that they may overwrite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from multipruner.core.errors import UnsupportedModelError

_LOGIT_BYTES = 48 << 20  # one float32 chunk of logits; larger temporaries cost more in page faults than in arithmetic


def tokens_at_once(vocab_size: int) -> int:
    """Return tokens whose float32 logits are in memory together."""
    return max(_LOGIT_BYTES // (4 * vocab_size), 16)


class TokenLoss(Protocol):
    """Loss of every token of a batch."""

    def __call__(self, scores: Tensor, normed: Tensor, part: slice) -> Tensor:
        """Return losses of some tokens, float32 [tokens].

        Args:
            scores: their logits, float32 [tokens, vocabulary]; may be overwritten.
            normed: their final hidden states after the last norm, [tokens, hidden_size].
            part: which of the batch's tokens they are.
        """
        ...


def _log_total(scores: Tensor) -> Tensor:
    """Return logarithm of the sum of exponentials of every row, in place."""
    top = scores.amax(dim=1, keepdim=True)
    return scores.sub_(top).exp_().sum(dim=1).log_() + top[:, 0]


@dataclass
class NegativeLogLikelihood:
    """``-log q(label)`` in nats.

    Attributes:
        labels: the next token of every token, [tokens].
    """

    labels: Tensor

    def __call__(self, scores: Tensor, normed: Tensor, part: slice) -> Tensor:
        chosen = scores.gather(1, self.labels[part][:, None])[:, 0]
        return _log_total(scores) - chosen


@dataclass
class DivergenceFromDense:
    """``KL(p || q)`` in nats, p the dense model's distribution over the next token.

    With a linear head the cross term needs no vocabulary-sized memory: the expectation of the logits ``W h + b`` under
    p is ``(W^T p) . h + b . p``, and ``W^T p`` has the hidden size. So one number and one vector per token describe
    the dense model exactly, at no further cost per candidate. In bfloat16 the logits are rounded and the expectation
    is not, which leaves a constant of about 1e-3 nats.

    Attributes:
        negative_entropy: sum of p log p minus b . p for every token, float32 [tokens].
        mean_row: ``W^T p`` of every token, float32 [tokens, hidden_size].
    """

    negative_entropy: Tensor
    mean_row: Tensor

    def __call__(self, scores: Tensor, normed: Tensor, part: slice) -> Tensor:
        expected = (normed.float() * self.mean_row[part]).sum(dim=1)
        return _log_total(scores) + self.negative_entropy[part] - expected

    @classmethod
    def of(cls, head: nn.Module, normed: Tensor, chunk: int) -> DivergenceFromDense:
        """Describe the dense model on a batch.

        Args:
            head: the output projection.
            normed: the dense model's final hidden states after the last norm, [tokens, hidden_size].
            chunk: tokens whose logits fit in memory together.

        Raises:
            UnsupportedModelError: when the head is no plain linear layer.
        """
        if type(head) is not nn.Linear:
            raise UnsupportedModelError(
                f"the divergence from the dense model needs a plain linear head, this one is a {type(head).__name__}; "
                "use --objective nll"
            )
        entropies, rows = [], []
        for part in normed.split(chunk):
            logs = head(part).float().log_softmax(dim=1)
            p = logs.exp()
            entropy = (p * logs).sum(dim=1)
            if head.bias is not None:
                entropy -= p @ head.bias.float()
            entropies.append(entropy)
            rows.append((p.to(head.weight.dtype) @ head.weight).float())
        return cls(torch.cat(entropies), torch.cat(rows))
