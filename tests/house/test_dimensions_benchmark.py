"""The benchmark of dimensions takes as much away in every row, whatever it is taken from, and goes on where it was."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import tiny_model
from tests.support.trained_tokenizers import TOKENS, corpus, trained

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_every_row_ends_at_the_same_size_and_what_is_there_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model("llama", layers=4, vocab_size=TOKENS).save_pretrained(tmp_path / "dense")
    trained("byte-level").save_pretrained(tmp_path / "dense")
    text, other, work = tmp_path / "text.jsonl", tmp_path / "other.txt", tmp_path / "work"
    text.write_text("\n".join(json.dumps({"text": line}) for line in corpus()[:200]))
    other.write_text("\n".join(corpus()[200:260]))
    rows = ["blocks, channels, heads", "blocks", "heads", "and a smaller vocabulary"]
    given = [
        "--model", str(tmp_path / "dense"), "--alpaca", str(text), "--wikitext", str(other), "--tokens", "640",
        "--ratios", "0.25", "--work", str(work), "--record", str(tmp_path / "found.json"), "--rows", ";".join(rows),
        "--calibration", str(text), "--sequences", "4", "--length", "16", "--moments-sequences", "12",
        "--channel-group", "8", "--eval-text", str(other),
    ]  # fmt: skip
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["dimensions.py", *given])
    benchmark = import_module("dimensions")
    assert benchmark.main() == 0
    found: list[list[Any]] = json.loads((tmp_path / "found.json").read_text())["rows"]
    dense, usual, blocks, heads, fewer = found
    assert dense[1:3] == ["dense", 0.0] and dense[3][1] == dense[4][1] == 0
    assert all(25 <= row[2] < 30 and row[3][0] > 0 for row in (usual, blocks, fewer))
    assert heads[1:] == ["heads: cannot be", None, None, None], "they are fewer than a quarter of it"
    assert (work / "dimensions.png").stat().st_size > 0
    folders = {path.name for path in work.iterdir() if path.is_dir()}
    assert folders == {"blocks-channels-heads-0.25", "blocks-0.25", "and-a-smaller-vocabulary-0.25", "tokens-640"}
    monkeypatch.setattr(benchmark, "command", lambda line: 2)
    assert benchmark.main() == 0
    assert json.loads((tmp_path / "found.json").read_text())["rows"] == found
    monkeypatch.setattr(sys, "argv", ["dimensions.py", *given, "--rows", "depth"])
    assert benchmark.main() == 2
