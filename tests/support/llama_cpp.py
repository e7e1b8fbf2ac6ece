"""llama.cpp as the judge of a GGUF file: its server, within this process (xllamacpp, a wheel without a build)."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from multipruner.export.gguf import export_gguf
from tests.support.gguf_cases import VOCABULARY


class Judge:
    """A GGUF file, loaded by llama.cpp with nothing rounded: keys and values in 32 bits, no flash attention."""

    def __init__(self, path: Path, context: int = 128) -> None:
        xllamacpp: Any = import_module("xllamacpp")
        how: Any = xllamacpp.CommonParams()
        how.model.path = str(path)
        how.n_ctx = how.n_batch = how.n_ubatch = context
        how.n_parallel = how.cpuparams.n_threads = how.cpuparams_batch.n_threads = 1
        how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        how.verbosity, how.warmup = -1, False
        self.server: Any = xllamacpp.Server(how)
        self._letter = self.tokenize("a", special=False)[-1]

    def close(self) -> None:
        del self.server

    def after(self, ids: Sequence[int], best: int, **options: Any) -> dict[int, float]:
        """What comes after a prompt: log-probabilities of the best tokens, by id, the best first.

        They are the model's own, before sampling. What is sampled is an "a": of half a character nothing is told.
        """
        asked = {"prompt": list(ids), "n_predict": 1, "n_probs": best, "temperature": 0}
        answer = self.server.handle_completions({**asked, "logit_bias": [[self._letter, 1000.0]], **options})
        assert "choices" in answer, answer
        (row,) = answer["choices"][0]["logprobs"]["content"]
        return {entry["id"]: entry["logprob"] for entry in row["top_logprobs"]}

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The best token after a prompt, then the best after that, and so on."""
        written = list(ids)
        for _ in range(tokens):
            written.append(next(iter(self.after(written, 1))))
        return written[len(ids) :]

    def everywhere(self, ids: Sequence[int], vocabulary: int, begin: int = 1) -> NDArray[np.float64]:
        """Log-probabilities of all tokens after every beginning of a text, [beginnings, vocabulary]; the whole text is
        read in one go, its beginnings token by token.
        """
        rows = [self.after(ids[:end], vocabulary) for end in range(begin, len(ids))]
        rows.append(self.after(ids, vocabulary, cache_prompt=False))
        return np.array([[row[token] for token in range(vocabulary)] for row in rows])

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return self._posted("tokenize", {"content": text, "add_special": True, "parse_special": special})["tokens"]

    def detokenize(self, ids: Sequence[int]) -> str:
        return self._posted("detokenize", {"tokens": list(ids)})["content"]

    @property
    def chat_template(self) -> str:
        return self._posted("props", None)["chat_template"]

    def _posted(self, what: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.server.listening_address}/{what}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@contextmanager
def opened(path: Path) -> Iterator[Judge]:
    """A GGUF file, loaded by llama.cpp; skips the test where that is not installed."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed (pip install xllamacpp)")
    judge = Judge(path)
    try:
        yield judge
    finally:
        judge.close()


def log_probabilities(model: Any, ids: torch.Tensor) -> NDArray[np.float64]:
    """Those of transformers, [length, vocabulary]."""
    with torch.no_grad():
        return model(ids).logits[0].double().log_softmax(-1).numpy()


def check_llama(folder: Path, model: PreTrainedModel, architecture: str) -> None:
    """The same log-probabilities at 80 positions, and the same 32 tokens after them."""
    done = export_gguf(folder, outtype="f32")
    assert done.architecture == architecture
    ids = torch.randint(4, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(5))
    with opened(done.path) as llama:
        found = llama.everywhere(ids[0].tolist(), VOCABULARY)
        difference = np.abs(found - log_probabilities(model, ids)).max()
        assert difference < 1e-3, difference
        generated = llama.greedy(ids[0].tolist(), 32)
        greedy: Any = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None)  # pyright: ignore
        assert generated == greedy[0, 80:].tolist()
