"""A suite tells a damaged model from a good one; its numbers are the plain computations; dense results are kept."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import multipruner
from multipruner.commands.main import main
from multipruner.config.choices import loaded
from multipruner.core.errors import ConfigError, NumericsError
from multipruner.eval import Comparison, Evaluation, MetricResult, TaskResult, compare
from multipruner.eval.floors import floor_of
from multipruner.eval.kept import Kept, folder_digest
from multipruner.eval.suite.agreement import agreement, divergence, reference
from multipruner.eval.suite.generation import distinct, generation, loops
from multipruner.eval.suite.long_inference import _haystack, long_inference
from multipruner.eval.suite.positions import positions
from multipruner.eval.suite.run import measures, references
from multipruner.eval.suite.subject import Subject
from multipruner.eval.suite.table import KINDS, MEASURES, SUITES, Suite, suite_of, tokens_of
from multipruner.eval.suite.texts import beginning, library_code
from multipruner.report.card import is_untouched
from multipruner.report.write import write_report
from tests.support.tiny import random_ids, tiny_model, tiny_tokenizer

ROUND = 60
"""Words of the trained model's cycle; longer than what it is asked to write, so that it is no loop."""
ASKED = tuple(f"w{begin} w{begin + 1} w{begin + 2}" for begin in range(6, 30, 3))


