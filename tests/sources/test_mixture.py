"""Calibration text from several sources: shares, order, and what takes the place of a source that is out of reach."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from multipruner.config.recipe import CalibrationSpec
from multipruner.core.errors import CalibrationError
from multipruner.sources.calibration import load_calibration
from multipruner.sources.mixture import mixture
from multipruner.sources.sampled_text import self_text
from multipruner.storage.hub import HubUnreachable
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))


def spec(source: str, sequences: int = 4) -> CalibrationSpec:
    return CalibrationSpec(source=source, sequences=sequences, moments_sequences=2 * sequences, length=8)


def ready(path: Path, value: int, sequences: int = 16, length: int = 8) -> Path:
    ids = torch.full((sequences, length), value)
    save_file({"input_ids": ids, "heldout_ids": ids + 1, "moments_ids": ids.repeat(3, 1)}, path)
    return path


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(40, 300))
def test_the_sequences_are_shared_by_weight(weights: list[int], sequences: int) -> None:
    parts = mixture(spec("+".join(f"source{i}:{weight}" for i, weight in enumerate(weights)), sequences))
    assert [part.source for part in parts] == [f"source{i}" for i in range(len(weights))]
    assert sum(part.sequences for part in parts) == sequences
    assert sum(part.moments_sequences for part in parts) == 2 * sequences
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part.sequences - sequences * weight / sum(weights)) < 1


def test_one_source_is_no_mixture(tmp_path: Path) -> None:
    assert mixture(spec("self")) == [spec("self")]
    odd = tmp_path / "a+b.jsonl"
    odd.write_text("")
    assert mixture(spec(str(odd))) == [spec(str(odd))]


@pytest.mark.parametrize(("source", "message"), [("self+a+b+c+d", "too few"), ("self:0+a", "more than 0")])
def test_bad_mixtures(source: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        mixture(spec(source))


def test_every_beginning_holds_the_sources_in_their_shares(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    file = ready(tmp_path / "ids.safetensors", 50)
    mixed = load_calibration(spec(f"{file}:3+self:1", 8), tokenizer, model)
    given_rows = (mixed.ids == 50).all(dim=1)
    assert mixed.ids.shape == (8, 8) and mixed.name == "ids.safetensors+self"
    assert given_rows.sum() == 6 and 2 <= given_rows[:4].sum() <= 3
    held_out = load_calibration(spec(f"{file}:3+self:1", 8), tokenizer, model, split="heldout")
    assert (held_out.ids == 51).all(dim=1).sum() == 6


def test_what_is_out_of_reach_is_written_by_the_model_and_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: object) -> list[str]:
        raise HubUnreachable("no route")

    monkeypatch.setattr("multipruner.sources.calibration.rows_of", unreachable)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    told: list[str] = []
    found = load_calibration(spec("alpaca+self", 6), tokenizer, model, say=told.append)
    assert "in place of alpaca" in told[0] and found.name == "self"
    assert torch.equal(found.ids, self_text(model, tokenizer, 24, 8, 0)[:6])
    assert len(found.ids.unique(dim=0)) == 6


def test_lengths_must_agree(tmp_path: Path) -> None:
    one, other = ready(tmp_path / "a.safetensors", 50), ready(tmp_path / "b.safetensors", 60, length=12)
    with pytest.raises(CalibrationError, match="different lengths"):
        load_calibration(spec(f"{one}+{other}", 8), tiny_tokenizer(), tiny_model("llama"))
