"""From a finished run to whoever uses it: GGUF, stock transformers, a push, a download; the same logits all along.

    python .ci/end_to_end.py RUN STOCK_PYTHON

RUN is the folder of a finished run, STOCK_PYTHON the interpreter of an environment with torch and transformers but
without multipruner. The Hub is tests/support/fake_hub.py: every byte travels over HTTP. It ends at the first thing that
does not hold, with an exit code that is not zero.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import multipruner

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from tests.support.fake_hub import FakeHub, fake_hub  # noqa: E402 (the tests are not installed)
from tests.support.llama_cpp import Judge  # noqa: E402

POSITIONS = 96
LIKELIEST = 1000  # tokens at every position
BOUND = 1e-3  # largest difference of logits and log-probabilities, in 32-bit
REPO, TOKEN = "tester/pruned", "hf_" + "EndToEnd" * 4
PARTS = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
LOAD = f"""
import sys, torch, multipruner
from safetensors.torch import load_file
expected, weights = load_file(sys.argv[2]), load_file(sys.argv[3])
model = multipruner.load(sys.argv[1])
given = model.state_dict()
assert all(torch.equal(given[name], weight) for name, weight in weights.items()), "weights differ"
with torch.no_grad():
    logits = model.float()(input_ids=expected["ids"]).logits
difference = float((logits - expected["logits"]).abs().max())
assert difference < {BOUND}, difference
print(f"{{len(weights)}} tensors equal to the bit, {{logits.numel():,}} logits within {{difference:.1e}}")
"""
DOWNLOAD = "import sys, huggingface_hub as h; print(h.snapshot_download(sys.argv[1], revision=sys.argv[2]))"


def main() -> None:
    run, stock_python = Path(sys.argv[1]).absolute(), sys.argv[2]
    scratch = Path(tempfile.mkdtemp(prefix="end-to-end-"))
    try:
        ids, exact = reference(run, scratch / "logits.safetensors")
        gguf = export(run, scratch / "run-f32.gguf")
        check_arrays(run, gguf)
        check_llama_cpp(gguf, ids, exact)
        share(run, stock_python, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say("end to end", "everything holds")


def say(stage: str, text: str) -> None:
    print(f"{stage:<26}{text}", flush=True)


@torch.no_grad()
def reference(run: Path, file: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Token ids [1, positions] and the logits of ``multipruner.load`` in 32-bit, returned and put into ``file``."""
    tokenizer = AutoTokenizer.from_pretrained(run, trust_remote_code=True)
    ids = tokenizer((ROOT / "README.md").read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :POSITIONS]
    assert ids.shape == (1, POSITIONS), ids.shape
    logits = multipruner.load(run, dtype=torch.float32)(input_ids=ids).logits
    save_file({"ids": ids.contiguous(), "logits": logits.contiguous()}, file)
    say("multipruner.load", f"{logits.numel():,} logits at {POSITIONS} positions")
    return ids, logits[0].numpy()


