"""One exported model, opened by the program that serves it, in a process of its own.

    python worker.py NAME PATH SETTINGS

Every line of the standard input is a question, every line of the standard output its answer, both JSON. This file
imports nothing of multipruner, so that it starts at once and the program's threads and settings are its own.

Questions: ``{"phase": "prefill", "batch": 1, "tokens": 512}`` (or ``"decode"``, with tokens in the cache) is answered
with the milliseconds of one pass; ``{"ids": [...], "begin": 8}`` with the token that the model finds likeliest after
the first ``begin`` tokens, after one more and so on, and its log-probability: ``[[token, log-probability], ...]``.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import time
import traceback
import urllib.request
from importlib import import_module
from itertools import pairwise
from typing import Any

STEPS = 16
"""Tokens that are decoded for one sample: it is their mean, or their median where every one is timed."""


def prompts(batch: int, tokens: int, vocabulary: int, seed: Any = None) -> list[list[int]]:
    """Make up token ids, [batch, tokens]; time does not depend on them. Without a seed they are new ones."""
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(tokens)] for _ in range(batch)]


def before_steps(tokens: int) -> int:
    """Return the length of a prompt behind which so many tokens are in the cache half-way through the steps."""
    return max(tokens - STEPS // 2, 1)


class LlamaCpp:
    """llama.cpp's server within this process (xllamacpp), called without a connection.

    Args:
        path: a GGUF file.
        settings: ``threads``, ``batch`` and ``context`` (of each sequence), at most, and ``vocabulary``.
    """

    def __init__(self, path: str, settings: dict[str, int]) -> None:
        xllamacpp: Any = import_module("xllamacpp")
        how = xllamacpp.CommonParams()
        how.model.path, how.verbosity, how.warmup, how.cache_ram_mib = path, -1, False, 0
        how.n_parallel, how.n_ctx = settings["batch"], settings["batch"] * settings["context"]
        how.cpuparams.n_threads = how.cpuparams_batch.n_threads = settings["threads"]
        self._server, self._vocabulary = xllamacpp.Server(how), settings["vocabulary"]

    def sample(self, phase: str, batch: int, tokens: int) -> float:
        """Time one pass: of a prompt, from the call to its end; of a token, as the server itself counts."""
        if phase == "prefill":
            given = prompts(batch, tokens, self._vocabulary)
            start = time.perf_counter()
            self._asked(given, 1, cache_prompt=False)
            return 1e3 * (time.perf_counter() - start)
        given = prompts(batch, before_steps(tokens), self._vocabulary, seed=tokens)
        self._asked(given, 1)  # all but the last token is in the cache afterwards, so that all sequences begin together
        timings = self._asked(given, STEPS + 1)["timings"]
        return timings["predicted_ms"] / STEPS  # counted from the first token on

    def choices(self, ids: list[int], begin: int) -> list[list[float]]:
        """Return the likeliest token after every beginning, and its log-probability, the model's own.

        What is written is an "a" whatever comes: of a token that is half a character nothing is told.
        """
        bias = {"logit_bias": [[self._letter(), 1000.0]], "n_probs": 1}
        found = []
        for end in range(begin, len(ids) + 1):
            answer = self._asked([ids[:end]], 1, **bias)
            (row,) = answer["choices"][0]["logprobs"]["content"]
            best = row["top_logprobs"][0]
            found.append([best["id"], best["logprob"]])
        return found

    def _letter(self) -> int:
        body = json.dumps({"content": "a", "add_special": False}).encode()
        request = urllib.request.Request(f"{self._server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"][-1]

    def _asked(self, given: list[list[int]], tokens: int, **more: Any) -> dict[str, Any]:
        prompt: Any = given[0] if len(given) == 1 else given
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": True}
        answer = self._server.handle_completions({**asked, **more})
        if "choices" not in answer:
            raise RuntimeError(json.dumps(answer)[:300])
        return answer


class OpenVino:
    """openvino-genai's pipeline on the processor, with the attention backend that is right for all layers.

    Args:
        path: an exported folder.
        settings: ``threads`` and ``vocabulary``, and whether it is to be ``exact``: on processors with bfloat16 the
            program computes in it otherwise.
    """

    def __init__(self, path: str, settings: dict[str, int]) -> None:
        sys.modules["openvino_telemetry"] = None  # pyright: ignore[reportArgumentType] (nobody is told of it)
        self._openvino: Any = import_module("openvino")
        self._genai: Any = import_module("openvino_genai")
        self._numpy: Any = import_module("numpy")
        self._path, how = path, dict[str, Any](INFERENCE_NUM_THREADS=settings["threads"])
        if settings.get("exact"):
            how["INFERENCE_PRECISION_HINT"] = "f32"
        self._how = how
        self._pipe = self._genai.LLMPipeline(path, "CPU", ATTENTION_BACKEND="SDPA", **self._how)
        self._vocabulary = settings["vocabulary"]

    def sample(self, phase: str, batch: int, tokens: int) -> float:
        """Time one pass: of a prompt, from the call to its end; of a token, the median between two of them."""
        prefill = phase == "prefill"
        rows = prompts(batch, tokens if prefill else before_steps(tokens), self._vocabulary)
        ids = self._numpy.array(rows, dtype="int64")
        given = self._genai.TokenizedInputs(*map(self._openvino.Tensor, (ids, self._numpy.ones_like(ids))))
        how = self._genai.GenerationConfig(max_new_tokens=1 if prefill else STEPS + 1, ignore_eos=True)
        start = time.perf_counter()
        done = self._pipe.generate(given, how)
        if prefill:
            return 1e3 * (time.perf_counter() - start)
        return statistics.median(b - a for a, b in pairwise(done.perf_metrics.raw_metrics.m_new_token_times))

    def choices(self, ids: list[int], begin: int) -> list[list[float]]:
        """Return the likeliest token after every beginning, and its log-probability, by the graph in one pass."""
        request = self._openvino.Core().compile_model(f"{self._path}/openvino_model.xml", "CPU", self._how)
        row = self._numpy.array([ids], dtype="int64")
        places = self._numpy.arange(len(ids), dtype="int64")[None]
        given = {"input_ids": row, "attention_mask": self._numpy.ones_like(row), "position_ids": places,
                 "beam_idx": self._numpy.zeros(1, dtype="int32")}  # fmt: skip
        logits = request(given)["logits"][0, begin - 1 :].astype("float64")
        found = []
        for values in logits:
            best = int(values.argmax())
            found.append([best, -math.log(float(self._numpy.exp(values - values[best]).sum()))])
        return found


PROGRAMS = {"llama.cpp": LlamaCpp, "openvino": OpenVino}
"""By name: (path, settings) -> what answers."""


def main(programs: dict[str, Any]) -> None:
    """Answer questions until there are no more.

    Args:
        programs: by name: (path, settings) -> what answers.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer
    _, name, path, settings = sys.argv
    code = 1
    try:
        program = programs[name](path, json.loads(settings))
        print(json.dumps("ready"), file=answers, flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            done: Any = program.choices(**asked) if "ids" in asked else program.sample(**asked)
            print(json.dumps(done), file=answers, flush=True)
        code = 0
    except BaseException:  # whatever it is, it is told before this ends
        traceback.print_exc()
    finally:
        for each in (answers, sys.stdout, sys.stderr):
            each.flush()
        os._exit(code)  # servers' threads may not end by themselves


if __name__ == "__main__":
    main(PROGRAMS)
