"""Perplexity equals the plain computation; lm-eval's numbers come through; paired statistics are right; no network."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub.constants
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import multipruner.eval
from multipruner.config.recipe import EvaluationSpec
from multipruner.core.errors import CalibrationError, ConfigError, NumericsError
from multipruner.eval import (
    Comparison,
    Evaluation,
    MetricResult,
    Perplexity,
    TaskResult,
    compare,
    evaluate,
    harness,
    perplexity,
    run_tasks,
    scoring,
    text,
    wikitext_text,
)
from multipruner.storage import hub
from tests.support.tiny import tiny_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
WORDS = 97


def tiny_llama(**config: Any) -> Any:
    """Two layers, hidden 32, 97 words, contexts of 64 tokens; weights large enough that predictions differ."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    settings = {**sizes, "vocab_size": WORDS, "num_hidden_layers": 2, "max_position_embeddings": 64, **config}
    return LlamaForCausalLM(LlamaConfig(initializer_range=0.5, **settings))


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(4, WORDS, shape, generator=torch.Generator().manual_seed(seed))


def plain_nll(model: Any, rows: torch.Tensor) -> list[float]:
    """All logits at once in float64, one sequence after the other."""
    with torch.no_grad():
        logits = [model(input_ids=row[None]).logits[0, :-1].double() for row in rows]
    return [F.cross_entropy(x, row[1:]).item() for x, row in zip(logits, rows, strict=True)]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network. The variables are read when the libraries are imported, so what they read is set."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


# perplexity


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("chunk", [5, 128])
def test_perplexity_is_the_plain_computation(monkeypatch: pytest.MonkeyPatch, batch_size: int, chunk: int) -> None:
    monkeypatch.setitem(scoring._CHUNK, "cpu", chunk)
    model, ids = tiny_llama(), some_ids(150)
    result = perplexity(model, ids, length=32, batch_size=batch_size)
    expected = plain_nll(model.eval(), ids[:128].view(4, 32))
    np.testing.assert_allclose(result.sequence_nll, expected, rtol=1e-6)
    assert np.std(expected) > 1e-3
    assert (result.sequences, result.tokens, result.length) == (4, 4 * 31, 32)
    assert result.value == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)
    assert result.stderr == pytest.approx(float(np.std(expected, ddof=1)) / 2, rel=1e-5)


