"""Files of text in every coding and form that people have, folders of them, and data sets of the Hub."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from multipruner.core.errors import CalibrationError
from multipruner.sources.rows import Rows, rows_of
from multipruner.sources.text import hub
from multipruner.sources.text.hub import hub_request
from multipruner.storage.hub import HubUnreachable
from multipruner.storage.text_files import ending, read_text

LINES = [f"The number {n} bus über the bridge 雨 was late." for n in range(40)]


def read(path: Path | str, column: str | None = None) -> Rows:
    return rows_of(str(path), column, 1000, 16)


def jsonl(lines: list[str] = LINES) -> str:
    return "".join(json.dumps({"id": n, "text": line}, ensure_ascii=False) + "\n" for n, line in enumerate(lines))


def separated(mark: str) -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=mark).writerows([["id", "text"], *([n, x] for n, x in enumerate(LINES))])
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def arrow(lines: list[str] = LINES, *, stream: bool = True) -> bytes:
    table, sink = pyarrow.table({"text": lines}), pyarrow.BufferOutputStream()
    with (pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file)(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "bom.jsonl": ("\ufeff" + jsonl()).encode(),
    "bom.json": ("\ufeff" + json.dumps(LINES)).encode(),
    "sixteen.jsonl": jsonl().encode("utf-16"),
    "thirty-two.json": json.dumps(LINES).encode("utf-32"),
    "upper.JSONL": jsonl().encode(),
    "packed.jsonl.gz": gzip.compress(jsonl().encode(), mtime=0),
    "packed.jsonl.bz2": bz2.compress(jsonl().encode()),
    "packed.JSON.ZST": zstd(json.dumps(LINES).encode()),
    "table.csv": separated(",").encode("utf-8-sig"),
    "table.tsv": separated("\t").encode(),
    "table.csv.gz": gzip.compress(separated(",").encode(), mtime=0),
    "stream.arrow": arrow(),
    "file.arrow": arrow(stream=False),
    "wrapped.json": json.dumps({"data": [{"text": line} for line in LINES]}).encode(),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_tables_of_every_coding(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(CONTENTS[name])
    assert list(read(tmp_path / name)) == LINES


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["text.txt", "TEXT.RAW", "text.txt.gz"])
def test_running_text_of_every_coding(name: str, encoding: str, tmp_path: Path) -> None:
    content = "\r\n".join(LINES).encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    rows = read(tmp_path / name)
    assert "".join(rows) == "\n".join(LINES) and rows.running and not rows.columns


def test_the_types_of_arrow(tmp_path: Path) -> None:
    for number, column in enumerate(
        [pyarrow.array(LINES, pyarrow.large_string()), pyarrow.array(LINES).dictionary_encode()]
    ):
        path = tmp_path / f"{number}.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"n": pyarrow.array(range(40)), "body": column}), path)
        assert list(read(path)) == LINES
    pyarrow.parquet.write_table(pyarrow.table({"text": [line.encode() for line in LINES]}), tmp_path / "b.parquet")
    with pytest.raises(CalibrationError, match="columns with text: none"):
        read(tmp_path / "b.parquet")
    talk = [[{"role": "user", "content": line}] for line in LINES]
    pyarrow.parquet.write_table(pyarrow.table({"messages": talk}), tmp_path / "chat.parquet")
    assert read(tmp_path / "chat.parquet")[0] == f"user: {LINES[0]}"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nul.txt", b"some text\0 with more", "NUL characters"),
        ("latin.txt", "Zürich lies there".encode("latin-1"), r"not UTF-8 \(byte 1\); save it as UTF-8"),
        ("half.txt", b"\xff\xfea", "not UTF-16"),
        ("numbers.txt", b"1 2 3\n4 5 6\n", "holds no words"),
        ("cut.jsonl.gz", gzip.compress(jsonl().encode(), mtime=0)[:-20], "cannot read"),
        ("cut.jsonl", b'{"text": "a b c"}\n{"text": "cut in', "line 2 is no JSON"),
        ("deep.json", b"[" * 100_000, "cannot read"),
        ("half.json", b'["a word \\ud800 and more"]', "lone surrogate"),
        ("ragged.csv", b"text\nsome words here, and more\n", "cannot read"),
        ("twice.csv", b"text,text\na b,c d\n", "share a name: text, text"),
        ("empty.csv", b"", "is empty"),
        ("empty.parquet", b"", "cannot read"),
        ("empty.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("lists.jsonl", b'["a b c"]\n', "texts, or objects"),
        ("unequal.json", b'{"question": ["who is it"], "answer": ["a b", "c d"]}', "of different lengths"),
    ],
)
def test_damaged_and_foreign_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_endings() -> None:
    assert [ending(Path(name)) for name in ("A.TXT", "a.jsonl.GZ", "a.gz", "a")] == [".txt", ".jsonl", "", ""]


def test_text_may_have_one_mark_only_at_its_beginning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffa\ufeffb")
    assert read_text(tmp_path / "a.txt") == "a\ufeffb"


def test_folders(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "more").mkdir(parents=True)
    (data / "README.md").write_text("# about")
    (data / ".hidden.txt").write_text("no")
    with pytest.raises(CalibrationError, match="holds no text"):
        read(data)
    (data / "b.jsonl").write_text(jsonl(LINES[:10]))
    (data / "more" / "c.jsonl").write_text(jsonl(LINES[10:]))
    assert list(read(data)) == LINES
    (data / "d.parquet").write_bytes(b"")
    with pytest.raises(CalibrationError, match=r"holds \.jsonl, \.parquet files"):
        read(data)
    (data / "d.parquet").unlink()
    (data / "train-00000-of-00001.jsonl").write_text(jsonl(LINES[:5]))
    (data / "test-00000-of-00001.jsonl").write_text(jsonl(LINES[5:9]))
    assert list(read(data)) == LINES[:5], "the train split alone"
    (data / "train-2.jsonl").write_text(json.dumps({"body": LINES[0]}))
    with pytest.raises(CalibrationError, match=r"different columns \(text; body\)"):
        read(data)
    (tmp_path / "lines").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "lines" / name).write_text("\n".join(LINES))
    assert read(tmp_path / "lines").running


def test_folders_that_datasets_saved(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"id": list(range(40)), "text": LINES})
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "splits")
    datasets.DatasetDict({"test": rows}).save_to_disk(tmp_path / "test")
    rows.select(range(30)).select(range(5, 15)).save_to_disk(tmp_path / "some")
    assert list(read(tmp_path / "one")) == list(read(tmp_path / "splits")) == LINES
    assert list(read(tmp_path / "some")) == LINES[5:15]
    with pytest.raises(CalibrationError, match="no split is called train"):
        read(tmp_path / "test")


def test_names_of_data_sets() -> None:
    streamed = {"path": "me/notes", "split": "train", "streaming": True}
    assert hub_request("me/notes") == (streamed, None)
    assert hub_request("me/notes:old:test:body") == ({**streamed, "name": "old", "split": "test"}, "body")
    assert hub_request("me/notes::test") == ({**streamed, "split": "test"}, None)
    assert hub_request("me/notes:::body") == (streamed, "body")
    for other in ("alpaca", "notes", "a/b/c", "./data", "~/data", "a/b:c:d:e:f"):
        assert hub_request(other) is None
    for missing in ("none.txt", "folder/none.jsonl.gz", "/data/none"):
        with pytest.raises(CalibrationError, match=r"no calibration text .*owner/name"):
            read(missing)


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """``me/notes`` as ``datasets`` finds it: its own loading code, on a local folder in the Hub's place."""
    folder = tmp_path / "me" / "notes"
    for config in ("old", "new"):
        (folder / config).mkdir(parents=True)
        for split, lines in (("train", LINES), ("test", LINES[:4])):
            rows = {"id": list(range(len(lines))), "title": lines, "body": [f"{config} {line}" for line in lines]}
            pyarrow.parquet.write_table(pyarrow.table(rows), folder / config / f"{split}-00000-of-00001.parquet")
    configs = [f"- config_name: {c}\n  data_dir: {c}\n  default: {str(c == 'new').lower()}\n" for c in ("old", "new")]
    (folder / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub, "repo_info", lambda *_: None)
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **more: real(str(tmp_path / path), **more))
    monkeypatch.chdir(tmp_path / "me")
    yield folder


