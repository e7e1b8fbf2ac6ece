"""What ``serving.py`` starts in an environment with vLLM and without multipruner: it answers as other runtimes do.

    python serving_vllm.py FOLDER-OF-WORKER vllm MODEL SETTINGS

FOLDER-OF-WORKER holds ``worker.py``, the loop that reads questions and writes answers, which needs nothing but Python.
"""

from __future__ import annotations

import os
import sys
import time
from importlib import import_module
from typing import Any

BATCHED = 8192
"""Tokens that vLLM computes together: all prompts of a batch."""


class Vllm:
    """vLLM's offline generation, in 32 bits on the processor.

    Args:
        path: a folder, dense or pruned.
        settings: ``threads``, ``batch``, ``context`` and ``vocabulary``.
    """

    def __init__(self, path: str, settings: dict[str, int]) -> None:
        threads = str(settings["threads"])
        given = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
                 "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1",
                 "VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # fmt: skip
        os.environ |= {name: value for name, value in given.items() if name not in os.environ}
        self._vllm: Any = import_module("vllm")
        self._vocabulary = settings["vocabulary"]
        self._llm = self._vllm.LLM(
            path, trust_remote_code=True, dtype="float32", enforce_eager=True, max_model_len=settings["context"],
            max_num_seqs=settings["batch"], max_num_batched_tokens=max(BATCHED, settings["context"]),
            enable_prefix_caching=False, disable_log_stats=False,
        )  # fmt: skip

    def sample(self, phase: str, batch: int, tokens: int) -> float:
        """Time one pass: of a prompt, from the call to its end; of a token, between the first and the last."""
        worker: Any = import_module("worker")
        prefill = phase == "prefill"
        rows = worker.prompts(batch, tokens if prefill else worker.before_steps(tokens), self._vocabulary)
        start = time.perf_counter()
        done = self._written(rows, max_tokens=1 if prefill else worker.STEPS + 1)
        if prefill:
            return 1e3 * (time.perf_counter() - start)
        first, last = (max(getattr(each.metrics, f"{which}_token_ts") for each in done) for which in ("first", "last"))
        return 1e3 * (last - first) / worker.STEPS

    def choices(self, ids: list[int], begin: int) -> list[list[float]]:
        """Return the likeliest token after every beginning, and its log-probability."""
        (done,) = self._written([ids], max_tokens=1, prompt_logprobs=1, logprobs=1)
        rows = [*done.prompt_logprobs[begin:], done.outputs[0].logprobs[0]]
        best = [max(row.items(), key=lambda item: item[1].logprob) for row in rows]
        return [[token, found.logprob] for token, found in best]

    def _written(self, rows: list[list[int]], **how: Any) -> Any:
        asked = self._vllm.SamplingParams(temperature=0, ignore_eos=True, **how)
        return self._llm.generate([{"prompt_token_ids": ids} for ids in rows], asked, use_tqdm=False)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv.pop(1))
    import_module("worker").main({"vllm": Vllm})