class _Capped(LlamaForCausalLM):
    """A family that caps its logits after the output projection."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = super().forward(*args, **kwargs)
        output.logits = torch.tanh(output.logits / 3) * 3
        return output


def test_logits_changed_after_the_projection_are_respected() -> None:
    plain, ids = tiny_llama(), some_ids(64)
    capped = _Capped(plain.config)
    capped.load_state_dict(plain.state_dict())
    result = perplexity(capped, ids, length=32)
    np.testing.assert_allclose(result.sequence_nll, plain_nll(capped.eval(), ids.view(2, 32)), rtol=1e-6)
    assert result.value != pytest.approx(perplexity(plain, ids, length=32).value, rel=1e-2)


def test_head_is_applied_in_chunks_where_it_stands_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring._CHUNK, "cpu", 8)
    model, seen = tiny_llama(), []
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))
    perplexity(model, some_ids(64), length=64)
    assert seen[2:] == [8] * 7 + [7], "after the probe, 63 predicted positions in eights"


def test_length_is_limited_by_the_model_and_by_max_tokens() -> None:
    model, ids = tiny_llama(), some_ids(300)
    assert perplexity(model, ids, length=2048).length == 64
    capped = perplexity(model, ids, length=32, max_tokens=100)
    assert (capped.length, capped.sequences) == (32, 3)
    assert perplexity(model, ids, length=64, max_tokens=20).length == 20
    rows = perplexity(model, ids.view(6, 50), length=2048, max_tokens=200)
    assert (rows.length, rows.sequences) == (50, 4)
    np.testing.assert_allclose(rows.sequence_nll, plain_nll(model.eval(), ids.view(6, 50)[:4]), rtol=1e-6)


def test_text_that_fills_no_sequence_is_refused() -> None:
    with pytest.raises(CalibrationError, match="40 tokens and fills no sequence of 64"):
        perplexity(tiny_llama(), some_ids(40), length=64)
    with pytest.raises(CalibrationError, match="embeddings for 0 to 96"):
        perplexity(tiny_llama(), some_ids(64) + WORDS, length=64)
    with pytest.raises(ConfigError, match="at least 2"):
        perplexity(tiny_llama(), some_ids(64), length=1)


def test_nan_names_the_broken_weight() -> None:
    model = tiny_llama()
    model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        perplexity(model, some_ids(64), length=32)


def test_overflow_names_the_dtype() -> None:
    model = tiny_llama()
    model.get_output_embeddings().weight.data.fill_(6e4)
    with pytest.raises(NumericsError, match="overflow in float16"):
        perplexity(model.half(), some_ids(64), length=32)


def test_training_flags_and_progress() -> None:
    model, reports = tiny_llama().train(), []
    model.get_submodule("model.layers.0").eval()
    before = [module.training for module in model.modules()]
    perplexity(model, some_ids(96), length=32, progress=lambda done, total: reports.append((done, total)))
    assert [module.training for module in model.modules()] == before
    assert reports == [(0, 3), (1, 3), (2, 3), (3, 3)]


# text


def test_local_text_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "wiki.raw"
    path.write_text(" \n = Title = \n")
    assert wikitext_text(EvaluationSpec(text=str(path))) == ("wiki.raw", " \n = Title = \n")
    path.write_text(" \n")
    for name, error, message in (
        (path, CalibrationError, "is empty"),
        (tmp_path / "none.txt", CalibrationError, "No such file"),
        (tmp_path / "rows.parquet", ConfigError, r"\.txt or \.raw"),
    ):
        with pytest.raises(error, match=message):
            wikitext_text(EvaluationSpec(text=str(name)))


def test_wikitext_rows_are_joined_with_blank_lines(monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    text._wikitext2.cache_clear()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: {"text": ["", " = A = \n", "b"]})
    assert wikitext_text(EvaluationSpec()) == ("WikiText-2", "\n\n = A = \n\n\nb")
    text._wikitext2.cache_clear()


def test_no_network_fails_fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An endpoint that refuses connections, and no offline variable set: no retries."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    hub.hub_answers.cache_clear()
    start = time.perf_counter()
    with pytest.raises(CalibrationError, match=r"WikiText-2 cannot be had.*--eval-text"):
        wikitext_text(EvaluationSpec())
    assert time.perf_counter() - start < hub.TIMEOUT + 5
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE
    hub.hub_answers.cache_clear()


# comparison


def evaluation(scores: dict[str, float], nlls: list[float], task: str = "piqa", metric: str = "acc") -> Evaluation:
    value = sum(scores.values()) / len(scores)
    return Evaluation(
        {"text": Perplexity(tuple(nlls), 8)}, {task: TaskResult({metric: MetricResult(value, 0.1, scores)}, "1.0", 0)}
    )


def test_paired_difference_and_its_standard_error() -> None:
    before, after = np.array([1, 1, 0, 1, 0, 1.0]), np.array([1, 0, 0, 1, 1, 0.0])
    dense = evaluation({str(i): v for i, v in enumerate(before)}, [2.0, 2.5, 2.25])
    pruned = evaluation({str(i): v for i, v in enumerate(after)}, [2.5, 2.75, 2.375])
    result = compare(dense, pruned)
    contrast, text = result.tasks["piqa"]["acc"], result.perplexity["text"]
    assert contrast.difference == pytest.approx((after - before).mean())
    assert contrast.difference_stderr == pytest.approx((after - before).std(ddof=1) / math.sqrt(6))
    assert (contrast.dense, contrast.dense_stderr, contrast.examples) == (pytest.approx(before.mean()), 0.1, 6)
    assert text.difference == pytest.approx(math.exp(np.mean([2.5, 2.75, 2.375])) - math.exp(2.25))
    assert text.dense_stderr == pytest.approx(math.exp(2.25) * np.std([2.0, 2.5, 2.25], ddof=1) / math.sqrt(3))


def test_perplexity_difference_error_is_that_of_the_jackknife() -> None:
    """Independent check of the first-order formula: leave out one sequence at a time."""
    rng = np.random.default_rng(0)
    before = rng.normal(3.0, 0.1, 40)
    after = before + rng.normal(0.3, 0.02, 40)
    none = {"0": 1.0}
    contrast = compare(evaluation(none, [*before]), evaluation(none, [*after])).perplexity["text"]

    def gap(keep: np.ndarray) -> float:
        return math.exp(after[keep].mean()) - math.exp(before[keep].mean())

    left_out = np.array([gap(np.arange(40) != i) for i in range(40)])
    jackknife = math.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum())
    assert contrast.difference_stderr == pytest.approx(jackknife, rel=0.02)
    assert jackknife < 0.5 * math.hypot(contrast.dense_stderr or 0, contrast.pruned_stderr or 0)


def test_average_takes_acc_norm_where_there_is_one() -> None:
    def both(shift: float) -> Evaluation:
        metrics = {name: MetricResult(v + shift, 0.03, {}) for name, v in (("acc", 0.1), ("acc_norm", 0.5))}
        other = {"acc": MetricResult(0.7 + shift, 0.04, {})}
        return Evaluation({}, {"a": TaskResult(metrics), "b": TaskResult(other), "c": TaskResult({"f1": other["acc"]})})

    average = compare(both(0.0), both(-0.1)).average
    assert average is not None
    assert (average.dense, average.difference) == (pytest.approx(0.6), pytest.approx(-0.1))
    assert average.dense_stderr == pytest.approx(0.025)
    assert average.difference_stderr is None, "no common examples: nothing is known about the difference"


def test_only_common_examples_are_paired() -> None:
    dense, pruned = evaluation({"0": 1, "1": 0}, [1.0, 2.0]), evaluation({"1": 1, "2": 1}, [1.0])
    result = compare(dense, pruned)
    contrast = result.tasks["piqa"]["acc"]
    assert (contrast.examples, contrast.difference, contrast.difference_stderr) == (1, 1.0, None)
    assert result.perplexity["text"].difference_stderr is None
    assert compare(dense, evaluation({"0": 1}, [1.0], task="arc")).tasks == {}


SCORES = st.dictionaries(st.integers(0, 99).map(str), st.floats(-1e3, 1e3), min_size=1, max_size=20)
LOSSES = st.lists(st.floats(0.0, 20.0), min_size=1, max_size=8)


@given(SCORES, LOSSES)
def test_identical_results_differ_by_nothing(scores: dict[str, float], losses: list[float]) -> None:
    same = evaluation(scores, losses)
    result = compare(same, same)
    for contrast in (result.perplexity["text"], result.tasks["piqa"]["acc"]):
        assert contrast.difference == 0
        assert contrast.difference_stderr in (0, None)


@given(SCORES, SCORES, LOSSES)
def test_json_round_trip(before: dict[str, float], after: dict[str, float], losses: list[float]) -> None:
    dense, pruned = evaluation(before, losses), evaluation(after, losses)
    assert Evaluation.from_json(json.loads(json.dumps(dense.to_json()))) == dense
    result = compare(dense, pruned)
    assert Comparison.from_json({"format": "report", **json.loads(json.dumps(result.to_json()))}) == result


def test_json_of_something_else_is_refused() -> None:
    with pytest.raises(ConfigError, match="not an evaluation"):
        Evaluation.from_json({"tasks": {}})
    with pytest.raises(ConfigError, match="not a comparison"):
        Comparison.from_json({"perplexity": [], "tasks": {}, "average": None})


def test_table_and_markdown_show_the_numbers() -> None:
    result = compare(evaluation({"0": 1, "1": 0}, [2.0, 2.0]), evaluation({"0": 0, "1": 0}, [2.0, 2.0]))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(result.table(title="side by side"))
    shown = console.export_text()
    assert "side by side" in shown
    assert re.search(r"perplexity, text +2 +7\.39 ±0\.00 +7\.39 ±0\.00 +\+0\.00 ±0\.00", shown)
    assert "0.500 ±0.100" in shown
    assert "-0.500 ±0.500" in shown
    assert "average" not in shown, "of one task"
    assert result.markdown().splitlines()[2] == (
        "| piqa acc | 2 | 0.5000 ± 0.1000 | 0.0000 ± 0.1000 | -0.5000 ± 0.5000 |"
    )
    assert "| perplexity, text | 2 | 7.389 ± 0.000 |" in result.markdown(perplexity=True)
    assert compare(Evaluation({}, {}), Evaluation({}, {})).markdown() == ""


# lm-eval


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Two multiple-choice tasks of nine documents, a group of both that averages, and a tag."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for number, name in enumerate(("left", "right")):
        ids = some_ids(9, 5, seed=number).tolist()
        rows = [
            {"q": f"w{a} w{b}", "choices": [f"w{c} w{d}", f"w{e}"], "gold": (a + number) % 2} for a, b, c, d, e in ids
        ]
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(
            f"task: tiny_{name}\ntag: tiny_tag\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
            "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_target: gold\n"
            "doc_to_choice: '{{choices}}'\nmetadata: {version: 3.0}\nmetric_list:\n"
            "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
            "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
        )
    (folder / "group.yaml").write_text(
        "group: tiny_group\ntask: [tiny_left, tiny_right]\n"
        "aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]\n"
    )
    return folder


@pytest.fixture
def local_tasks_only(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading lm-eval's own files takes seconds."""
    manager = harness._manager(str(tasks), defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda folder, defaults: manager)