def test_a_data_set_of_the_hub(on_the_hub: Path) -> None:
    assert list(read("me/notes:old:test:body")) == [f"old {line}" for line in LINES[:4]]
    rows = read("me/notes:::title")
    assert list(rows) == LINES and rows.columns == ("title",)
    assert list(read("me/notes", "title")) == LINES
    with pytest.raises(CalibrationError, match="columns with text: title, body; choose with --text-column"):
        read("me/notes")
    for wrong in ("me/notes:older", "me/notes::dev:body"):
        with pytest.raises(CalibrationError, match="cannot load me/notes from the Hub"):
            read(wrong)


def test_only_the_beginning_of_a_data_set_is_read(on_the_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multipruner.sources.rows.TOKENS_PER_ROW", 10**9)
    many = [f"line {n} of many words" for n in range(1500)]
    pyarrow.parquet.write_table(pyarrow.table({"title": many}), on_the_hub / "new" / "train-00000-of-00001.parquet")
    assert list(read("me/notes")) == many[:1000]


def test_without_the_hub_what_is_cached_is_read(on_the_hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any) -> None:
        raise HubUnreachable("no route")

    monkeypatch.setattr(hub, "repo_info", unreachable)
    assert list(read("me/notes:::title")) == LINES
    with pytest.raises(HubUnreachable):
        read("me/nowhere")
