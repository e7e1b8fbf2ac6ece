"""Training after the cut: the merged folder is the adapter on the base, it resumes to the bit, and says what it is."""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")

from multipruner.checkpoint.cut import apply_plan
from multipruner.checkpoint.load import load
from multipruner.checkpoint.run_folder import read_run
from multipruner.checkpoint.save import save
from multipruner.commands import tune as command
from multipruner.config.recipe import EvaluationSpec
from multipruner.core.errors import CalibrationError, ConfigError, NumericsError, OutputError
from multipruner.core.families import anatomy_of
from multipruner.engine.fingerprint import fingerprint
from multipruner.jobs.tune.run import tune
from multipruner.jobs.tune.steps import TuneSettings, attach, train
from multipruner.jobs.tune.text import HELD_OUT, tuning_text
from multipruner.publish.package import prepare
from multipruner.report.card import is_untouched, model_card
from multipruner.report.write import write_report
from tests.support import tiny
from tests.support.layers import layers_of, structure_of

SETTINGS = TuneSettings(distill=False, steps=12, batch=4, length=16, rank=3, lr=0.02, save_every=5)
VARIANTS = ("llama-tied", "mistral-sliding", "qwen2-mixed", "baichuan")
CONTRAST = {"dense": 10.0, "dense_stderr": 1.0, "pruned": 12.5, "pruned_stderr": 1.5, "difference": 2.5,
            "difference_stderr": 0.5, "examples": 7}  # fmt: skip