def command(line: list[str], **environment: str) -> str:
    """Run a command to its end and return what it printed; everything it said is shown where it fails."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    done = subprocess.run(line, env={**kept, **environment}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        sys.exit(f"{' '.join(line)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    assert TOKEN not in done.stdout + done.stderr, "a token is shown"
    return done.stdout.strip()


def multipruner_command(*words: str, **environment: str) -> str:
    return command([sys.executable, "-m", "multipruner", *words], **environment)


def export(run: Path, file: Path) -> Path:
    told = multipruner_command("export", str(run), "--format", "gguf", "--outtype", "f32", "--output", str(file))
    say("export", told.rpartition("/")[2])
    return file


def check_arrays(run: Path, file: Path) -> None:
    """Every tensor of the file against the checkpoint's, and the sizes per layer against the tensors."""
    weights, reader = load_file(run / "model.safetensors"), GGUFReader(file)
    fields = {key.partition(".")[2]: field.contents() for key, field in reader.fields.items()}
    layers, head = int(fields["block_count"]), int(fields["attention.key_length"])
    sizes = {name: fields[name] for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")}
    table = {name: v if isinstance(v, list) else [v] * layers for name, v in sizes.items()}
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names |= {f"blk.{n}.{a}": f"model.layers.{n}.{b}" for n in range(layers) for a, b in PARTS.items()}
    seen, numbers, made_up = set(), 0, 0
    for tensor in reader.tensors:
        part, (_, number, *_) = tensor.name.rpartition(".")[0], (*tensor.name.split("."), "", "")
        source, values = f"{names[part]}.weight", np.array(tensor.data)
        if source not in weights:  # stands in for a removed block and adds nothing
            assert (values == ("norm" in part)).all(), tensor.name
            made_up += 1
            continue
        if part.endswith((".attn_q", ".attn_k")):
            heads = table["attention.head_count" + ("_kv" if part.endswith("k") else "")][int(number)]
            assert heads * head == len(values), (tensor.name, heads)
            pairs = np.arange(len(values)).reshape(heads, head // 2, 2)
            values = values[np.moveaxis(pairs, 2, 1).reshape(-1)]
        elif part.endswith(".ffn_up"):
            assert table["feed_forward_length"][int(number)] == len(values), tensor.name
        assert np.array_equal(values, weights[source].float().numpy()), tensor.name
        seen.add(source)
        numbers += values.size
    assert set(weights) <= seen | {"lm_head.weight"}, set(weights) - seen
    say("every array of the GGUF", f"{len(seen)} tensors, {numbers:,} numbers equal; {made_up} stand-ins add nothing")


def check_llama_cpp(file: Path, ids: torch.Tensor, exact: np.ndarray) -> None:
    """llama.cpp's log-probabilities of the likeliest tokens against those of transformers, both in 32-bit."""
    if find_spec("xllamacpp") is None:
        say("llama.cpp", "xllamacpp cannot be imported: not run (the arrays above were checked)")
        return
    judge, given = Judge(file), ids[0].tolist()
    right = torch.from_numpy(exact).double().log_softmax(-1).numpy()
    same, difference, numbers = 0, 0.0, 0
    for position in range(POSITIONS):
        # the whole text in one go, what comes before it token by token
        how = {"cache_prompt": position < POSITIONS - 1}
        found = judge.after(given[: position + 1], LIKELIEST, **how)
        same += next(iter(found)) == right[position].argmax()
        far = np.abs(np.array(list(found.values())) - right[position, list(found)])
        difference, numbers = max(difference, float(far.max())), numbers + len(far)
    judge.close()
    assert numbers == POSITIONS * LIKELIEST, numbers
    assert difference < BOUND, f"llama.cpp's log-probabilities are off by {difference}"
    assert same == POSITIONS, f"{same} of {POSITIONS} best tokens are equal"
    say(
        "llama.cpp", f"{numbers:,} log-probabilities, largest difference {difference:.1e}; all {same} best tokens equal"
    )


def share(run: Path, stock_python: str, scratch: Path) -> None:
    """Push, download, and open with and without multipruner, what is here and what comes from there."""
    token = scratch / "token"
    expected = (str(scratch / "logits.safetensors"), str(run / "model.safetensors"))
    token.write_text(TOKEN + "\n")

    def plain(source: str, **environment: str) -> str:
        return command([stock_python, str(ROOT / ".ci/check_stock.py"), source, *expected], **environment)

    modules = {"HF_MODULES_CACHE": str(scratch / "modules")}
    say("stock transformers", plain(str(run), **modules))
    with fake_hub({TOKEN: ("tester", "write")}) as hub:
        push(hub, run, token, scratch / "sender")
        there = {"HF_ENDPOINT": hub.url, "HF_HOME": str(scratch / "receiver"), "HF_TOKEN_PATH": str(token)}
        copy = Path(command([stock_python, "-c", DOWNLOAD, REPO, "v1"], **there))
        names = sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())
        same = [name for name in names if (run / name).is_file() and name != "README.md"]
        assert all((copy / name).read_bytes() == (run / name).read_bytes() for name in same)
        assert set(names) - set(same) == {".gitattributes", "README.md"}, names
        say("download", f"{len(same)} files equal byte for byte, and the card written for {REPO}")
        say("stock transformers there", plain(str(copy), **modules))
        say("... by its name", plain(REPO, **there))
        say("multipruner.load there", command([sys.executable, "-c", LOAD, str(copy), *expected], **modules))
        say("... by its name", command([sys.executable, "-c", LOAD, REPO, *expected], **there))


def push(hub: FakeHub, run: Path, token: Path, home: Path) -> None:
    """With the real command line, twice: the second time nothing is left to send."""
    here = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home)}
    words = ("push", str(run), REPO, "--yes", "--token-file", str(token))
    told = multipruner_command(*words, **here)
    repo = hub.repos[REPO]
    assert repo.private and repo.tags == {"v1": repo.head} and len(repo.commits) == 2, (repo.private, repo.tags)
    assert repo.files["model.safetensors"].lfs
    assert not any(TOKEN.encode() in blob.content for blob in repo.files.values()), "a token is stored"
    sent = sum(hub.sent("PUT /storage")) + sum(hub.sent("POST .*/commit/"))
    say("push", f"{told.splitlines()[-2]}; {sent:,} bytes over HTTP")
    hub.requests.clear()
    again = multipruner_command(*words, **here)
    assert "0 files sent" in again and not hub.sent("PUT|/commit/|/tag/"), again
    say("... once more", again.splitlines()[-2])


if __name__ == "__main__":
    main()
