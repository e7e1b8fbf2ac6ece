"""``multipruner vocabulary``: the same model on fewer tokens, in a folder that stock transformers open."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from multipruner.commands.main import main
from multipruner.core.families import FAMILIES
from tests.support.commands import arguments
from tests.support.elsewhere import logits_elsewhere
from tests.support.tiny import MORE, VARIANTS, tiny_model, tiny_tokenizer
from tests.support.trained_tokenizers import TOKENS, corpus, trained

ROWS = TOKENS + 4
"""More rows than tokens, as many checkpoints have them."""
MODELS = ["llama", "llama-tied", "gemma2", "phi", "gpt2", "mamba", "mixtral"]
MEASURED = re.compile(r"^(.+): ([\d.]+) -> ([\d.]+) bits per byte", re.MULTILINE)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in corpus()[:300]))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("dense")

    def make(variant: str, kind: str = "byte-level", rows: int = ROWS, **sizes: int) -> Path:
        path = folder / "-".join(map(str, (variant, kind, rows, *sizes.values())))
        if not path.exists():
            settings: dict[str, Any] = {**VARIANTS, **MORE}[variant] | sizes
            model = tiny_model(**settings, vocab_size=rows)
            model.generation_config.eos_token_id = [2, 5]
            model.save_pretrained(path)
            trained(kind).save_pretrained(path)
        return path

    return make


def vocabulary(dense: Path, text: Path, output: Path, *more: str) -> int:
    given = ["vocabulary", "--model", str(dense), "--text", str(text), "--output", str(output)]
    return main([*given, *more])


@pytest.mark.parametrize("variant", MODELS)
def test_what_stays_computes_what_it_did(variant: str, made: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    """Logits of the tokens that stay are the dense model's, in a stock class; nothing else has changed."""
    dense, output = made(variant), tmp_path / "smaller"
    assert vocabulary(dense, text, output, "--tokens", "500", "--no-measure") == 0
    record = json.loads((output / "vocabulary.json").read_text())
    kept = torch.tensor(record["kept"])
    assert len(kept) == record["tokens"]["after"] == 512 and record["tokens"]["before"] == ROWS
    ids = torch.randint(len(kept), (2, 12), generator=torch.Generator().manual_seed(1))
    before, after = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (dense, output))
    assert type(after).__name__ == FAMILIES[before.config.model_type].class_name
    with torch.no_grad():
        wanted = before(kept[ids]).logits[..., kept]
        torch.testing.assert_close(after(ids).logits, wanted, rtol=1e-5, atol=1e-5)
    parameters = [sum(each.numel() for each in model.parameters()) for model in (before, after)]
    assert list(record["parameters"].values()) == parameters and record["ratio"] == 1 - parameters[1] / parameters[0]
    others = {name: each for name, each in before.state_dict().items() if ROWS not in each.shape}
    assert others.keys() < after.state_dict().keys()
    assert all(torch.equal(after.state_dict()[name], each) for name, each in others.items())
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (dense, output))
    assert new == {**old, "vocab_size": 512, **{key: new[key] for key in old if key.endswith("_token_id")}}


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "unigram"])
def test_its_tokenizer_tells_texts_and_knows_its_special_tokens(
    kind: str, made: Callable[..., Path], text: Path, tmp_path: Path
) -> None:
    dense, output = made("llama-tied", kind, TOKENS + 256), tmp_path / "smaller"
    assert vocabulary(dense, text, output, "--tokens", "640", "--no-measure") == 0
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (dense, output))
    record = json.loads((output / "vocabulary.json").read_text())
    numbers = {old: new for new, old in enumerate(record["kept"])}
    for line in ["naïve über 雨 книга", *corpus()[300::9]]:
        if kind != "unigram" or line.isascii():
            assert after.decode(after(line)["input_ids"], skip_special_tokens=True) == line
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(after, name) == getattr(before, name)
        assert getattr(after, f"{name}_id") == numbers[getattr(before, f"{name}_id")]
    talk = [{"role": "user", "content": corpus()[0]}]
    how: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
    told = [tokenizer.apply_chat_template(talk, **how) for tokenizer in (before, after)]
    assert told[1][:4] == [numbers[one] for one in told[0][:4]], "what the template says stays in its own tokens"
    generation = json.loads((output / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [numbers[2], numbers[5]]
    model: Any = AutoModelForCausalLM.from_pretrained(output).eval()
    assert model.generation_config.eos_token_id == [numbers[2], numbers[5]]
    assert after.decode(model.generate(torch.tensor([[numbers[1]]]), max_new_tokens=4, do_sample=False)[0])


def test_losses_are_compared_by_the_byte_and_what_does_not_pay_is_said(
    made: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of random weights needs about the bits of a token, wherever it ends: fewer tokens of the same text are
    dearer by the byte."""
    other = tmp_path / "other.txt"
    other.write_text("\n".join(corpus()[300:340]))
    dense, output = made("llama", layers=12), tmp_path / "smaller"  # embeddings are a small part of it
    assert vocabulary(dense, text, output, "--tokens", "320", "--eval-text", str(other)) == 0
    said = capsys.readouterr().out
    found = {name: (float(before), float(after)) for name, before, after in MEASURED.findall(said)}
    assert list(found) == ["held-out text", "other.txt"]
    assert all(1.2 * before < after for before, after in found.values())
    assert "this may not pay" in said
    record = json.loads((output / "vocabulary.json").read_text())
    assert record["bits_per_byte"]["other.txt"]["after"] == pytest.approx(found["other.txt"][1], abs=1e-4)
    card = (output / "README.md").read_text()
    assert "512" not in card and "320 of its" in card and str(tmp_path) not in card + json.dumps(record)


def test_it_is_pruned_like_any_model_and_opens_elsewhere(
    made: Callable[..., Path], dense: Path, text: Path, tmp_path: Path
) -> None:
    smaller = tmp_path / "smaller"
    assert vocabulary(made("llama"), text, smaller, "--tokens", "512", "--no-measure") == 0
    shutil.copy(dense / "text.txt", smaller / "text.txt")
    assert main(arguments(smaller, tmp_path / "pruned")) == 0
    torch.save(torch.arange(24).reshape(2, 12), tmp_path / "ids.pt")
    found = logits_elsewhere([str(smaller), str(tmp_path / "pruned")], tmp_path / "ids.pt")
    assert all(each.shape == (2, 12, 512) and each.isfinite().all() for each in found.values())


def test_a_dry_run_shows_sizes_and_writes_nothing(
    made: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vocabulary(made("llama"), text, tmp_path / "none", "--tokens", "400", "--dry-run") == 0
    said = capsys.readouterr().out
    rows = re.findall(r"^ +(\d+) +[\d.]+ M +([\d.]+)% +([\d.]+) +([+-][\d.]+)% +([\d.]+)%$", said, re.MULTILINE)
    assert [int(row[0]) for row in rows][-1] == 448 and len(rows) >= 2
    columns = list(zip(*((float(cell) for cell in row[1:]) for row in rows), strict=True))
    assert list(columns[0]) == sorted(columns[0]) and list(columns[1]) == sorted(columns[1], reverse=True)
    assert list(columns[2]) == sorted(columns[2]) and list(columns[3]) == sorted(columns[3], reverse=True)
    assert not (tmp_path / "none").exists()


def test_reserved_tokens_go_where_that_is_asked(made: Callable[..., Path], text: Path, tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(made("llama"), dense)
    tokenizer = AutoTokenizer.from_pretrained(dense)
    tokenizer.add_tokens(["<|reserved_1|>", "<|tool|>"], special_tokens=True)
    tokenizer.save_pretrained(dense)
    for more, wanted in (((), True), (("--drop-reserved",), False)):
        output = tmp_path / f"smaller{len(more)}"
        assert vocabulary(dense, text, output, "--tokens", "500", "--no-measure", *more) == 0
        known = AutoTokenizer.from_pretrained(output).get_vocab()
        assert ("<|reserved_1|>" in known) == wanted and "<|tool|>" in known
        assert max(known.values()) < 512


def test_an_earlier_result_is_replaced_only_where_that_is_asked(
    made: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "smaller"
    assert vocabulary(made("llama"), text, output, "--tokens", "500", "--no-measure") == 0
    (output / "mine.txt").write_text("mine")
    assert vocabulary(made("llama"), text, output, "--tokens", "400", "--no-measure") == 2
    assert "exists already" in capsys.readouterr().err
    assert vocabulary(made("llama"), text, output, "--tokens", "400", "--no-measure", "--overwrite") == 0
    assert json.loads((output / "vocabulary.json").read_text())["tokens"]["after"] == 448
    assert (output / "mine.txt").read_text() == "mine" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tokens", "100"), "100 tokens are too few: "),
        (("--tokens", "0"), "at least 1"),
        (("--tokens", "100000"), "all 900 tokens would stay; give --tokens N"),
        (("--multiple", "-1"), "at least 1"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--eval-text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_what_cannot_be_meant_is_one_line(
    more: tuple[str, ...], said: str, made: Callable[..., Path], text: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tokens = () if "--tokens" in more else ("--tokens", "500")
    assert vocabulary(made("llama", rows=TOKENS), text, tmp_path / "smaller", *tokens, *more) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") <= 3
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_words_is_refused(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert vocabulary(tmp_path / "dense", text, tmp_path / "smaller") == 2
    assert "of the kind WordLevel" in capsys.readouterr().err


def test_files_that_no_other_tokenizer_can_be_made_of_are_named(
    made: Callable[..., Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, output = tmp_path / "dense", tmp_path / "smaller"
    shutil.copytree(made("llama"), dense)
    (dense / "tokenizer.model").write_bytes(b"pieces")
    record = json.loads((dense / "tokenizer.json").read_text())
    (dense / "vocab.json").write_text(json.dumps(record["model"]["vocab"]))
    (dense / "merges.txt").write_text("#version: 0.2\n")
    assert vocabulary(dense, text, output, "--tokens", "500", "--no-measure") == 0
    assert "tokenizer.model of the dense model is left out" in capsys.readouterr().out
    found = json.loads((output / "tokenizer.json").read_text())["model"]
    assert json.loads((output / "vocab.json").read_text()) == found["vocab"]
    assert len((output / "merges.txt").read_text().splitlines()) == 1 + len(found["merges"])
    assert not (output / "tokenizer.model").exists()
