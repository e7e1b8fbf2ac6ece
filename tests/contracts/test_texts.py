"""What holds for every text: it is text that is really there, it is read once, and the same ids come of it as ever."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from multipruner.commands.main import main
from multipruner.config.recipe import CalibrationSpec, EvaluationSpec
from multipruner.core.errors import CalibrationError
from multipruner.eval import evaluate
from multipruner.sources import calibration
from multipruner.sources.calibration import CalibrationText, load_calibration
from multipruner.sources.rows import Rows, rows_of
from multipruner.sources.text import hub
from tests.support.commands import arguments, paper_arguments
from tests.support.tiny import tiny_model, tiny_tokenizer

LINES = [" ".join(f"w{4 + (7 * row + word * word) % 93}" for word in range(5 + row % 9)) for row in range(400)]
LINES += LINES[3:40]
SPLITS = ("calibration", "heldout", "moments")


def spec(source: Any, **more: Any) -> CalibrationSpec:
    values = {"source": str(source), "sequences": 5, "moments_sequences": 30, "length": 16, **more}
    return CalibrationSpec.model_validate(values)


def hash_of(ids: torch.Tensor) -> str:
    return hashlib.sha256(repr(tuple(ids.shape)).encode() + ids.contiguous().numpy().tobytes()).hexdigest()


def protocol(rows: list[str], settings: CalibrationSpec, running: bool) -> dict[str, torch.Tensor]:
    """The three parts by the protocol, written down from scratch: one shuffle, one row after another."""
    tokenizer, length = tiny_tokenizer(), settings.length

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    if running:
        size = 8 * length
        pattern = rf"[\s\S]{{1,{size}}}(?:\n|\Z)|[\s\S]{{1,{size}}}(?=\s)|[\s\S]{{1,{size}}}"
        rows = re.findall(pattern, "\n".join(rows))
    shuffled = list(dict.fromkeys(row for row in rows if row.strip()))
    random.Random(settings.seed).shuffle(shuffled)
    parts = {}
    counts = (settings.sequences, settings.sequences, settings.moments_sequences)
    for split, count in zip(SPLITS, counts, strict=True):
        found: list[list[int]] = []
        taken: list[str] = []
        while shuffled and len(found) < count:
            taken.append(shuffled.pop(0))
            if settings.packing == "rows":
                found += [ids[:length]] if len(ids := encode(taken[-1])) >= length else []
            else:
                ids = encode("\n\n".join(taken))
                if len(ids) >= count * length or not shuffled:
                    found = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)][:count]
        parts[split] = torch.tensor(found)
    return parts


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("more", [{}, {"seed": 3}, {"packing": "rows", "length": 8}, {"moments_sequences": 999}])
def test_the_ids_are_those_of_the_protocol(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    import pyarrow.parquet

    path, table = tmp_path / name, [{"id": n, "text": line, "note": None} for n, line in enumerate(LINES)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    else:
        jsonl = "\n".join(map(json.dumps, table))
        path.write_text({".txt": "\n".join(LINES), ".jsonl": jsonl, ".json": json.dumps(table)}[path.suffix])
    texts, expected = (
        CalibrationText(spec(path, **more), tiny_tokenizer()),
        protocol(LINES, spec(path, **more), name == "a.txt"),
    )
    for split in SPLITS:
        assert (
            texts.part(split).hash
            == hash_of(expected[split])
            == load_calibration(spec(path, **more), tiny_tokenizer(), split=split).hash
        )


def test_a_stream_gives_the_same_text_with_and_without_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read more of it for moments comes after the rest, and shares no row with it."""
    import datasets

    many = [f"w{4 + n % 93} w{4 + n // 93} w{4 + n * n % 89}" for n in range(8000)]
    stream = datasets.Dataset.from_dict({"text": many}).to_iterable_dataset()
    monkeypatch.setattr(hub, "repo_info", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: stream)
    asked = spec("c4", moments_sequences=8000)
    texts = CalibrationText(asked, tiny_tokenizer())
    expected = protocol(many[: 1000 + 2 * 5 * 16 // 50], spec("c4"), running=False)
    for split in ("calibration", "heldout"):
        assert texts.part(split).hash == hash_of(expected[split])
    packing = next(iter(texts._packed.values()))
    assert packing is not None and packing.rows.first == len(set(many[:1003])) < len(packing.rows)
    assert texts.part("moments").ids.numel() > 1000


def test_a_source_is_read_once(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(source: str, *more: Any) -> Rows:
        read.append(source)
        return rows_of(source, *more)

    monkeypatch.setattr(calibration, "rows_of", counted)
    output = tmp_path / "once"
    command = arguments(dense, output, "--rounds", "0")
    at = command.index("--eval-text")
    assert main(command[:at] + command[at + 2 :]) == 0
    assert read == [str(dense / "text.txt")]
    about = json.loads((output / "report.json").read_text())["calibration"]
    assert about["tokens"] == 64 and about["moments_tokens"] == 12 * 16 and about["held_out_tokens"] == 64
    (source,) = about["sources"]
    assert source["columns"] == [] and source["rows"] > source["rows_used"] > 0 and 0 <= source["truncated"] < 1


def test_what_was_taken_is_said_in_one_line(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = tmp_path / "sharegpt.json"
    talks = [
        {"id": f"{n}", "conversations": [{"from": "human", "value": line}, {"from": "gpt", "value": line}]}
        for n, line in enumerate(LINES)
    ]
    chat.write_text(json.dumps(talks))
    output = tmp_path / "said"
    assert main(arguments(dense, output, "--rounds", "0", "--calibration", str(chat), "--chat-template", "plain")) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("calibration: ")]
    repeated = len(LINES) - len(set(LINES))
    assert line.startswith(
        'calibration: sharegpt.json: column conversations, rendered with paragraphs "role: text", '
        f"437 rows, {repeated} duplicates, "
    )
    assert line.endswith("tokens: 64 for scores, 192 for moments (order and repair)")
    assert "64 tokens for scores, 192 for order and repair" in " ".join(re.sub("[│\n]", " ", printed).split())
    source = json.loads((output / "report.json").read_text())["calibration"]["sources"][0]
    assert (source["columns"], source["duplicates"], source["refused"]) == (["conversations"], repeated, 0)


def test_lengths_are_cut_to_the_context(dense: Path, tmp_path: Path) -> None:
    model, said = tiny_model("llama"), []
    context = model.config.max_position_embeddings
    (tmp_path / "a.txt").write_text(" ".join(f"w{4 + n * n % 93}" for n in range(8 * context)))
    for length in (context + 1, 10**15):
        texts = CalibrationText(
            spec(tmp_path / "a.txt", sequences=2, length=length), tiny_tokenizer(), model, say=said.append
        )
        assert texts.part("calibration").ids.shape == (2, context)
        assert said.pop() == f"calibration.length = {length}: cut to {context} tokens, the context of the model"
    evaluation = EvaluationSpec(text=str(tmp_path / "a.txt"), length=10**15)
    result = evaluate(model, tiny_tokenizer(), evaluation, say=said.append)
    assert result.perplexities["a.txt"].length == context
    assert said == [f"evaluation.length = {10**15}: cut to {context} tokens, the context of the model"]


BIG = str(2**64)
BAD = {
    "many sequences": (["--sequences", BIG], "calibration.sequences = 18446744073709551616"),
    "many moments": (["--moments-sequences", BIG], "calibration.moments_sequences"),
    "a long text": (["--length", BIG], "calibration.length"),
    "a large seed": (["--seed", BIG], "calibration.seed"),
    "a negative seed": (["--seed", "-1"], "calibration.seed = -1"),
    "large batches": (["--batch-size", BIG], "calibration.batch_size"),
    "many documents": (["--limit", BIG], "evaluation.limit"),
    "more than a model writes": (["--calibration", "self", "--sequences", str(2**40)], "lower --sequences"),
    "no tasks": (["--eval", ""], "no task is named"),
    "only commas": (["--eval", " ,"], "no task is named"),
    "no text": (["--calibration", "{folder}/empty.csv"], "is empty"),
    "an empty table": (["--calibration", "{folder}/none.jsonl"], "is empty"),
    "an empty evaluation text": (["--eval-text", "{folder}/empty.txt"], "is empty"),
    "an unknown template": (["--chat-template", "vicuna"], "no chat template 'vicuna'"),
    "ids": (["--calibration", "{folder}/ids.jsonl"], "columns with text: none"),
    "binary data": (["--calibration", "{folder}/binary.txt"], "NUL characters"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_one_line(
    case: str, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("empty.csv", "none.jsonl", "empty.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "binary.txt").write_bytes(b"ab\0cd" * 100)
    ids = ({"id": f"{random.Random(n).getrandbits(128):032x}", "text": f"{n}"} for n in range(200))
    (tmp_path / "ids.jsonl").write_text("\n".join(map(json.dumps, ids)))
    flags, expected = BAD[case]
    output = tmp_path / "out"
    code = main(paper_arguments(dense, output, *(flag.format(folder=tmp_path) for flag in flags)))
    printed = capsys.readouterr().err
    assert code == 2 and expected in printed and printed.count("\n") == 1, printed
    assert not output.exists() and not output.with_name("out.partial").exists()


def test_no_tasks_for_the_evaluation_command(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(dense), "--against", str(dense), "--tasks", ""]) == 2
    assert "no task is named" in capsys.readouterr().err


# any table that there may be

WORDS = st.sampled_from(["river", "the", "Zürich", "雨", "книга", "w12", "3.14", "a-b"])
PROSE = st.lists(WORDS, min_size=1, max_size=8).map(" ".join)
CODES = st.integers(0, 2**128).map(lambda number: f"{number:032x}")
STRINGS = st.one_of(PROSE, CODES, st.text(max_size=8), st.just("https://example.org/a?b=c"))
MESSAGES = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": PROSE}),
        st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]), "value": PROSE}),
    ),
    max_size=3,
)
OTHER = st.one_of(
    st.none(), st.integers(), st.floats(), st.booleans(), st.lists(STRINGS, max_size=2),
    st.dictionaries(st.text(max_size=3), STRINGS, max_size=2),
)  # fmt: skip
VALUES = st.sampled_from([PROSE, PROSE, STRINGS, MESSAGES, OTHER, st.one_of(STRINGS, OTHER)])
NAMES = st.sampled_from(["text", "id", "messages", "conversations", "prompt", "completion", "input", "output", "a\nb"])


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Any]]:
    count = draw(st.integers(0, 6))
    columns = draw(st.dictionaries(NAMES | st.text(max_size=3), VALUES, max_size=4))
    return {name: draw(st.lists(values, min_size=count, max_size=count)) for name, values in columns.items()}


