"""Logits that are reduced a part of the vocabulary at a time come to what all of them together come to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from multipruner.engine import token_losses
from multipruner.engine.token_losses import NegativeLogLikelihood, Scores


def _head(vocabulary: int, bias: bool, seed: int, scale: float = 1.0) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(seed)
    head = nn.Linear(12, vocabulary, bias=bias)
    with torch.no_grad():
        head.weight.mul_(scale)
    return head, torch.randn(9, 12), torch.randint(vocabulary, (9,))


@given(
    vocabulary=st.integers(1, 200), bias=st.booleans(), seed=st.integers(0, 99),
    scale=st.sampled_from([1.0, 100.0, 1e4]),
)  # fmt: skip
@torch.inference_mode()
def test_parts_of_the_vocabulary_are_the_whole(vocabulary: int, bias: bool, seed: int, scale: float) -> None:
    """Four parts at most (64 columns or more), logits of up to some ten thousands."""
    head, normed, labels = _head(vocabulary, bias, seed, scale)
    exact = head.double()(normed.double())
    expected = exact.logsumexp(dim=1), exact.gather(1, labels[:, None])[:, 0]
    head, scores = head.float(), Scores(head)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_losses, "_PART_BYTES", 0)
        total, chosen = scores.with_labels(normed, labels)
        again = scores.log_totals(normed)
    assert torch.equal(total, again) and total.dtype is torch.float32
    for found, wanted in zip((total, chosen), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * scale)


@torch.inference_mode()
def test_both_ways_agree_and_only_float32_goes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    head, normed, labels = _head(150, True, 0)
    parted: list[int] = []
    original = Scores._in_parts

    def counted(self: Scores, linear: nn.Linear, states: Tensor) -> Tensor:
        parted.append(len(states))
        return original(self, linear, states)

    monkeypatch.setattr(Scores, "_in_parts", counted)
    loss = NegativeLogLikelihood(labels)
    ours = loss(Scores(head), normed, slice(0, 9))
    assert parted == [9]

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    other: Any = Scaled(12, 150)
    other.load_state_dict(head.state_dict())
    theirs = loss(Scores(other), normed, slice(0, 9))
    expected = nn.functional.cross_entropy(other(normed), labels, reduction="none")
    torch.testing.assert_close(theirs, expected)
    torch.testing.assert_close(ours, nn.functional.cross_entropy(head(normed), labels, reduction="none"))
    narrow = head.bfloat16()
    theirs = loss(Scores(narrow), normed.bfloat16(), slice(0, 9))
    expected = nn.functional.cross_entropy(narrow(normed.bfloat16()).float(), labels, reduction="none")
    torch.testing.assert_close(theirs, expected)
    assert parted == [9], "another head, or another type, goes as a whole"


@torch.inference_mode()
def test_what_is_no_number_stays_none() -> None:
    head, normed, labels = _head(150, False, 0)
    normed[3, 0] = torch.nan
    losses = NegativeLogLikelihood(labels)(Scores(head), normed, slice(0, 9))
    assert losses.isnan().nonzero().flatten().tolist() == [3]
