"""The benchmark takes as many parameters away with a smaller vocabulary as without."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import tiny_model
from tests.support.trained_tokenizers import TOKENS, corpus, trained

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def test_both_ways_end_at_the_same_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama", layers=4, vocab_size=TOKENS).save_pretrained(tmp_path / "dense")
    trained("byte-level").save_pretrained(tmp_path / "dense")
    text, other = tmp_path / "text.jsonl", tmp_path / "other.txt"
    text.write_text("\n".join(json.dumps({"text": line}) for line in corpus()[:200]))
    other.write_text("\n".join(corpus()[200:260]))
    given = [
        "--model", str(tmp_path / "dense"), "--text", str(text), "--judge", f"other={other}", "--sizes", "640",
        "--ratio", "0.25", "--work", str(tmp_path / "work"), "--record", str(tmp_path / "found.json"),
        "--calibration", str(text), "--sequences", "4", "--length", "16", "--moments-sequences", "12",
        "--channel-group", "8", "--eval-text", str(other),
    ]  # fmt: skip
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["vocabulary.py", *given])
    import_module("vocabulary").main()
    rows: list[list[Any]] = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row[0] for row in rows] == [TOKENS, 640, TOKENS, 640]
    alone, without, both = (row[2] for row in rows[1:])
    assert 0 < alone < 25 and alone == pytest.approx(rows[1][1])
    assert 25 <= without < 27 and 25 <= both < 27 and rows[3][1] == rows[1][1] > rows[2][1] == 0
    assert rows[0][3][1] == rows[0][4][1] == 0 and all(row[3][0] > 0 for row in rows)
