"""The type that is computed in: chosen by what the machine multiplies fastest, and never seen in the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import multipruner
from multipruner.commands.main import main
from multipruner.core.plan import PruningPlan
from multipruner.engine import precision
from multipruner.engine.precision import GAIN, Held, Precision, choose, product_rates
from multipruner.eval import perplexity
from multipruner.sources import sampled_text as sampling
from tests.support.caches import cache_at
from tests.support.tiny import VARIANTS, tiny_model, tiny_tokenizer

HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("asked", "stored", "rates", "chosen"),
    [
        ("auto", torch.bfloat16, {"bfloat16": 15.0, "float32": 60.0}, torch.float32),
        ("auto", torch.bfloat16, {"bfloat16": 400.0, "float32": 170.0}, torch.bfloat16),
        ("auto", torch.bfloat16, {"bfloat16": 100.0, "float32": 100.0 * GAIN}, torch.bfloat16),
        ("auto", torch.float16, {"float16": 15.0, "bfloat16": 900.0, "float32": 60.0}, torch.float32),
        ("auto", torch.float32, {}, torch.float32),
        ("auto", torch.float32, {"bfloat16": 400.0, "float32": 170.0}, torch.float32),
        ("bfloat16", torch.bfloat16, {"bfloat16": 15.0, "float32": 60.0}, torch.bfloat16),
        ("float32", torch.float16, {}, torch.float32),
    ],
)
def test_float32_is_chosen_where_it_is_clearly_faster(
    asked: str, stored: torch.dtype, rates: dict[str, float], chosen: torch.dtype
) -> None:
    assert choose(asked, stored, rates) == chosen


def test_rates_are_measured_for_every_type_asked_for() -> None:
    rates = product_rates(torch.device("cpu"), precision.TYPES)
    assert set(rates) == {"bfloat16", "float16", "float32"} and all(0.01 < rate < 1e6 for rate in rates.values())


def test_nothing_is_measured_where_nothing_hangs_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "product_rates", lambda *_: pytest.fail("measured"))
    assert Precision.of(tiny_model("llama")).computed == torch.float32
    assert Precision.of(tiny_model("llama", dtype=torch.bfloat16), "bfloat16").computed == torch.bfloat16
    told = Precision.of(tiny_model("llama", dtype=torch.bfloat16), rates={"bfloat16": 1.0, "float32": 9.0})
    assert told.computed == torch.float32 and told.line() == (
        "computing in float32; the weights are stored, and written, in bfloat16 (GFLOP/s here: bfloat16 1, float32 9)"
    )


@pytest.mark.parametrize("computed", precision.TYPES)
@pytest.mark.parametrize("stored", precision.TYPES)
@pytest.mark.parametrize("variant", ["llama-tied", "qwen3"])
def test_weights_come_back_as_they_were(variant: str, stored: torch.dtype, computed: torch.dtype) -> None:
    model = tiny_model(**VARIANTS[variant], dtype=stored)
    model.model.norm.weight.data = torch.randn(48)  # as in checkpoints whose norms are in float32
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    buffers = {name: buffer.dtype for name, buffer in model.named_buffers()}
    held = Held(model, stored, computed)
    assert model.lm_head.weight.dtype == computed and {n: b.dtype for n, b in model.named_buffers()} == buffers
    assert model.model.norm.weight.dtype == (computed if stored == torch.float32 else torch.float32)
    tied = variant == "llama-tied"
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    with held.released():
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        assert {name: weight.dtype for name, weight in model.state_dict().items()} == {
            name: weight.dtype for name, weight in before.items()
        }
    assert model.lm_head.weight.dtype == computed
    held.release()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_weights_come_back_after_an_error() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    with pytest.raises(KeyError), Precision.of(model, "float32").computing(model):
        raise KeyError
    assert model.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """The same model, stored in every type."""
    made = {}
    for dtype in precision.TYPES:
        made[dtype] = tmp_path_factory.mktemp("models") / str(dtype)[6:]
        tiny_model("llama", layers=4, dtype=dtype).save_pretrained(made[dtype])
        tiny_tokenizer().save_pretrained(made[dtype])
        text = " ".join(f"w{4 + (n * n + n // 7) % 93}" for n in range(4000))
        (made[dtype] / "text.txt").write_text(text)
    return made


def _prune(folder: Path, output: Path, *more: str) -> int:
    typed = [
        "--model", str(folder), "--ratio", "0.3", "--sequences", "4", "--moments-sequences", "64", "--length", "16",
        "--channel-group", "8", "--calibration", "self", "--eval-text", str(folder / "text.txt"),
        "--output", str(output), *more,
    ]  # fmt: skip
    return main(typed)


@pytest.mark.parametrize("computed", ["bfloat16", "float32"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_both_types_lead_to_valid_results_of_the_checkpoints_type(
    stored: torch.dtype, computed: str, folders: dict[torch.dtype, Path], tmp_path: Path
) -> None:
    assert _prune(folders[stored], tmp_path / "run", "--compute-dtype", computed) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["precision"] == {"computed": computed, "stored": str(stored)[6:], "gflops": {}}
    assert report["costs"]["weight_bytes"]["before"] == report["parameters"]["before"] * stored.itemsize
    written, dense = load_file(tmp_path / "run" / "model.safetensors"), load_file(folders[stored] / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {stored}
    assert torch.equal(written["model.embed_tokens.weight"], dense["model.embed_tokens.weight"]), "to the bit"
    kept = list(PruningPlan.from_json((tmp_path / "run" / "plan.json").read_text()).blocks[1].axes[0])
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(written[name], dense[name][kept]), "what is only cut is cut, not rounded"
    assert multipruner.load(tmp_path / "run").dtype == stored


def test_what_is_evaluated_is_what_is_written(folders: dict[torch.dtype, Path], tmp_path: Path) -> None:
    """Repaired weights are rounded to the checkpoint's type before they are judged; `eval` finds the same numbers."""
    folder = folders[torch.bfloat16]
    assert _prune(folder, tmp_path / "run", "--compute-dtype", "float32") == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    ids = tiny_tokenizer()((folder / "text.txt").read_text(), return_tensors="pt")["input_ids"][0]
    again = perplexity(multipruner.load(tmp_path / "run", dtype=torch.float32), ids)
    assert again.value == pytest.approx(report["perplexity"]["text.txt"]["pruned"], rel=1e-6)
    assert main(["eval", str(tmp_path / "run"), "--compute-dtype", "float32", "--tasks", "ppl"]) == 0
    later = json.loads((tmp_path / "run" / "report.json").read_text())["evaluations"][0]["perplexity"]["text.txt"]
    assert later["pruned"] == pytest.approx(again.value, rel=1e-6)
    assert later["dense"] == pytest.approx(report["perplexity"]["text.txt"]["dense"], rel=1e-6)


def test_sampling_goes_on_batch_by_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A kill loses the batch at hand, and the text is the same as without it."""
    cache_at(monkeypatch, tmp_path)
    monkeypatch.setattr(sampling, "BATCH_TOKENS", 48)
    monkeypatch.setattr(sampling, "BATCH_BYTES", 0)
    model, tokenizer, begun = tiny_model("llama"), tiny_tokenizer(), []
    expected, original = sampling.sample(model, tokenizer, 10, 12, seed=5), sampling._continue

    def interrupted(*arguments: Any) -> torch.Tensor:
        begun.append(len(arguments[2]))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(sampling, "_continue", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampling.self_text(model, tokenizer, 10, 12, 5)
    assert begun == [4, 4, 2]
    assert torch.equal(sampling.self_text(model, tokenizer, 10, 12, 5), expected)
    assert begun == [4, 4, 2, 2], "only what was lost is sampled again"
    assert [path.name for path in (tmp_path / "self-text").iterdir() if path.suffix == ".parts"] == []
    assert torch.equal(sampling.self_text(model, tokenizer, 10, 12, 5), expected) and len(begun) == 4