def counting(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Words in their order, from any of them on, [rows, length]."""
    begins = torch.randint(0, ROUND, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return 4 + (begins + torch.arange(length)) % ROUND


@pytest.fixture(scope="module")
def good() -> Any:
    """A tiny model that has learned to count."""
    model = tiny_model("llama", layers=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(120):
        ids = counting(16, 24, step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def damaged(good: Any) -> Any:
    """The same with an attention that reads nothing."""
    model = copy.deepcopy(good)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.mul_(0.2)
    return model


def subject(model: Any, **texts: torch.Tensor) -> Subject:
    kinds = dict.fromkeys(KINDS, counting(1, 400)[0]) | texts
    return Subject(model.requires_grad_(False), tiny_tokenizer(), kinds, 128)


def plain(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)


def test_a_damaged_model_is_told_from_a_good_one(good: Any, damaged: Any) -> None:
    whole, broken = (
        generation(subject(model), prompts=8, tokens=40, texts=ASKED) for model in (good, damaged)
    )  # fmt: skip
    assert whole["looping, greedy"].value == 0 and broken["looping, greedy"].value == 1
    assert whole["distinct 2-grams, greedy"].value > 0.7 > 0.3 > broken["distinct 2-grams, greedy"].value
    settings = {"length": 32, "sequences": 4, "top": 16}
    dense = reference(subject(good), **settings)
    same, other = (agreement(subject(model).beside(dense), **settings) for model in (good, damaged))
    for kind in KINDS:
        assert same[f"KL, {kind}"].value == pytest.approx(0, abs=1e-6)
        assert same[f"same first choice, {kind}"].value == 1
        assert other[f"KL, {kind}"].value > 0.5
        assert other[f"same first choice, {kind}"].value < 0.5
    losses = [positions(subject(model), length=64, sequences=2)["loss at 16 to 62"].value for model in (good, damaged)]
    assert losses[0] < 0.3 < 1 < losses[1]


def test_loops_and_variety() -> None:
    assert loops([1, 2, 3] * 5)
    assert loops([*range(100, 120), *[7, 8] * 6]), "12 of 32 tokens"
    assert not loops([*range(100, 160), *[7, 8] * 6]), "12 of 72 tokens"
    assert not loops(list(range(40)))
    assert not loops([1, 2, 1, 2]), "twice is none"
    assert not loops([])
    assert distinct([1, 2, 1, 2], 2) == pytest.approx(2 / 3)
    assert distinct([1], 2) == 1


def test_an_output_that_ends_is_counted_without_its_end(good: Any) -> None:
    model = copy.deepcopy(good)
    model.generation_config.eos_token_id = [40, 2]
    found = generation(subject(model), prompts=8, tokens=64, texts=ASKED)
    assert found["ended, greedy"].value == 1
    begins = [int(text.split()[-1][1:]) for text in ASKED]
    assert found["length, greedy"].examples == {str(n): 39.0 - begin for n, begin in enumerate(begins)}


@pytest.mark.parametrize("top", [5, 97])
def test_agreement_is_the_divergence(top: int, good: Any, damaged: Any) -> None:
    ids = random_ids(1, 33, seed=4)
    settings = {"length": 33, "sequences": 1, "top": top}
    dense = reference(subject(good, prose=ids[0]), **settings)
    found = agreement(subject(damaged, prose=ids[0]).beside(dense), **settings)
    p, q = plain(good, ids)[0], plain(damaged, ids)[0]
    full = (p.exp() * (p - q)).sum(-1).mean().item()
    assert found["same first choice, prose"].value == pytest.approx(
        (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    )
    if top == 97:
        assert found["KL, prose"].value == pytest.approx(full, rel=1e-4)
    else:
        assert 0 < found["KL, prose"].value < full
    assert divergence(p, p).abs().max() < 1e-8


def test_a_prediction_that_is_nan_is_refused(good: Any) -> None:
    broken = copy.deepcopy(good)
    settings = {"length": 16, "sequences": 1, "top": 4}
    dense = reference(subject(good), **settings)
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="NaN"):
        agreement(subject(broken).beside(dense), **settings)


def test_bits_per_byte_and_bands_are_the_plain_computation() -> None:
    model, ids = tiny_model("llama"), random_ids(1, 200, seed=3)[0]
    found = positions(subject(model, prose=ids), length=80, sequences=2)
    rows = ids[:160].view(2, 80)
    losses = -plain(model, rows).gather(2, rows[:, 1:, None])[..., 0]
    sizes = [
        len(str(tiny_tokenizer().decode(row)).encode()) - len(str(tiny_tokenizer().decode(row[:1])).encode())
        for row in rows
    ]
    bits = [float(loss.sum()) / math.log(2) / size for loss, size in zip(losses, sizes, strict=True)]
    assert list(found["bits per byte"].examples.values()) == pytest.approx(bits)
    assert found["loss per token"].value == pytest.approx(losses.mean().item())
    bands = {name: result.value for name, result in found.items() if name.startswith("loss at")}
    assert set(bands) == {"loss at 0 to 15", "loss at 16 to 63", "loss at 64 to 78"}
    assert bands["loss at 16 to 63"] == pytest.approx(losses[:, 16:64].mean().item())


def test_the_loss_beyond_the_context_where_the_model_goes_there() -> None:
    ids = random_ids(1, 400, seed=3)[0]
    found = positions(subject(tiny_model("llama"), prose=ids), length=500, sequences=1, beyond=1.5)
    assert found["loss beyond the context"].value > 0
    assert "loss beyond the context" not in positions(subject(tiny_model("llama"), prose=ids), length=64, sequences=1,
                                                      beyond=1.5)  # fmt: skip
    short = positions(subject(tiny_model("llama"), prose=ids[:100]), length=500, sequences=1, beyond=1.5)
    assert "loss beyond the context" not in short, "the text ends before"


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen3"])
def test_a_cache_gives_what_no_cache_gives(variant: str) -> None:
    settings = {"length": 60, "steps": 9, "haystack": 60, "needles": 2, "places": 3}
    found = long_inference(subject(tiny_model(variant)), **settings)
    assert found["same choice with cache"].value == 1 and len(found["cache apart"].examples) == 9
    assert found["cache apart"].value < 1e-4
    assert {"needle found at 0%", "needle found at 50%", "needle found at 100%", "loss of the needles"} < set(found)


class _Forgets(type(tiny_model("llama", layers=1))):
    """A model whose cache is of no use: it begins anew with every call."""

    def forward(self, *args: Any, past_key_values: Any = None, **options: Any) -> Any:
        return super().forward(*args, **options)


def test_a_broken_cache_is_seen() -> None:
    model = tiny_model("llama")
    model.__class__ = _Forgets
    found = long_inference(subject(model), length=60, steps=9, haystack=60, needles=1, places=2)
    assert found["cache apart"].value > 0.01


def test_a_needle_lies_where_it_is_said() -> None:
    class Letters:
        """One token for each letter."""

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

    hay = torch.full((500,), ord("-"))
    for share in (0.0, 0.5, 1.0):
        ids, answer = _haystack(Letters(), hay, 200, share, 1)
        text = "".join(map(chr, ids.tolist()))
        assert len(ids) == 200 and text[-answer:] == " 70956"
        assert text.count("Brightwater is 70956") == 2, "the sentence, and question and answer"
        before, after = text.index("\n"), text[:-answer].rindex("\n") - text.index(".\n") - 2
        assert before == pytest.approx(share * (before + after), abs=1)


def test_constant_answers() -> None:
    def samples(golds: list[Any], choices: int) -> list[dict[str, Any]]:
        return [{"doc_id": n, "target": gold, "resps": [0] * choices} for n, gold in enumerate(golds)]

    kind = {"output_type": "multiple_choice"}
    output = {
        "samples": {"a": samples([0, 1, 1, 1], 2), "b": samples([0] * 6, 2), "c": samples(["x", "y"], 4),
                    "d": samples([1, 0], 1)},
        "configs": {"a": kind, "b": kind, "c": kind, "d": {"output_type": "loglikelihood"}},
    }  # fmt: skip
    assert floor_of(output, ["a"]) == 0.75
    assert floor_of(output, ["b"]) == 0.5, "the right sentence is always the first one: chance"
    assert floor_of(output, ["c"]) == 0.25, "not told where: chance"
    assert floor_of(output, ["d"]) == 0
    assert floor_of(output, ["a", "b"]) == pytest.approx(0.6)


def _scored(**right: tuple[int, int, float]) -> Evaluation:
    """Tasks with so many right answers of so many, and a floor."""
    tasks = {}
    for name, (hits, count, floor) in right.items():
        result = MetricResult.of({str(n): float(n < hits) for n in range(count)})
        tasks[name] = TaskResult({"acc": MetricResult(result.value, result.stderr, result.examples, floor)})
    return Evaluation({}, tasks, {"long": TaskResult({"cache apart": MetricResult.of({"0": 0.5, "1": 0.75})}, "1")})


def test_retention_intervals_and_floors() -> None:
    dense, pruned = _scored(a=(80, 100, 0.5), b=(50, 100, 0.0)), _scored(a=(70, 100, 0.5), b=(40, 100, 0.0))
    found = compare(dense, pruned, "quick")
    kept = found.retention
    assert kept is not None and (kept.tasks, kept.worst_task) == (2, "b")
    assert (kept.mean, kept.worst) == (pytest.approx((0.875 + 0.8) / 2), pytest.approx(0.8))
    assert kept.spread == pytest.approx(0.075 / math.sqrt(2))
    assert kept.above_floor == pytest.approx((0.2 / 0.3 + 0.4 / 0.5) / 2)
    contrast = found.tasks["a"]["acc"]
    low, high = contrast.interval or (0, 0)
    assert contrast.difference == pytest.approx(-0.1) == (low + high) / 2
    assert high - low == pytest.approx(2 * 1.98422 * (contrast.difference_stderr or 0), rel=1e-5)
    record = json.loads(json.dumps(found.to_json()))
    assert Comparison.from_json(record) == found and record["retention"]["worst_task"] == "b"
    shown = found.markdown()
    assert "| a acc (constant answer 0.5000) | 100 | 0.8000 | 0.7000 | -0.1000 |" in shown
    assert "| cache apart | 2 | 0.6250 | 0.6250 | +0.0000 | +0.0000 to +0.0000 |" in shown
    assert "accuracy kept, worst (b) |  |  | 80.0% |" in shown
    assert "suite" not in compare(dense, pruned).to_json() and "cache apart" not in compare(dense, pruned).markdown()
    assert Evaluation.from_json(json.loads(json.dumps(dense.to_json()))) == dense


def test_rows_lead_to_their_code() -> None:
    for suite in SUITES.values():
        assert set(suite.measures) <= set(MEASURES) and set(tokens_of(suite)) == set(KINDS)
    for row in MEASURES.values():
        assert callable(loaded(row.by)) and (row.reference is None or callable(loaded(row.reference)))
    with pytest.raises(ConfigError, match=r"no suite 'quik' \(did you mean 'quick'\?\)"):
        suite_of("quik")
    assert len(beginning(tiny_tokenizer(), library_code(), 3000)) == 3000


def test_what_was_measured_of_the_dense_model_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path))
    suite = Suite("", {"agreement": {"length": 16, "sequences": 2, "top": 4}, "text": {"length": 16, "sequences": 2}})
    model, told = subject(tiny_model("llama")), lambda what, done, total: None

    def run(**about: Any) -> tuple[Any, list[str]]:
        kept = Kept({"weights": "1", **about})
        return (references(model, suite, kept, told), measures(model, suite, kept, told)), kept.found

    (first, scores), found = run()
    assert found == []
    (again, same), found = run()
    assert sorted(found) == ["agreement", "agreement (reference)", "text"]
    assert same == scores and all(
        torch.equal(first["agreement"][key], again["agreement"][key]) for key in first["agreement"]
    )
    assert run(device="cuda")[1] == []
    for path in (tmp_path / "evaluations").iterdir():
        path.write_bytes(b"{")
    assert run()[0][1] == scores and run()[1] == ["agreement (reference)", "agreement", "text"], (
        "damaged: measured anew"
    )
    assert list(Kept().result("x", {}, lambda: {"value": 1})) == ["value"]
    (tmp_path / "a.yaml").write_text("task: a")
    before = folder_digest(tmp_path)
    (tmp_path / "a.yaml").write_text("task: b")
    assert folder_digest(tmp_path) != before and folder_digest(None) is None


def test_the_command(
    run: multipruner.Run, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))
    small = {
        "text": {"length": 64, "sequences": 2},
        "agreement": {"length": 16, "sequences": 2, "top": 8},
        "generation": {"prompts": 3, "tokens": 8},
        "long": {"length": 32, "steps": 4, "haystack": 48, "needles": 1, "places": 3},
    }
    monkeypatch.setitem(SUITES, "quick", Suite("small", small, limit=3))
    command = ["eval", str(run.folder), "--suite", "quick", "--tasks", "ppl", "--eval-text", str(dense / "text.txt")]
    assert main(command) == 0
    shown = capsys.readouterr().out
    for text in ("bits per byte", "KL, own", "looping, sampled", "needle found at 50%", "95 % interval", "perplexity"):
        assert text in shown
    assert "measured before" not in shown
    assert main([*command, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)[str(run.folder)]
    assert printed["suite"] == "quick" and printed["measures"]["agreement"]["KL, code"]["dense"] == 0
    assert main(command) == 0
    assert "as it was measured before: ppl, agreement (reference), text" in capsys.readouterr().out
    report = json.loads((run.folder / "report.json").read_text())
    assert [entry["settings"]["suite"] for entry in report["evaluations"]] == ["quick"] * 3
    write_report([run.folder], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Suite “quick”" in page and "looping, greedy" in page
    assert is_untouched((run.folder / "README.md").read_text())
    from multipruner.report.card import model_card

    assert "| looping, greedy | 3 |" in model_card(report, run.plan)


@pytest.mark.slow
def test_the_real_model_with_damaged_layers() -> None:
    """Three MLPs in the middle give nothing: three in ten choices or more change, and it repeats itself more."""
    from multipruner.config.recipe import Recipe
    from multipruner.recipes import mapping_for
    from multipruner.sources.dense import load_dense
    from multipruner.sources.resolve import resolve

    recipe = Recipe.build({**mapping_for("llama"), "dtype": "float32"})
    model, tokenizer = load_dense(resolve(recipe, print), recipe)
    short = {"agreement": {"length": 64, "sequences": 2, "top": 32}, "generation": {"prompts": 6, "tokens": 48}}
    code = beginning(tokenizer, library_code(), 256)
    one = Subject(model, tokenizer, {"code": code}, 2048)
    quiet = lambda what, done, total: None  # noqa: E731
    beside = references(one, Suite("", short), Kept(), quiet)
    dense = measures(one, Suite("", short), Kept(), quiet, beside)
    with torch.no_grad():
        for number in (1, 10, 20):
            model.model.layers[number].mlp.down_proj.weight.zero_()  # pyright: ignore
    broken = measures(one, Suite("", short), Kept(), quiet, beside)
    results = [found["agreement"].metrics for found in (dense, broken)]
    assert results[0]["KL, code"].value < 1e-4 and results[1]["KL, code"].value > 0.5
    assert results[1]["same first choice, code"].value < 0.7
    written = [found["generation"].metrics for found in (dense, broken)]
    assert written[1]["looping, greedy"].value > written[0]["looping, greedy"].value