def parquet(table: dict[str, list[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), out)
    return out.getvalue()


def encoded(table: dict[str, list[Any]], kind: str, encoding: str) -> bytes:
    """A table as a file; what a kind cannot hold raises."""
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    if kind == "parquet":
        return parquet(table)
    if kind in ("csv", "tsv"):
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter="," if kind == "csv" else "\t", quoting=csv.QUOTE_ALL)
        writer.writerows([list(table), *zip(*table.values(), strict=True)])
        return out.getvalue().encode(encoding)
    escaped = encoding == "ascii"
    if kind == "jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode(encoding)
    return json.dumps(rows if kind == "json" else table, ensure_ascii=escaped).encode(encoding)


def strings_in(value: Any) -> set[str]:
    """Every string that a value holds, and what a table without types makes of all others."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {value if isinstance(value, str) else str(value)}.union(*map(strings_in, inner))


def folded(text: str) -> str:
    return re.sub(r"\s+", " ", text)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    tables(),
    st.sampled_from(["jsonl", "json", "columns", "csv", "tsv", "parquet"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "ascii"]),
    st.booleans(),
    st.none() | NAMES,
)
@example({"text": ["a \ud800 b"]}, "json", "ascii", False, None)
@example({"text": [10**30], "id": ["a b"]}, "json", "ascii", True, "text")
def test_any_table_ends_in_its_own_text_or_in_one_line(
    tmp_path: Path, table: dict[str, list[Any]], kind: str, encoding: str, packed: bool, column: str | None
) -> None:
    try:
        content = encoded(table, kind, encoding)
    except Exception:  # there is no such file
        return
    path = tmp_path / f"table.{kind.replace('columns', 'json')}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    try:
        rows = rows_of(str(path), column, 100, 16)
    except CalibrationError as error:
        assert "\n" not in str(error) and str(error).isprintable() and path.name in str(error)
        return
    assert set(rows.columns) <= set(table) and all(row.strip() for row in rows)
    there = {folded(text) for text in strings_in(table)}
    for row in rows:
        said = row.split("\n\n") if rows.how else [row]
        for part in said:
            own = part.partition(": ")[2] if rows.how and ": " in part else part
            assert folded(own) in there or any(folded(own) in text for text in there), (own, table)


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100).map(lambda text: text.encode(errors="surrogatepass")),
        st.text(max_size=100).map(lambda text: text.encode("utf-16", errors="surrogatepass")),
        st.integers(0, 600).map(lambda end: parquet({"text": ["a b c", "d e f"]})[:end]),
        st.integers(0, 60).map(lambda end: gzip.compress(b'{"text": "a b c"}')[:end]),
    ),
    st.sampled_from(
        [".txt", ".raw", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".txt.gz", ".json.zst", ".x"]
    ),
)
def test_any_bytes_end_in_text_or_in_one_line(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"file{suffix}"
    path.write_bytes(content)
    try:
        rows = rows_of(str(path), None, 100, 16)
    except CalibrationError as error:
        assert "\n" not in str(error) and path.name in str(error)
    else:
        assert all(row.strip() for row in rows)
        tiny_tokenizer()("\n\n".join(rows))
