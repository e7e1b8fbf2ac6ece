"""What a module is called with, without what would come after it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multipruner.engine.layer_calls import input_of


def test_the_run_ends_at_the_module() -> None:
    ran: list[str] = []
    first, last = nn.Linear(3, 2), nn.Linear(2, 2)
    model = nn.Sequential(first, nn.Tanh(), last)
    last.register_forward_hook(lambda *call: ran.append("last"))
    x = torch.randn(4, 3)
    assert torch.equal(input_of(last, lambda: model(x)), torch.tanh(first(x)))
    assert ran == []
    model(x)
    assert ran == ["last"]


def test_other_errors_are_not_hidden_and_nothing_stays_behind() -> None:
    linear = nn.Linear(3, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        input_of(linear, lambda: nn.Linear(5, 3)(torch.randn(4, 7)))
    assert not linear._forward_pre_hooks
