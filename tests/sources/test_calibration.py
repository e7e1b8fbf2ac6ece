"""Calibration text: every local format, packing, held-out text, text sampled from the model, clear errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tokenizers import processors

from multipruner.config.choices import TEXTS
from multipruner.config.recipe import CalibrationSpec
from multipruner.core.errors import CalibrationError
from multipruner.engine.prunable import Prunable
from multipruner.sources import sampled_text as sampling
from multipruner.sources.calibration import CalibrationSet, load_calibration
from multipruner.sources.rows import rows_of, stretches
from multipruner.sources.sampled_text import sample, self_text
from multipruner.sources.text import hub as texts
from tests.support.tiny import VARIANTS, tiny_model, tiny_tokenizer

ROWS = [" ".join(f"w{4 + (7 * row + word) % 93}" for word in range(10)) for row in range(60)]
"""Sixty different rows of ten tokens."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path / "cache"))


def spec(source: Any, **more: Any) -> CalibrationSpec:
    return CalibrationSpec.model_validate({"source": str(source), "sequences": 4, "length": 16, **more})


def write(path: Path, rows: list[str] = ROWS) -> Path:
    """Rows in the format of the file's suffix."""
    records = [{"number": n, "text": row, "note": f"n{n}"} for n, row in enumerate(rows)]
    if path.suffix in (".txt", ".raw"):
        path.write_text("\n".join(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".raw", ".jsonl", ".json", ".parquet"])
def test_every_local_format(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}")
    tokenizer = tiny_tokenizer()
    found = load_calibration(spec(path), tokenizer)
    assert found.ids.shape == (4, 16) and found.ids.dtype == torch.int64
    assert found.name == path.name and found.ignore_id == tokenizer.eos_token_id == 2
    assert int(found.ids.min()) > 3, "no special token is added"
    words = set(" ".join(ROWS).split())
    assert set(tokenizer.convert_ids_to_tokens(found.ids.flatten().tolist())) <= words
    again = load_calibration(spec(path), tokenizer)
    assert again.hash == found.hash and len(found.hash) == 64
    assert load_calibration(spec(path, seed=1), tokenizer).hash != found.hash


def test_json_of_strings_and_of_columns(tmp_path: Path) -> None:
    for name, data in {"strings": ROWS, "columns": {"text": ROWS, "n": list(range(len(ROWS)))}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
        assert list(rows_of(str(tmp_path / f"{name}.json"), None, 1, 16)) == ROWS


def test_lines_of_json_end_where_lines_of_json_end(tmp_path: Path) -> None:
    rows = [f"{row}{mark}{row}" for row, mark in zip(ROWS, "\u2028\u2029\x85\x0b" * len(ROWS), strict=False)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\r\n".join(json.dumps({"text": row}, ensure_ascii=False) for row in rows), newline="")
    assert list(rows_of(str(path), None, 1, 16)) == rows


def test_text_column(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps({"title": row, "body": f"{row} .", "n": 1}) + "\n" for row in ROWS))
    assert list(rows_of(str(path), "title", 1, 16)) == ROWS
    for wanted in (None, "n", "txt"):
        with pytest.raises(CalibrationError, match=r"columns with text: title, body; choose with --text-column"):
            rows_of(str(path), wanted, 1, 16)
    path.write_text("".join(json.dumps({"body": row, "n": 1}) + "\n" for row in ROWS))
    assert list(rows_of(str(path), None, 1, 16)) == ROWS, "the only text column needs no name"


def test_concatenation_is_the_protocol(tmp_path: Path) -> None:
    """Shuffled rows joined by blank lines, tokenised together, cut; recomputed here from the shuffle alone."""
    import random

    path = write(tmp_path / "rows.jsonl")
    tokenizer = tiny_tokenizer()
    shuffled = ROWS.copy()
    random.Random(0).shuffle(shuffled)
    expected = tokenizer("\n\n".join(shuffled), add_special_tokens=False)["input_ids"][:64]
    assert load_calibration(spec(path), tokenizer).ids.flatten().tolist() == expected


@pytest.mark.parametrize("packing", ["concat", "rows"])
def test_held_out_text_shares_no_row(packing: str, tmp_path: Path) -> None:
    rows = [" ".join([f"w{4 + row}"] * 10) for row in range(60)]
    path = write(tmp_path / "rows.jsonl", rows + rows[:20])
    settings = spec(path, packing=packing, length=8)
    tokenizer = tiny_tokenizer()
    used = load_calibration(settings, tokenizer)
    held_out = load_calibration(settings, tokenizer, split="heldout")
    assert held_out.ids.shape == used.ids.shape
    assert not set(used.ids.flatten().tolist()) & set(held_out.ids.flatten().tolist())


def test_held_out_text_may_be_shorter_but_not_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS[:10])
    assert len(load_calibration(spec(path), tiny_tokenizer(), split="heldout").ids) == 1
    short = write(tmp_path / "short.jsonl", ROWS[:7])
    assert len(load_calibration(spec(short), tiny_tokenizer()).ids) == 4
    with pytest.raises(CalibrationError, match="holds 0 tokens after the calibration part, 16 are needed"):
        load_calibration(spec(short), tiny_tokenizer(), split="heldout")