def _run(folder: Path, variant: str = "llama-tied", **kind: Any) -> Path:
    """A finished run of a tiny model; its dense model lies beside it."""
    dense = tiny.tiny_model(**tiny.VARIANTS[variant], **kind)
    dense.save_pretrained(folder.with_name("dense"))
    tiny.tiny_tokenizer().save_pretrained(folder.with_name("dense"))
    plan = tiny.random_plan(dense, 1, drop=0.4)
    amount = {"before": dense.num_parameters(), "after": 1}
    report = {
        "format": "multipruner-report", "version": 1, "ratio": 0.3, "backbone_ratio": 0.3,
        "structure": plan.structure.to_json(), "parameters": amount, "costs": {"weight_bytes": amount},
        "model": {"name": "dense", "revision": None, "description": "d", "fingerprint": fingerprint(dense)},
        "recipe": {"model": str(folder.with_name("dense")), "repair": "none"}, "perplexity": {"text": CONTRAST},
        "tasks": {}, "average": None, "tasks_markdown": "| piqa |", "command": "python -m multipruner --model tiny",
    }  # fmt: skip
    return save(folder, apply_plan(dense, plan), tiny.tiny_tokenizer(), plan=plan, report=report, card="# card\n")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return _run(tmp_path / "run")


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Rows of counting words: something that can be learned."""
    rng, rows = random.Random(0), []
    for _ in range(200):
        begin = rng.randrange(4, 60)
        rows.append({"said": " ".join(f"w{begin + n}" for n in range(12))})
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _tune(run: Path, words: Path, output: Path, settings: TuneSettings = SETTINGS, **options: Any) -> Any:
    text = output.with_name("judge.txt")
    text.write_text(" ".join(f"w{4 + n % 60}" for n in range(200)))
    spec = EvaluationSpec(text=str(text), length=32)
    return tune(run, output, replace(settings, data=str(words)), evaluation=spec, device="cpu", **options)


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    return model(tiny.random_ids()).logits


def _ids(words: Path, settings: TuneSettings = SETTINGS) -> torch.Tensor:
    return tuning_text(
        str(words), tiny.tiny_tokenizer(), {}, sequences=settings.most_steps * settings.batch, length=settings.length,
        seed=settings.seed,
    ).train  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_merged_folder_computes_what_the_adapters_on_the_base_do(variant: str, words: Path, tmp_path: Path) -> None:
    folder = _run(tmp_path / "run", variant)
    before: Any = load(folder, trust_remote_code=True)
    done = _tune(folder, words, tmp_path / "out", trust_remote_code=True)
    adapted = attach(load(folder, trust_remote_code=True), SETTINGS)
    (tmp_path / "state").mkdir()
    progress = train(adapted, _ids(words), SETTINGS, tmp_path / "state", {})
    assert progress.losses[-1] < progress.losses[0] - 0.5
    merged: Any = load(tmp_path / "out", trust_remote_code=True)
    assert (_logits(merged) - _logits(adapted.eval())).abs().max() < 5e-5
    assert (_logits(merged) - _logits(before)).abs().max() > 0.1
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(_logits(opened), _logits(merged))
    assert torch.equal(_logits(done.model), _logits(merged))
    for one, other in ((before, merged), (before, done.model)):
        head, was = other.get_output_embeddings(), one.get_output_embeddings()
        assert torch.equal(other.get_input_embeddings().weight, one.get_input_embeddings().weight)
        assert torch.equal(head.weight, was.weight), "the head does not learn"
        tied = head.weight is other.get_input_embeddings().weight
        assert tied == (was.weight is one.get_input_embeddings().weight) == (variant == "llama-tied")
    for name in ("config.json", "generation_config.json", "plan.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_text() == (folder / name).read_text()
    perplexity = done.report["tuned"]["perplexity"]
    assert set(perplexity) == {"judge.txt", "held-out words.jsonl"}
    assert all(row["after"] < 0.8 * row["before"] for row in perplexity.values())


def test_the_dtype_of_the_checkpoint_stays(words: Path, tmp_path: Path) -> None:
    done = _tune(_run(tmp_path / "run", dtype=torch.bfloat16), words, tmp_path / "out")
    merged = load(tmp_path / "out")
    assert {weight.dtype for weight in merged.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in done.model.parameters()} == {torch.bfloat16}
    assert torch.equal(_logits(done.model), _logits(merged)), "also the rotary frequencies in memory"


def test_a_uniform_result_stays_a_stock_checkpoint(words: Path, tmp_path: Path) -> None:
    dense = tiny.tiny_model("llama")
    sizes = structure_of(*(layer._replace(channels=17) for layer in layers_of(anatomy_of(dense.config).dense)))
    plan, report = tiny.plan_for(dense, sizes), read_run(_run(tmp_path / "other")).report
    save(tmp_path / "run", apply_plan(dense, plan), tiny.tiny_tokenizer(), plan=plan, report=report, card="")
    _tune(tmp_path / "run", words, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert type(stock) is type(dense)
    assert "this is an ordinary checkpoint" in (tmp_path / "out" / "README.md").read_text()


class _Stop(BaseException):
    """As a kill between two steps."""


def test_a_stopped_training_goes_on_to_the_same_bits(run: Path, words: Path, tmp_path: Path) -> None:
    begins: list[int] = []

    def weights(stops: list[int], folder: Path) -> dict[str, torch.Tensor]:
        folder.mkdir()
        begins.clear()
        adapted: Any = None
        for stop in (*stops, None):
            adapted, told = attach(load(run), SETTINGS), []

            def tell(step: int, steps: int, loss: float, stop: int | None = stop, told: list[int] = told) -> None:
                told.append(step)
                if step == stop:
                    raise _Stop

            try:
                progress = train(adapted, _ids(words), SETTINGS, folder, {}, tell)
                assert (progress.step, len(progress.losses)) == (12, 12)
            except _Stop:
                assert {path.name for path in folder.iterdir()} <= {"state.safetensors"}, "no pickles"
            begins.append(told[0])
        return {name: weight.detach() for name, weight in adapted.named_parameters()}

    straight, twice_stopped = weights([], tmp_path / "one"), weights([3, 8, 11], tmp_path / "two")
    assert begins == [1, 1, 6, 11], "after the last state on disk"
    assert all(torch.equal(weight, twice_stopped[name]) for name, weight in straight.items())


def test_the_state_is_used_by_the_same_command_only(
    run: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*args: Any, **options: Any) -> None:
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("multipruner.jobs.tune.run.save", full_disk)
        with pytest.raises(OutputError, match="disk is full"):
            _tune(run, words, tmp_path / "out")
    partial = tmp_path / "out.partial"
    with safe_open(partial / "state.safetensors", "pt") as file:
        assert json.loads(file.metadata()["tuning"])["step"] == 12
    other = replace(SETTINGS, lr=0.01)
    with pytest.raises(OutputError, match=r"other settings \(lr: 0.02, now 0.01\).*--overwrite"):
        _tune(run, words, tmp_path / "out", other)
    first = _tune(run, words, tmp_path / "out").report["tuned"]
    assert not partial.exists()
    with pytest.raises(OutputError, match="exists already"):
        _tune(run, words, tmp_path / "out")
    again = _tune(run, words, tmp_path / "out", overwrite=True).report["tuned"]
    assert again["losses"] == first["losses"], "trained anew, or kept: the same"
    assert _tune(run, words, tmp_path / "out", other, overwrite=True).report["tuned"]["lr"] == 0.01


def test_micro_batches_and_gradient_checkpointing_change_nothing(run: Path, words: Path, tmp_path: Path) -> None:
    found = []
    for number, how in enumerate(({}, {"micro_batch": 2}, {"gradient_checkpointing": True})):
        settings, folder = replace(SETTINGS, steps=3, **how), tmp_path / str(number)
        folder.mkdir()
        adapted = attach(load(run), settings)
        train(adapted, _ids(words), settings, folder, {})
        assert adapted.get_base_model().config.use_cache and not adapted.get_base_model().is_gradient_checkpointing
        found.append(_logits(adapted.eval()))
    assert all((other - found[0]).abs().max() < 1e-3 for other in found[1:])


def test_the_folder_is_a_run_that_says_it_was_trained(run: Path, words: Path, tmp_path: Path) -> None:
    _tune(run, words, tmp_path / "out", command="python -m multipruner tune run")
    found, report = read_run(tmp_path / "out"), json.loads((tmp_path / "out" / "report.json").read_text())
    assert not found.foreign
    assert found.plan == read_run(run).plan
    tuned = report["tuned"]
    assert (tuned["tokens"], tuned["steps"], tuned["lr"], tuned["seed"]) == (12 * 4 * 16, 12, 0.02, 0)
    assert tuned["seconds"]["training"] > 0 and tuned["losses"][-1][0] == 12
    assert report["perplexity"] == {}, "it was that of other weights"
    assert tuned["before"]["perplexity"] == {"text": CONTRAST}
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("trained with LoRA on 768 tokens of `words.jsonl`", "## Training", "rank 3, alpha 6", "0.02",
                 "perplexity | pruned | pruned and trained", "multipruner tune run"):  # fmt: skip
        assert text in card
    shown = f"{tuned['perplexity']['judge.txt']['before']:.3f} | {tuned['perplexity']['judge.txt']['after']:.3f}"
    assert shown in card
    pushed = prepare(tmp_path / "out", "me/small").items({"license": "apache-2.0"})[0].text
    assert pushed is not None and b"## Training" in pushed and b"license: apache-2.0" in pushed
    assert b"path/to/this/folder" not in pushed
    write_report([tmp_path / "out"], tmp_path / "report.html")


@pytest.mark.parametrize("repair", ["none", "lstsq"])
def test_nothing_in_the_card_says_that_nothing_was_trained(repair: str, words: Path, tmp_path: Path) -> None:
    folder = _run(tmp_path / "run")
    report = json.loads((folder / "report.json").read_text())
    report["recipe"]["repair"] = repair
    report["search"] = {"last_norm_refitted": True}
    (folder / "report.json").write_text(json.dumps(report))
    untrained = model_card(report, read_run(folder).plan)
    _tune(folder, words, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for lie in ("no weight was trained", "Nothing was trained", "give these weights again", "has not been evaluated"):
        assert lie not in card
    assert "Nothing was trained" in untrained and "no weight was trained" in untrained, "words of the card changed"
    assert ("give these weights again" in untrained) == (repair == "none")
    repaired = "refitted in closed form, before the training. So was the gain of the last norm."
    assert (repaired in card) == (repair == "lstsq")
    assert not is_untouched(card), "a push must not write it anew"


def test_text_of_the_dense_model_itself(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    text = tuning_text(
        "self", tiny.tiny_tokenizer(), read_run(run).report, sequences=5, length=8, seed=0, say=said.append
    )
    assert text.train.shape == (5, 8) and text.held_out.shape == (HELD_OUT, 8)
    assert any("dense" in line for line in said)
    fewer = tuning_text("self", tiny.tiny_tokenizer(), read_run(run).report, sequences=5, length=8, seed=0, written=3)
    assert fewer.train.shape == (3, 8)
    report = read_run(run).report
    report["model"]["fingerprint"] = "0" * 64
    with pytest.raises(ConfigError, match="other weights now"):
        tuning_text("self", tiny.tiny_tokenizer(), report, sequences=5, length=8, seed=0)


def test_rows_end_with_eos_and_none_is_both_held_out_and_trained_on(words: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tiny_tokenizer()
    text = tuning_text(str(words), tokenizer, {}, sequences=99, length=13, seed=0)  # 12 words and EOS: a row each
    assert all(last == tokenizer.eos_token_id for last in text.train[:, -1].tolist())
    assert len(text.train) == len(set(words.read_text().splitlines())) - HELD_OUT
    rows = {tuple(row) for row in text.train.tolist()}
    assert not rows & {tuple(row) for row in text.held_out.tolist()}
    fewer = tuning_text(str(words), tokenizer, {}, sequences=7, length=13, seed=0)
    assert torch.equal(fewer.held_out, text.held_out), "the same for any number of steps"
    assert fewer.hash != text.hash != tuning_text(str(words), tokenizer, {}, sequences=99, length=13, seed=1).hash
    (tmp_path / "running.txt").write_text("\n".join(f"w{4 + n * n % 93} w{4 + n % 89}" for n in range(999)))
    running = tuning_text(str(tmp_path / "running.txt"), tokenizer, {}, sequences=9, length=13, seed=0)
    assert tokenizer.eos_token_id not in running.train


def test_faults_are_told_before_any_work(
    run: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"steps = 0: at least 1; lr = 2: .*; micro_batch = 3: .*batch of 8"):
        TuneSettings(steps=0, lr=2, micro_batch=3)
    with pytest.raises(OutputError, match="in use"):
        _tune(run, words, run, overwrite=True)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "measurements.jsonl").write_text("{}\n")
    with pytest.raises(OutputError, match="an interrupted run, no training"):
        _tune(run, words, tmp_path / "out")
    assert (tmp_path / "out.partial" / "measurements.jsonl").read_text() == "{}\n"
    shutil.rmtree(tmp_path / "out.partial")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a folder that multipruner wrote"):
        _tune(run, words, tmp_path / "thesis", overwrite=True)
    with pytest.raises(OutputError, match="no folder"):
        _tune(tmp_path / "none", words, tmp_path / "out")
    with pytest.raises(CalibrationError, match="less than 2176 tokens"):
        _tune(run, words, tmp_path / "out", replace(SETTINGS, length=1000))
    with pytest.raises(CalibrationError, match="no calibration text"):
        _tune(run, tmp_path / "none.jsonl", tmp_path / "out")
    with pytest.raises(ConfigError, match="not token ids"):
        _tune(run, tmp_path / "ids.safetensors", tmp_path / "out")
    with pytest.raises(CalibrationError, match=r"cannot reach the Hub for alpaca .*--data self"):
        tuning_text("alpaca", tiny.tiny_tokenizer(), {}, sequences=5, length=8, seed=0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'multipruner\[tune\]'"):
        _tune(run, words, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_loss_that_is_not_finite_stops_the_training(run: Path, words: Path, tmp_path: Path) -> None:
    model: Any = load(run)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = torch.nan
    with pytest.raises(NumericsError, match="step 1; give a smaller --lr"):
        train(attach(model, SETTINGS), _ids(words), SETTINGS, tmp_path, {})


def test_the_command_line(run: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge = tmp_path / "judge.txt"
    judge.write_text(" ".join(f"w{4 + n % 60}" for n in range(200)))
    flags = [
        "--data",
        str(words),
        "--steps",
        "3",
        "--batch",
        "2",
        "--length",
        "16",
        "--rank",
        "2",
        "--lr",
        "0.01",
        "--no-distill",
    ]
    flags += ["--eval-text", str(judge), "--eval-length", "32", "--eval-tokens", "64", "--device", "cpu"]
    assert command.run([str(run), *flags]) == 0
    shown = capsys.readouterr().out
    assert "judge.txt" in shown and "held-out words.jsonl" in shown and "trained on 96 tokens" in shown
    assert "grad_norm" not in shown, "the Trainer keeps quiet"
    tuned = read_run(tmp_path / "run-tuned").report["tuned"]
    assert tuned["command"].startswith("python -m multipruner tune ") and tuned["evaluation"]["max_tokens"] == 64
    assert tuned["perplexity"]["judge.txt"]["examples"] == 2
