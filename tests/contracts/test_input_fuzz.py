"""Random edits of a checkpoint end in the dense model's own function with parts zeroed, or in one line and exit 2."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from multipruner.commands.main import main
from multipruner.core.plan import PruningPlan
from tests.support.inputs import FILE, Weights, copied, edit_json, edit_tensors, short_run, write_model
from tests.support.tiny import masked_model, random_ids, tiny_tokenizer

KEYS = (
    "architectures", "attention_bias", "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim",
    "hidden_act", "hidden_size", "initializer_range", "intermediate_size", "layer_types", "max_position_embeddings",
    "mlp_bias", "model_type", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "pad_token_id",
    "quantization_config", "rms_norm_eps", "rope_parameters", "sliding_window", "tie_word_embeddings", "auto_map",
    "torch_dtype", "use_cache", "vocab_size", "return_dict", "text_config", "transformers_version", "pretraining_tp",
)  # fmt: skip
VALUES = st.sampled_from(
    [None, True, False, -1, 0, 1, 2, 3, 97, 10**9, 10**30, 0.5, 1e-6, float("nan"), float("inf"), "", "x", "gelu",
     "float16", "mistral", [], [1], ["LlamaForCausalLM"], {}, {"a": 1}, {"rope_type": "linear", "factor": 2.0,
     "rope_theta": 1e4}, {"rope_type": "yarn"}, ...]
)  # fmt: skip
CONFIG = st.tuples(st.just("config"), st.sampled_from(KEYS), VALUES)
TENSOR = st.tuples(
    st.sampled_from(["drop", "rename", "transpose", "cut", "half", "brain", "int8", "float8", "nan", "inf", "huge",
                     "zero", "add", "double"]),
    st.integers(0, 20), st.none(),
)  # fmt: skip
TOKENIZER = st.tuples(
    st.just("tokenizer"),
    st.sampled_from(["tokenizer.json", "tokenizer_config.json"]),
    st.sampled_from(["gone", "cut", "list", "empty", "object", "more", "pad"]),
)
EDITS = st.lists(st.one_of(CONFIG, TENSOR, TOKENIZER), min_size=1, max_size=2)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("fuzz") / "plain")


def changed(weights: Weights, kind: str, number: int) -> Weights:
    """One tensor edited."""
    name = sorted(weights)[number % len(weights)]
    weight = weights.pop(name)
    types = {"half": torch.float16, "brain": torch.bfloat16, "int8": torch.int8, "float8": torch.float8_e4m3fn,
             "double": torch.float64}  # fmt: skip
    fills = {"nan": torch.nan, "inf": torch.inf, "zero": 0.0}
    if kind in types:
        weights[name] = weight.to(types[kind])
    elif kind in fills:
        filled = weight.double().flatten().index_fill(0, torch.tensor([1]), fills[kind])
        weights[name] = filled.view(weight.shape).to(weight.dtype)
    elif kind == "rename":
        weights[f"{name}.old"] = weight
    elif kind == "transpose":
        weights[name] = weight.T if weight.ndim > 1 else weight[None]
    elif kind == "cut":
        weights[name] = weight[: len(weight) // 2]
    elif kind == "huge":
        weights[name] = (weight.double() * 1e37).to(weight.dtype)
    elif kind == "add":
        weights |= {name: weight, f"{name}.new": weight}
    return weights


def spoilt(folder: Path, name: str, how: str) -> None:
    """The tokenizer's files edited."""
    path = folder / name
    if how == "gone":
        path.unlink(missing_ok=True)
    elif how in ("cut", "list", "empty", "object"):
        whole = path.read_text() if path.exists() else ""
        path.write_text({"cut": whole[: len(whole) // 2], "list": "[]", "empty": "", "object": "{}"}[how])
    else:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<more>"]) if how == "more" else tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        tokenizer.save_pretrained(folder)


def apply(folder: Path, edits: list[Any]) -> None:
    for kind, what, value in edits:
        if kind == "config":
            edit_json(folder / "config.json", **{what: value})
        elif kind == "tokenizer":
            spoilt(folder, what, value)
        else:
            edit_tensors(folder, lambda w, kind=kind, what=what: changed(w, kind, what))


def check(plain: Path, edits: list[Any]) -> None:
    work = plain.parent / "work"
    shutil.rmtree(work, ignore_errors=True)
    folder, out = copied(plain, work / "model"), work / "out"
    apply(folder, edits)
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        code = main(short_run(folder, out))
    lines = [line for line in said.getvalue().splitlines() if line.startswith("multipruner:")]
    assert "Traceback" not in said.getvalue()
    if code == 2:
        assert len(lines) == 1 and not out.exists(), said.getvalue()
        begun = (work / "out.partial" / "measurements.jsonl").exists()
        assert not begun or "finite loss" in lines[0] or "not finite" in lines[0], "only candidates may still overflow"
        return
    assert code == 0, said.getvalue()
    dense: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    dense.config.return_dict = True
    plan = PruningPlan.from_json((out / "plan.json").read_text())
    masked = masked_model(dense.eval(), plan)
    small: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        wanted, found = (model(random_ids(2, 24)).logits for model in (masked, small))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.01 * float(wanted.abs().max()))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == wanted.shape[-1] and (out / FILE).exists()


STEADY = settings(
    derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)  # fmt: skip


@settings(STEADY, max_examples=80)
@given(edits=EDITS)
def test_edits_end_well(plain: Path, edits: list[Any]) -> None:
    check(plain, edits)


@pytest.mark.slow
@settings(STEADY, max_examples=1500)
@given(edits=EDITS)
def test_many_edits_end_well(plain: Path, edits: list[Any]) -> None:
    check(plain, edits)


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_every_value_of_a_key_ends_well(plain: Path, key: str) -> None:
    for value in VALUES.elements:  # pyright: ignore[reportAttributeAccessIssue]
        check(plain, [("config", key, value)])
