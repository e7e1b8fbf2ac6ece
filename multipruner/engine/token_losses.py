"""What one token of calibration text costs: the negative log-likelihood, or the divergence from the dense model.

Both ask for the logarithm of a softmax's denominator, and no logits outlive the asking: in float32 on a CPU a part of
the vocabulary at a time, whose logits are reduced while they are in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor, nn

from multipruner.core.errors import UnsupportedModelError

_LOGIT_BYTES = 48 << 20  # one float32 chunk of logits; larger temporaries cost more in page faults than in arithmetic
_LOGIT_BYTES_ELSEWHERE = 256 << 20  # off the CPU: a chunk has many tokens, so that the head is read few times

_PART_BYTES = 1 << 20  # of logits that are reduced at once in float32, half of a usual core's own cache


def tokens_at_once(head: Tensor) -> int:
    """Return tokens whose float32 logits are in memory together.

    Args:
        head: the output projection's weight, [vocabulary, hidden_size], where it computes.
    """
    size = _LOGIT_BYTES if head.device.type == "cpu" else _LOGIT_BYTES_ELSEWHERE
    return max(size // (4 * len(head)), 16)


class Scores:
    """What a head's logits come to, in buffers that are used again and again.

    Args:
        head: the output projection.
        cap: what a tanh keeps the logits within, where one does.
    """

    def __init__(self, head: nn.Module, cap: float | None = None) -> None:
        self._head, self._cap = head, cap
        self._buffer = torch.empty(0)

    def log_totals(self, normed: Tensor) -> Tensor:
        """Return the logarithm of the sum of the exponentials of every token's logits, float32 [tokens].

        Args:
            normed: final hidden states after the last norm, [tokens, hidden_size].
        """
        if (linear := self._parted(normed)) is not None:
            return self._in_parts(linear, normed)
        return _log_total(self._whole(normed))

    def with_labels(self, normed: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same, and the logit of one label [tokens] of every token, float32 [tokens] each."""
        if (linear := self._parted(normed)) is not None:
            chosen = (normed * linear.weight[labels]).sum(dim=1)
            chosen = chosen if linear.bias is None else chosen + linear.bias[labels]
            return self._in_parts(linear, normed), self._capped(chosen)
        scores = self._whole(normed)
        chosen = scores.gather(1, labels[:, None])[:, 0]
        return _log_total(scores), chosen

    def _parted(self, normed: Tensor) -> nn.Linear | None:
        """Return the head where its logits can be computed in parts, and that pays."""
        pays = normed.dtype is torch.float32 and normed.device.type == "cpu"
        return self._head if pays and type(self._head) is nn.Linear else None

    def _room(self, rows: int, columns: int, device: torch.device) -> Tensor:
        if self._buffer.numel() < rows * columns:
            self._buffer = torch.empty(rows * columns, device=device)
        return self._buffer[: rows * columns].view(rows, columns)

    def _whole(self, normed: Tensor) -> Tensor:
        """Return all logits, float32 [tokens, vocabulary]."""
        logits = self._head(normed)
        return self._capped(self._room(len(logits), logits.shape[1], logits.device).copy_(logits))

    def _capped(self, scores: Tensor) -> Tensor:
        """Return cap logits, in place."""
        return scores if self._cap is None else scores.div_(self._cap).tanh_().mul_(self._cap)

    def _in_parts(self, linear: nn.Linear, normed: Tensor) -> Tensor:
        """Return log totals with a running maximum (online softmax, arXiv 1805.02867)."""
        weight, bias, rows = linear.weight, linear.bias, len(normed)
        top, total = normed.new_full((rows, 1), torch.finfo(torch.float32).min), normed.new_zeros(rows, 1)
        for begin in range(0, len(weight), step := max(_PART_BYTES // (4 * rows), 64)):
            part = weight[begin : begin + step]
            scores = torch.mm(normed, part.T, out=self._room(rows, len(part), normed.device))
            if bias is not None:
                scores += bias[begin : begin + step]
            scores = self._capped(scores)
            higher = torch.maximum(top, scores.amax(dim=1, keepdim=True))
            total.mul_(top.sub_(higher).exp_()).add_(scores.sub_(higher).exp_().sum(dim=1, keepdim=True))
            top = higher
        return (total.log_() + top)[:, 0]


class TokenLoss(Protocol):
    """Loss of every token of a batch."""

    def __call__(self, scores: Scores, normed: Tensor, part: slice) -> Tensor:
        """Return losses of some tokens, float32 [tokens].

        Args:
            scores: of the head.
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

    def __call__(self, scores: Scores, normed: Tensor, part: slice) -> Tensor:
        total, chosen = scores.with_labels(normed, self.labels[part])
        return total - chosen


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

    def __call__(self, scores: Scores, normed: Tensor, part: slice) -> Tensor:
        expected = (normed.float() * self.mean_row[part]).sum(dim=1)
        return scores.log_totals(normed) + self.negative_entropy[part] - expected

    @classmethod
    def of(cls, head: nn.Module, normed: Tensor, chunk: int, own: nn.Module | None = None) -> DivergenceFromDense:
        """Describe the dense model on a batch.

        Args:
            head: the output projection.
            normed: the dense model's final hidden states after the last norm, [tokens, hidden_size].
            chunk: tokens whose logits fit in memory together.
            own: the output projection of the models to be compared with it, where that is another.

        Raises:
            UnsupportedModelError: when the head is no plain linear layer.
        """
        own = head if own is None else own
        if type(head) is not nn.Linear or type(own) is not nn.Linear:
            raise UnsupportedModelError(
                f"the divergence from the dense model needs a plain linear head, this one is a {type(head).__name__}; "
                "use --objective nll"
            )
        entropies, rows = [], []
        for part in normed.split(chunk):
            logs = head(part).float().log_softmax(dim=1)
            p = logs.exp()
            entropy = (p * logs).sum(dim=1)
            if own.bias is not None:
                entropy -= p @ own.bias.float()
            entropies.append(entropy)
            rows.append((p.to(own.weight.dtype) @ own.weight).float())
        return cls(torch.cat(entropies), torch.cat(rows))


def drawn(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Return the tokens that draws in [0, 1), [rows, n], pick from probabilities [rows, vocabulary]; [rows, n]."""
    cumulated = probabilities.cumsum(-1)
    target = draws.to(cumulated.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).clamp(max=cumulated.shape[-1] - 1)


@dataclass(frozen=True)
class Scored:
    """Which tokens of a batch, or whole pictures, count in the loss, and how much.

    Attributes:
        weights: what each of them counts, float64 [scored].
        labels: the next tokens, [scored]; empty of pictures.
        places: their indices into those that may count: all tokens but the last of every sequence, one sequence after
            the other, or all pictures.
        whole: whether they are pictures.
    """

    weights: Tensor
    labels: Tensor
    places: Tensor
    whole: bool = False

    @classmethod
    def of(cls, rows: Tensor, ignore_id: int | None, of_all: int, *, whole: bool = False) -> Self:
        """Tell it of a batch.

        Args:
            rows: token ids [sequences, length], or pixels with the pictures in the first dimension.
            ignore_id: a label that is not scored.
            of_all: sequences, or pictures, that the loss is the mean of.
            whole: whether they are pictures.
        """
        if whole:
            places = torch.arange(len(rows), device=rows.device)
            return cls(torch.full_like(places, 1 / of_all, dtype=torch.float64), places[:0], places, whole)
        weights = label_weights(rows, ignore_id).flatten() / of_all
        places = weights.nonzero().flatten()
        return cls(weights[places], rows[:, 1:].flatten()[places], places)

    def among(self, hidden: Tensor) -> Tensor:
        """Return the tokens that count, [scored, hidden_size], or the pictures, [scored, positions, hidden_size], of
        [sequences, length, hidden_size].
        """
        flat = hidden if self.whole else hidden[:, :-1].flatten(0, 1)
        return flat[self.places] if len(self.places) < len(flat) else flat


def label_weights(ids: Tensor, ignore_id: int | None) -> Tensor:
    """Return what the NLL of each label counts: 1 / (scored labels of its sequence); float64 [sequences, length -
    1].
    """
    scored = torch.ones_like(ids[:, 1:], dtype=torch.bool) if ignore_id is None else ids[:, 1:] != ignore_id
    return scored / scored.sum(dim=1, keepdim=True).clamp(min=1).double()