def choices(model: Any, folder: Path, name: str) -> list[float]:
    """Accuracy of each document, from the log-likelihoods of the whole texts."""
    tokenizer, scores = tiny_tokenizer(), []
    for line in (folder.parent / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        context = tokenizer(row["q"])["input_ids"]
        totals = []
        for choice in row["choices"]:
            ids = torch.tensor(tokenizer(f"{row['q']} {choice}")["input_ids"])
            with torch.no_grad():
                logs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
            totals.append(logs[len(context) - 1 :].sum().item())
        scores.append(float(int(np.argmax(totals)) == row["gold"]))
    return scores


def test_run_tasks(
    tasks: Path, offline: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tasks)  # not a repository: lm-eval asks git, which complains
    model, tokenizer = tiny_llama().train(), tiny_tokenizer()
    tokenizer.pad_token = None
    torch.manual_seed(5)
    expected_draw = torch.rand(1)
    torch.manual_seed(5)
    results = run_tasks(model, tokenizer, ["tiny_right", "tiny_left"], include_path=tasks)
    assert torch.equal(torch.rand(1), expected_draw), "lm-eval's seeds are its own"
    assert model.training
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")
    assert set(results) == {"tiny_left", "tiny_right"}
    model.eval()
    for name in ("left", "right"):
        result = results[f"tiny_{name}"]
        assert (result.version, result.shots, set(result.metrics)) == ("3.0", 0, {"acc", "acc_norm"})
        scores = choices(model, tasks, name)
        assert result.metrics["acc"].examples == {str(i): score for i, score in enumerate(scores)}
        assert result.metrics["acc"].value == pytest.approx(np.mean(scores))
        assert result.metrics["acc"].stderr == pytest.approx(np.std(scores, ddof=1) / 3)
        assert 0 < np.mean(scores) < 1


@pytest.mark.usefixtures("local_tasks_only")
def test_limit_and_groups(tasks: Path, offline: None) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    limited = run_tasks(model, tokenizer, ["tiny_left"], include_path=tasks, limit=4)
    assert list(limited["tiny_left"].metrics["acc"].examples) == ["0", "1", "2", "3"]
    both = run_tasks(model, tokenizer, ["tiny_*"], include_path=tasks)
    assert list(both) == ["tiny_group"], "its members and the tag are in it already"
    group = both["tiny_group"].metrics["acc"]
    scores = [score for name in ("left", "right") for score in choices(model.eval(), tasks, name)]
    assert list(group.examples.values()) == scores
    assert group.value == pytest.approx(np.mean(scores))
    tagged = run_tasks(model, tokenizer, ["tiny_tag"], include_path=tasks, limit=2)
    assert set(tagged) == {"tiny_left", "tiny_right"}


@pytest.mark.usefixtures("local_tasks_only")
def test_unknown_task_is_refused_with_a_suggestion(tasks: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown task 'tiny_lefd' \(did you mean 'tiny_left'\?\)"):
        run_tasks(tiny_llama(), tiny_tokenizer(), ["tiny_right", "tiny_lefd"], include_path=tasks)
    with pytest.raises(ConfigError, match="is no folder"):
        run_tasks(tiny_llama(), tiny_tokenizer(), ["tiny_left"], include_path=tasks / "none")


def test_missing_documents_are_named(tasks: Path, offline: None) -> None:
    (tasks.parent / "left.jsonl").unlink()
    with pytest.raises(CalibrationError, match="documents of task 'tiny_left' cannot be had"):
        run_tasks(tiny_llama(), tiny_tokenizer(), ["tiny_left"], include_path=tasks)


def test_a_model_that_answers_nan_has_no_score(tasks: Path, offline: None) -> None:
    model = tiny_llama()
    model.get_output_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(NumericsError, match="'tiny_left', document 0: the model's log-likelihood is NaN"):
        run_tasks(model, tiny_tokenizer(), ["tiny_left"], include_path=tasks)


# everything together


def test_evaluate(tasks: Path, offline: None, tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    ids = some_ids(200)
    path.write_text(" ".join(f"w{number}" for number in ids.tolist()))
    spec = EvaluationSpec(
        tasks=("ppl", "tiny_left"), include_path=str(tasks), text=str(path), length=32, max_tokens=100, limit=5
    )
    model = tiny_llama()
    result = evaluate(model, tiny_tokenizer(), spec)
    assert result.perplexities == {"some.txt": perplexity(model, ids, length=32, max_tokens=100)}
    assert len(result.tasks["tiny_left"].metrics["acc"].examples) == 5
    assert Evaluation.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_evaluate_falls_back_to_held_out_text(offline: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    text._wikitext2.cache_clear()
    model, said, ids = tiny_llama(), [], some_ids(3, 16)
    result = evaluate(
        model, tiny_tokenizer(), EvaluationSpec(), fallback_ids=ids, fallback_name="held-out x", say=said.append
    )
    assert result.perplexities == {"held-out x": perplexity(model, ids)}
    assert len(said) == 1
    assert "held-out x" in said[0]
    with pytest.raises(CalibrationError, match="WikiText-2"):
        evaluate(model, tiny_tokenizer(), EvaluationSpec())
    with pytest.raises(CalibrationError, match=r"none\.txt"):
        evaluate(model, tiny_tokenizer(), EvaluationSpec(text="none.txt"), fallback_ids=ids)


def test_functions_stay_functions() -> None:
    """No file of the package bears a name that it exports: importing it would bind the module over the function."""
    folder = Path(str(multipruner.eval.__file__)).parent
    assert not {path.stem for path in folder.glob("*.py")} & set(multipruner.eval.__all__)
    assert all(getattr(multipruner.eval, name) is not None for name in multipruner.eval.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = multipruner.eval.nothing


def test_lm_evals_own_tasks_are_read_only_where_needed(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager, asked = harness._manager(str(tasks), defaults=False), []
    monkeypatch.setattr(harness, "_manager", lambda folder, defaults: asked.append(defaults) or manager)
    for names, expected in ((["tiny_left"], [False]), (["tiny_group"], [False, True]), (["tiny_tag"], [False, True])):
        asked.clear()
        harness.resolve_tasks(tuple(names), tasks)
        assert asked == expected, "groups and tags may have stock members"


@pytest.mark.slow
def test_real_model_on_real_tasks(offline: None, tmp_path: Path) -> None:
    if not (DATA / "make_tasks.py").exists():
        pytest.skip(f"no real data in {DATA}")
    from multipruner.config.recipe import Recipe
    from multipruner.engine.precision import Precision
    from multipruner.recipes import mapping_for
    from multipruner.sources.dense import load_dense
    from multipruner.sources.resolve import resolve

    subprocess.run([sys.executable, DATA / "make_tasks.py", DATA, tmp_path], check=True, capture_output=True)
    spec = EvaluationSpec(
        tasks=("ppl", "piqa_local", "arc_easy_local"),
        include_path=str(tmp_path),
        limit=20,
        text=str(DATA / "wikitext2" / "wiki.test.raw"),
        max_tokens=2 * 2048,
    )
    recipe = Recipe.build(mapping_for("llama"))
    model, tokenizer = load_dense(resolve(recipe, print), recipe)
    with Precision.of(model).computing(model):
        result = evaluate(model, tokenizer, spec)
    # both sequences as transformers' own loss has them: 2.71354 and 3.17143 nats
    assert result.perplexities["wiki.test.raw"].nll == pytest.approx((2.71354 + 3.17143) / 2, abs=2e-3)
    assert result.tasks["piqa_local"].metrics["acc"].value > 0.5
    assert set(result.tasks["arc_easy_local"].metrics) == {"acc", "acc_norm"}
    assert len(result.tasks["arc_easy_local"].metrics["acc_norm"].examples) == 20
    assert compare(result, result).average is not None
