"""In an environment with vLLM and without multipruner: what it generates, offline and served, is what transformers do.

    python .ci/vllm_check.py FOLDER

Every log-probability that vLLM gives, of prompts and of what it writes after them, greedily, is held against the one
that transformers compute for the same tokens, both in 32-bit.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BOUND = 5e-3
"""Largest difference of a log-probability, in nats."""
TOKENS, CONTEXT = 32, 1024
LONG = 600
"""Tokens of the one long prompt."""
WAIT = 900
"""Seconds that the server may take to begin."""
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "Question: Why is the sky blue?\nAnswer:",
    "In 1969, the first",
)


class Written(NamedTuple):
    """What vLLM did with one prompt: all token ids, how many it was given, log-probabilities after the first."""

    ids: list[int]
    given: int
    logs: list[float]


class Case(NamedTuple):
    """What vLLM wrote, and the folder that transformers open for the truth; without a bound the difference is told."""

    what: str
    truth: str
    written: list[Written]
    bound: float | None = BOUND


def main() -> None:
    folder = Path(sys.argv[1])
    prompts = texts(folder)
    both = {"offline": offline(folder, prompts), "server": served(folder, prompts)}
    judged([Case(f"{folder.name}, {how}", str(folder), written) for how, written in both.items()])


def texts(folder: Path) -> list[list[int]]:
    """Token ids of the prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    long = tokenizer(" ".join(PROMPTS) * (LONG // 20)).input_ids[:LONG]
    return [*(tokenizer(text).input_ids for text in PROMPTS), long]


def judged(cases: list[Case]) -> None:
    """Compare with transformers, in a new process: vLLM has changed the models' classes in this one."""
    subprocess.run([sys.executable, __file__, "-"], input=json.dumps(cases), text=True, check=True)


def compared(cases: list[Case]) -> None:
    """Hold all against transformers, and fail where one is not within its bound."""
    faults = []
    for case in cases:
        model: Any = AutoModelForCausalLM.from_pretrained(
            case.truth, trust_remote_code=True, dtype=torch.float32, attn_implementation="eager"
        )  # torch's own attention caps no scores, and has no sinks
        fault = compare(case, model.eval())
        faults += [fault] if fault else []
    assert not faults, "\n".join(faults)


def offline(folder: Path, prompts: list[list[int]], adapter: Path | None = None, **options: Any) -> list[Written]:
    """Generate with ``vllm.LLM``: in 32 bits where ``options`` say nothing else, with LoRA where there is some."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    usual = {"dtype": "float32", "max_model_len": CONTEXT, "max_num_seqs": 4, "enforce_eager": True}
    how = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1, prompt_logprobs=1, detokenize=False
    )
    lora = LoRARequest("adapter", 1, str(adapter)) if adapter else None
    asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
    began, found = time.monotonic(), []
    llm = LLM(str(folder), trust_remote_code=True, **{**usual, **options})
    print(f"{folder.name}: loaded in {time.monotonic() - began:.0f} s", flush=True)
    for given in llm.generate(asked, how, use_tqdm=False, lora_request=lora):
        prompt, answer = list(given.prompt_token_ids or []), given.outputs[0]
        ids = [*prompt, *answer.token_ids]
        rows = [*(given.prompt_logprobs or [])[1:], *(answer.logprobs or [])]
        logs = [row[token].logprob for row, token in zip(rows, ids[1:], strict=True) if row is not None]
        found.append(Written(ids, len(prompt), logs))
    llm.llm_engine.engine_core.shutdown()
    return found


def cleared() -> None:
    """Leave nothing of one model in this process: the next takes what it finds."""
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def served(folder: Path, prompts: list[list[int]]) -> list[Written]:
    """By the server that speaks OpenAI's protocol, over HTTP."""
    asked = {"model": "small", "max_tokens": TOKENS, "temperature": 0, "logprobs": 1, "echo": True,
             "ignore_eos": True, "return_token_ids": True}  # fmt: skip
    found = []
    with server(folder) as url:
        for prompt in prompts:
            choice = posted(f"{url}/v1/completions", {**asked, "prompt": prompt})["choices"][0]
            ids = [*prompt, *choice["token_ids"][-TOKENS:]]
            found.append(Written(ids, len(prompt), choice["logprobs"]["token_logprobs"][1:]))
    return found


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """Start one, wait for it, and end it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--trust-remote-code",
            "--served-model-name", "small", "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT),
            "--max-num-seqs", "4", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    process = subprocess.Popen(line, env=os.environ, stdout=sys.stderr)
    try:
        url, end = f"http://127.0.0.1:{port}", time.monotonic() + WAIT
        while not answers(f"{url}/health"):
            assert process.poll() is None, f"the server ended with {process.returncode}"
            assert time.monotonic() < end, f"no answer within {WAIT} s"
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def posted(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


@torch.no_grad()
def compare(case: Case, model: Any) -> str:
    """Say how far what vLLM wrote is from transformers, and return the fault, if there is one."""
    differences, same, tokens = [], 0, 0
    for ids, given, logs in case.written:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        exact = logits.log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        differences.append((torch.tensor(logs) - exact).abs())
        same += int((logits.argmax(-1)[given - 1 :] == torch.tensor(ids[given:])).sum())
        tokens += len(ids) - given
    far = torch.cat(differences)
    print(
        f"{case.what}: {same} of {tokens} greedy tokens equal; {len(far)} log-probabilities, off by {far.mean():.1e} "
        f"in the mean and {far.max():.1e} at most",
        flush=True,
    )
    if case.bound is None:
        return ""
    if far.max() >= case.bound:
        return f"{case.what}: log-probabilities are off by {far.max()}"
    return "" if same == tokens else f"{case.what}: {tokens - same} of {tokens} tokens are not the best"


if __name__ == "__main__":
    assert importlib.util.find_spec("multipruner") is None, "this environment must not have multipruner"
    if sys.argv[1] == "-":
        compared([Case(*each) for each in json.load(sys.stdin)])
    else:
        main()
