"""The dense model teaches: the loss is the divergence, the pruned model comes nearer, and everything says so."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")

import multipruner
from multipruner.checkpoint.load import load
from multipruner.commands import tune as command
from multipruner.config.recipe import EvaluationSpec
from multipruner.core.errors import ConfigError, MultiprunerError
from multipruner.engine.fingerprint import fingerprint
from multipruner.jobs.evaluate import judge_folders
from multipruner.jobs.tune.run import tune
from multipruner.jobs.tune.settings import DISK, LAYERS, PROJECTIONS
from multipruner.jobs.tune.steps import TuneSettings, attach, train
from multipruner.jobs.tune.teacher import Teacher, divergence, keep_predictions, likeliest_divergence
from multipruner.report.write import write_report
from tests.support import tiny

SETTINGS = TuneSettings(steps=20, batch=4, length=16, rank=4, lr=0.005, save_every=7)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _logits(seed: int) -> torch.Tensor:
    return torch.randn(300, 40, generator=torch.Generator().manual_seed(seed)) * 2


def test_the_loss_and_its_gradient_are_the_divergences() -> None:
    ours, plain, dense = _logits(0).requires_grad_(), _logits(0).requires_grad_(), _logits(1)
    loss = divergence(ours, dense)
    expected = F.kl_div(plain.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, expected)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(ours.grad, plain.grad)
    assert divergence(dense, dense).abs() < 1e-6


def test_the_likeliest_tokens_bound_it_from_below() -> None:
    ours, dense = _logits(0), _logits(1)
    full, found = divergence(ours, dense), []
    for top in (1, 5, 20, 40):
        logs, tokens = dense.log_softmax(-1).topk(top)
        found.append(likeliest_divergence(ours, tokens, logs).item())
    assert found == sorted(found) and 0 < found[0] < found[2] < full.item()
    assert found[-1] == pytest.approx(full.item(), rel=1e-3)


def test_what_is_kept_on_disk_is_what_is_said_on_the_fly(own_cache: Path) -> None:
    dense, ours, ids = tiny.tiny_model("llama"), tiny.tiny_model("llama", seed=1), tiny.random_ids(70, 8)
    seen: list[int] = []
    kept = keep_predictions(dense, "w", ids, "t", 6, lambda done, total: seen.append(done))
    assert seen == [0, 32, 64] and kept.is_relative_to(own_cache)
    times = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    next(iter(sorted(times))).unlink()
    assert keep_predictions(dense, "w", ids, "t", 6) == kept
    again = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert sum(times[path] == again[path] for path in times) == 2, "what was there is used"
    rows = torch.tensor([69, 3, 40])
    logits = ours(input_ids=ids[rows]).logits
    told = [one.loss(logits, ids[rows], rows).item() for one in (Teacher(dense, 6), Teacher(None, 6, kept))]
    assert told[0] == pytest.approx(told[1], rel=2e-3) and told[0] > 0.1


def _dense(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def _apart(dense: Any, model: Any) -> float:
    ids = tiny.random_ids(8, 16, seed=9)
    with torch.no_grad():
        return divergence(*(each(input_ids=ids).logits.flatten(0, 1) for each in (model, dense))).item()


@pytest.fixture
def harmed(run: multipruner.Run, tmp_path: Path) -> Any:
    """The run with weights that have been shaken: something that can be learned back."""
    folder = shutil.copytree(run.folder, tmp_path / "harmed")
    path = folder / "model.safetensors"
    weights, noise = load_file(path), torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight += 0.25 * torch.randn(weight.shape, generator=noise)
    save_file(weights, path, {"format": "pt"})
    return replace(run, folder=folder)


def _tune(run: multipruner.Run, output: Path, settings: TuneSettings = SETTINGS, **options: Any) -> Any:
    text = output.with_name("judge.txt")
    text.write_text(" ".join(f"w{4 + n % 60}" for n in range(100)))
    return tune(
        run.folder, output, settings, evaluation=EvaluationSpec(text=str(text), length=32), device="cpu", **options
    )


@pytest.mark.parametrize(
    "how",
    [{}, {"top_k": 8}, {"top_k": 8, "logits": DISK}, {"learn": PROJECTIONS, "lr": 0.01}, {"learn": LAYERS}],
    ids=str,
)
def test_the_pruned_model_comes_nearer_to_the_dense_one(
    how: dict[str, Any], harmed: multipruner.Run, dense: Path, tmp_path: Path
) -> None:
    done = _tune(harmed, tmp_path / "out", replace(SETTINGS, **{"steps": 40, **how}))
    before, after, model = load(harmed.folder), load(tmp_path / "out"), _dense(dense)
    assert _apart(model, after) < 0.95 * _apart(model, before)
    tuned = done.report["tuned"]
    assert tuned["teacher"] == {"fingerprint": fingerprint(model), "top_k": how.get("top_k"),
                                "logits": how.get("logits", "fly")}  # fmt: skip
    assert tuned["data"]["name"] == "self" and tuned["losses"][-1][1] < tuned["losses"][0][1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "distilled from the dense model" in card and "| teacher | the dense model, its " in card
    assert ("LoRA" in card) == ("learn" not in how)
    changed = {
        name for (name, one), other in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(one, other)
    }  # fmt: skip
    if how.get("learn") == PROJECTIONS:
        assert changed and all(name.rpartition(".")[0].endswith(("norm", "o_proj", "down_proj")) for name in changed)
    if how.get("learn") == LAYERS:
        assert changed == {
            name for name, _ in after.named_parameters() if ".layers." in name or name == "model.norm.weight"
        }
    assert all(weight.dtype == torch.float32 for weight in after.parameters())


class _Stop(BaseException):
    """As a kill between two steps."""


@pytest.mark.parametrize("learn", ["lora", PROJECTIONS, LAYERS])
def test_a_stopped_distillation_goes_on_to_the_same_bits(
    learn: str, run: multipruner.Run, dense: Path, tmp_path: Path
) -> None:
    ids, settings = tiny.random_ids(30, 16), replace(SETTINGS, learn=learn)

    def weights(stops: tuple[int, ...], folder: Path) -> list[torch.Tensor]:
        folder.mkdir()
        for stop in (*stops, None):
            model = attach(load(run.folder), settings, "llama")

            def tell(step: int, steps: int, loss: float, stop: int | None = stop) -> None:
                if step == stop:
                    raise _Stop

            try:
                train(model, ids, settings, folder, {}, tell, Teacher(_dense(dense)))
            except _Stop:
                continue
            return [weight.detach() for weight in model.parameters()]
        raise AssertionError

    whole, stopped = weights((), tmp_path / "one"), weights((3, 9), tmp_path / "two")
    assert all(map(torch.equal, whole, stopped))


def test_micro_batches_change_nothing(run: multipruner.Run, dense: Path, tmp_path: Path) -> None:
    found = []
    for number, micro in enumerate((None, 1)):
        settings, folder = replace(SETTINGS, steps=3, micro_batch=micro), tmp_path / str(number)
        folder.mkdir()
        model = attach(load(run.folder), settings)
        progress = train(model, tiny.random_ids(30, 16), settings, folder, {}, teacher=Teacher(_dense(dense)))
        found.append((progress.losses, torch.cat([weight.detach().flatten() for weight in model.parameters()])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-3)
    assert (found[0][1] - found[1][1]).abs().max() < 1e-3


def test_a_cpu_is_not_kept_writing_longer_than_it_trains() -> None:
    short, steps = TuneSettings(minutes=10), TuneSettings(steps=5000)
    assert [short.written("cpu"), short.written("cuda"), steps.written("cpu")] == [320, 1024, 1024]
    assert TuneSettings(minutes=0.01).written("cpu") == short.batch, "every step has a batch of its own at least once"
    assert TuneSettings(minutes=10, sequences=7).written("cpu") == 7 == TuneSettings(sequences=7).written("cuda")


def test_minutes_end_a_training(run: multipruner.Run, tmp_path: Path) -> None:
    ids, settings = tiny.random_ids(30, 16), replace(SETTINGS, steps=None, minutes=0.1, save_every=1000)
    progress = train(attach(load(run.folder), settings), ids, settings, tmp_path, {})
    assert 1 < progress.step < settings.most_steps == 2000
    assert progress.seconds >= 6
    again = train(attach(load(run.folder), settings), ids, settings, tmp_path, {})
    assert again.step == progress.step, "the time is used up, also for who calls again"


def test_without_the_dense_model_the_text_teaches(
    run: multipruner.Run, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "moved" / "run"
    shutil.copytree(run.folder, folder)
    report = json.loads((folder / "report.json").read_text())
    report["model"]["fingerprint"] = "0" * 64
    (folder / "report.json").write_text(json.dumps(report))
    flags = ["--data", str(dense / "text.txt"), "--steps", "2", "--batch", "2", "--length", "16", "--device", "cpu",
             "--eval-text", str(dense / "text.txt"), "--eval-length", "32", "--eval-tokens", "64"]  # fmt: skip
    assert command.run([str(folder), *flags]) == 0
    assert "the dense model is not at hand" in capsys.readouterr().out
    tuned = json.loads((folder.with_name("run-tuned") / "report.json").read_text())["tuned"]
    assert tuned["teacher"] is None and tuned["loss"].startswith("negative")
    with pytest.raises(MultiprunerError, match="other weights now"):
        command.run([str(folder), *flags, "--distill", "--output", str(tmp_path / "out")])


def test_a_tuned_models_numbers_stand_apart(run: multipruner.Run, dense: Path, tmp_path: Path, capsys: Any) -> None:
    from rich.console import Console

    _tune(run, tmp_path / "out", replace(SETTINGS, steps=2))
    settings = {"evaluation": {"text": str(dense / "text.txt"), "length": 64, "max_tokens": 256}}
    with (tmp_path / "shown.txt").open("w") as shown:
        plain, trained = judge_folders(
            [str(run.folder), str(tmp_path / "out")], None, settings, console=Console(file=shown, width=80)
        )
    assert (plain.who, trained.who) == ("pruned", "tuned")
    assert "tuned" in trained.markdown(perplexity=True) and "tuned" not in plain.markdown(perplexity=True)
    assert "tuned" in (tmp_path / "shown.txt").read_text()
    write_report([run.folder, tmp_path / "out"], tmp_path / "report.html")
    assert "out (tuned)" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"logits": "disk"}, "give --top-k as well"),
        ({"learn": "all"}, "learn = 'all': one of lora, projections"),
        ({"minutes": 0.0}, "minutes = 0: above 0"),
        ({"distill": False, "top_k": 4}, "leave --no-distill out"),
    ],
)
def test_settings_that_cannot_be_meant(given: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        TuneSettings(**given)