def test_rows_that_are_too_short_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [row if n % 2 else row[:8] for n, row in enumerate(ROWS)])
    ids = load_calibration(spec(path, packing="rows", length=9), tiny_tokenizer()).ids
    starts = {tuple(tiny_tokenizer()(row)["input_ids"][:9]) for row in ROWS[1::2]}
    assert {tuple(row) for row in ids.tolist()} <= starts
    with pytest.raises(
        CalibrationError, match=r"has 30 rows of 9 tokens or more left, 40 are needed.*--packing concat"
    ):
        load_calibration(spec(path, packing="rows", length=9, sequences=40), tiny_tokenizer())


@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.json", "blank.txt"])
def test_empty_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text({"empty.json": "[]", "blank.txt": " \n\n"}.get(name, ""))
    with pytest.raises(CalibrationError, match="is empty"):
        load_calibration(spec(tmp_path / name), tiny_tokenizer())


def test_too_little_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS[:5])
    with pytest.raises(CalibrationError, match=r"holds 50 tokens, 64 are needed") as caught:
        load_calibration(spec(path), tiny_tokenizer())
    assert "--sequences or --length" in str(caught.value)


BROKEN = {
    "text.json": b"{not json",
    "text.jsonl": b'{"text": "a"}\n{',
    "numbers.json": b"[1, 2]",
    "latin.txt": b"caf\xe9",
    "table.parquet": b"no parquet",
    "ids.safetensors": b"no safetensors",
    "text.docx": b"PK",
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(BROKEN[name])
    with pytest.raises(CalibrationError, match=name):
        load_calibration(spec(tmp_path / name), tiny_tokenizer())


def test_missing_files_name_the_choices() -> None:
    with pytest.raises(CalibrationError, match=r"nowhere\.txt.*alpaca, wikitext2, c4, self"):
        load_calibration(spec("nowhere.txt"), tiny_tokenizer())


def test_running_text_is_cut_at_line_ends() -> None:
    text = "".join(f"line {n} " + "word " * (n % 7) + "\n" for n in range(200)) + "x" * 500
    pieces = stretches(text, 120)
    assert "".join(pieces) == text
    assert all(len(piece) <= 121 for piece in pieces)
    assert all(piece.endswith("\n") for piece in pieces[:-6])


def test_ready_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    ids = torch.randint(0, 97, (3, 8), dtype=torch.int32)
    save_file({"input_ids": ids, "heldout_ids": ids[:2].clone(), "more": ids.clone()}, path)
    found = load_calibration(spec(path), tiny_tokenizer())
    assert found.ids.dtype == torch.int64 and torch.equal(found.ids, ids.long())
    assert len(load_calibration(spec(path), tiny_tokenizer(), split="heldout").ids) == 2
    save_file({"anything": ids}, path)
    assert torch.equal(load_calibration(spec(path), tiny_tokenizer()).ids, ids.long())
    said: list[str] = []
    held_out = load_calibration(spec(path), tiny_tokenizer(), tiny_model("llama"), split="heldout", say=said.append)
    assert held_out.name == "self" and "no heldout_ids" in said[0]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"input_ids": torch.full((2, 8), 97)}, "token id 97 is outside 0..96"),
        ({"input_ids": torch.full((2, 8), -1)}, "token id -1 is outside"),
        ({"input_ids": torch.ones(2, 8)}, "must be integers"),
        ({"input_ids": torch.ones(8, dtype=torch.int64)}, r"\[sequences, length"),
        ({"a": torch.ones(2, 8), "b": torch.ones(2, 8)}, "holds a, b"),
    ],
)
def test_bad_token_ids(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "ids.safetensors")
    with pytest.raises(CalibrationError, match=message):
        load_calibration(spec(tmp_path / "ids.safetensors"), tiny_tokenizer(), tiny_model("llama"))


