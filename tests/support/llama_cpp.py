"""llama.cpp as the judge of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from multipruner.export.gguf import export_gguf
from tests.support.gguf_cases import VOCABULARY


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A GGUF file, loaded by llama.cpp; skips the test where that is not installed."""
    reason = "llama_cpp is not installed (pip install llama-cpp-python builds it: about 20 minutes on two cores)"
    llama_cpp = pytest.importorskip("llama_cpp", reason=reason)
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}  # the default cache is 16-bit
    model = llama_cpp.Llama(str(path), n_ctx=128, n_batch=128, n_threads=1, logits_all=True, verbose=False, **exact)
    try:
        yield model
    finally:
        model.close()


def check_llama(folder: Path, model: PreTrainedModel, architecture: str) -> None:
    """The same logits at 80 positions, and the same 32 tokens after them."""
    done = export_gguf(folder, outtype="f32")
    assert done.architecture == architecture
    ids = torch.randint(4, VOCABULARY, (1, 80), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), opened(done.path) as llama:
        llama.eval(ids[0].tolist())
        difference = np.abs(np.array(llama.scores[:80]) - model(ids).logits[0].numpy()).max()
        assert difference < 1e-3, difference
        generated = []
        for _ in range(32):
            generated.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
            llama.eval(generated[-1:])
        greedy: Any = model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False, eos_token_id=None)  # pyright: ignore
        assert generated == greedy[0, 80:].tolist()
