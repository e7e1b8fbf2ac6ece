"""What ``vocabulary`` writes is served: exported as it is, and computing and cutting text as transformers do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from multipruner.commands.main import main
from multipruner.config.choices import EXPORTS, RUNTIMES, loaded
from multipruner.core.latency_table import Workload
from multipruner.runtimes.served import Served, settings_for
from tests.support.llama_cpp import opened
from tests.support.served import SERVED
from tests.support.tiny import tiny_model
from tests.support.trained_tokenizers import TOKENS, corpus, trained


def smaller(place: Path, kind: str) -> Path:
    """A tiny Llama with 512 of its tokens."""
    rows = TOKENS + 256
    tiny_model("llama", vocab_size=rows, layers=2, hidden_size=64).save_pretrained(place / "dense")
    trained(kind).save_pretrained(place / "dense")
    (place / "lines.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in corpus()[:300]))
    given = ["--model", str(place / "dense"), "--text", str(place / "lines.jsonl"), "--output", str(place / "smaller")]
    assert main(["vocabulary", *given, "--tokens", "512", "--no-measure"]) == 0
    return place / "smaller"


@pytest.mark.parametrize(
    ("runtime", "kind"),
    [pytest.param(*one.values, kind, marks=one.marks, id=f"{one.values[0]}-{kind}")
     for one, kind in [(SERVED[0], "byte-level"), (SERVED[-1], "byte-level"), (SERVED[-1], "sentencepiece")]],
)  # fmt: skip
def test_a_model_with_fewer_tokens_computes_the_same_where_it_is_served(
    runtime: str, kind: str, tmp_path: Path
) -> None:
    folder = smaller(tmp_path, kind)
    row = EXPORTS[RUNTIMES[runtime].export]
    done = loaded(row.by)(folder, outtype="f32")
    ids = torch.randint(260, 500, (1, 24), generator=torch.Generator().manual_seed(0))
    with Served.opened(runtime, done.path, settings_for([Workload("prefill", 1, 24)], 512, 1, exact=True)) as served:
        found = served.choices(ids[0].tolist(), 8)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logs = model(ids).logits[0, 7:].double().log_softmax(-1)
    assert [token for token, _ in found] == logs.argmax(-1).tolist()
    assert np.abs([value for _, value in found] - logs.amax(-1).numpy()).max() < 2e-2, "keys and values of 16 bits"
    if runtime == "llama.cpp":
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        with opened(done.path) as llama:
            for text in corpus()[300::40]:
                assert llama.tokenize(text, special=False) == tokenizer(text).input_ids, text
    else:
        assert not done.tokenizer, "its tokenizer is a graph too"


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = smaller(tmp_path, "unigram")
    capsys.readouterr()
    assert main(["export", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "Unigram" in said and said.count("\n") == 1 and not list(tmp_path.glob("*.gguf"))