def test_hash_and_head() -> None:
    ids = torch.arange(24).reshape(4, 6)
    whole = CalibrationSet(ids, "x", 2)
    assert whole.hash == CalibrationSet(ids.clone(), "y").hash
    assert whole.hash != CalibrationSet(ids.reshape(6, 4), "x").hash
    assert whole.head(2).ids.tolist() == ids[:2].tolist() and whole.head(2).ignore_id == 2
    assert whole.head(2).hash != whole.hash and len(whole.head(9).ids) == 4


@pytest.mark.parametrize("family", ["llama", "qwen2", "baichuan"])
def test_self_text_is_its_seeds_and_the_models(family: str) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    ids = sample(model, tokenizer, 6, 12, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state is as it was"
    assert torch.get_num_threads() == threads
    assert ids.shape == (6, 12) and ids.dtype == torch.int64 and int(ids.max()) < 97
    assert torch.equal(ids, sample(model, tokenizer, 6, 12, seed=3))
    assert not torch.equal(ids, sample(model, tokenizer, 6, 12, seed=4))
    assert not set(ids[:, 0].tolist()) & set(tokenizer.all_special_ids)


def test_self_text_starts_as_the_tokenizer_starts_text() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    plain = sample(model, tokenizer, 6, 12, seed=3)
    template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    ids = sample(model, tokenizer, 6, 12, seed=3)
    assert ids[:, 0].tolist() == [1] * 6 and ids[:, 1].tolist() == plain[:, 0].tolist()
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits.double().softmax(-1)
    upper = probabilities.cumsum(-1)[:, 1:-1].gather(-1, ids[:, 2:, None])[..., 0]
    lower = upper - probabilities[:, 1:-1].gather(-1, ids[:, 2:, None])[..., 0]
    generator = torch.Generator().manual_seed(3)
    torch.randint(93, (6,), generator=generator)
    draws = torch.rand(6, 12, generator=generator)[:, 2:]
    assert bool(((draws > lower - 1e-5) & (draws < upper + 1e-5)).all())
    assert sample(model, tokenizer, 3, 1, seed=3).tolist() == [[1]] * 3


@pytest.mark.parametrize("family", ["llama", "mistral-sliding"])
def test_self_text_follows_the_models_distribution(family: str) -> None:
    """The cached sampler draws each token from the probabilities that an uncached forward gives; Mistral's sliding
    window is shorter than the text."""
    model = tiny_model(**VARIANTS[family])
    ids = sample(model, tiny_tokenizer(), 6, 12, seed=3)
    generator = torch.Generator().manual_seed(3)
    torch.randint(93, (6,), generator=generator)
    draws = torch.rand(6, 12, generator=generator)
    with torch.no_grad():
        probabilities = model(input_ids=ids).logits.double().softmax(-1)
    upper = probabilities.cumsum(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    lower = upper - probabilities[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert bool(((draws[:, 1:] > lower - 1e-5) & (draws[:, 1:] < upper + 1e-5)).all())


def test_self_text_is_cached_by_model_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    settings = spec("self", moments_sequences=2)
    first = load_calibration(settings, tiny_tokenizer(), tiny_model("llama"), progress=lambda *now: calls.append(now))
    assert first.name == "self" and calls[-1] == (160, 160), "all parts of the text are sampled together"
    monkeypatch.setattr(sampling, "sample", lambda *_: pytest.fail("sampled again"))
    again = load_calibration(settings, tiny_tokenizer(), tiny_model("llama"))
    held_out = load_calibration(settings, tiny_tokenizer(), tiny_model("llama"), split="heldout")
    assert again.hash == first.hash != held_out.hash and held_out.ids.shape == (4, 16)
    moments = load_calibration(settings, tiny_tokenizer(), tiny_model("llama"), split="moments").ids
    parts = torch.cat([first.ids, held_out.ids, moments])
    assert torch.equal(parts, self_text(tiny_model("llama"), tiny_tokenizer(), 10, 16, 0)), "no row twice"
    monkeypatch.undo()
    assert not torch.equal(self_text(tiny_model("llama", seed=1), tiny_tokenizer(), 10, 16, 0)[:4], first.ids)
    with pytest.raises(CalibrationError, match="needs the model"):
        load_calibration(settings, tiny_tokenizer())


def test_several_batches_give_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama", dtype=torch.float64), tiny_tokenizer()
    whole = sample(model, tokenizer, 5, 12, seed=0)
    monkeypatch.setattr(sampling, "BATCH_TOKENS", 24)
    assert torch.equal(sample(model, tokenizer, 5, 12, seed=0), whole)


@pytest.mark.parametrize(("least", "most", "tokens"), [(0, 30, 30), (0, 10**6, 40), (60, 30, 60), (0, 1, 1)])
def test_keys_and_values_bound_how_many_are_sampled_together(
    least: int, most: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    dense = Prunable.of(model)
    per_token = dense.costs.kv_bytes_per_token(dense.dense)
    monkeypatch.setattr(sampling, "BATCH_TOKENS", 40)
    monkeypatch.setattr(sampling, "BATCH_BYTES", least * per_token)
    monkeypatch.setattr(sampling, "MOST_BATCH_BYTES", most * per_token)
    told: list[int] = []
    sample(model, tiny_tokenizer(), 9, 12, seed=0, progress=lambda done, _: told.append(done))
    assert told[0] // 2 == max(1, tokens // 12), "sequences that have their second token first"


def test_alpaca_without_the_hub_is_self_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said: list[str] = []
    found = load_calibration(spec("alpaca"), tiny_tokenizer(), tiny_model("llama"), say=said.append)
    assert found.name == "self" and "in place of alpaca" in said[0]
    for source in ("wikitext2", "c4"):
        with pytest.raises(CalibrationError, match=f"cannot reach the Hub for {source}.*--calibration self"):
            load_calibration(spec(source), tiny_tokenizer(), tiny_model("llama"))


@pytest.mark.parametrize("source", ["alpaca", "wikitext2", "c4"])
def test_hub_texts(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(**arguments: Any) -> Any:
        asked.update(arguments)
        rows = datasets.Dataset.from_dict({"text": ROWS})
        return rows.to_iterable_dataset() if arguments.get("streaming") else rows

    monkeypatch.setattr(texts, "repo_info", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_calibration(spec(source), tiny_tokenizer()).ids.shape == (4, 16)
    assert asked["split"] == "train" and asked["path"] == TEXTS[source].options["path"]


def test_a_dead_network_is_noticed_within_seconds(tmp_path: Path) -> None:
    code = (
        "from tests.support.tiny import *; from multipruner.sources.calibration import load_calibration;"
        "from multipruner.config.recipe import CalibrationSpec; spec = CalibrationSpec(sequences=2, length=8);"
        "import time, datasets; began = time.perf_counter();"
        "print(load_calibration(spec, tiny_tokenizer(), tiny_model('llama')).name, time.perf_counter() - began)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    name, seconds = run.stdout.split()
    assert name == "self" and float(seconds) < 8


@pytest.mark.slow
def test_self_text_of_the_real_model_takes_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MULTIPRUNER_CACHE")
    from multipruner import recipes
    from multipruner.config.recipe import Recipe
    from multipruner.engine.precision import Precision
    from multipruner.sources.dense import load_dense
    from multipruner.sources.resolve import resolve

    recipe = Recipe.build(recipes.read("llama"))
    model, tokenizer = load_dense(resolve(recipe, print), recipe)
    Precision.of(model).held(model)
    began = time.perf_counter()
    ids = sample(model, tokenizer, 16, 128, seed=0)
    print(f"{ids.numel()} tokens in {time.perf_counter() - began:.1f} s")
    with torch.no_grad():
        logits = model(input_ids=ids[:, :-1]).logits.float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert 1 < float(loss) < 5, "the model finds its own text likely"
