"""Journals: what was appended is read again, whatever happened to the last line; what cannot be read is named."""

from __future__ import annotations

import json
from math import inf, nan
from pathlib import Path

import pytest

from multipruner.core.errors import NumericsError, OutputError
from multipruner.jobs.search.files import FORMAT, read_history, write_history
from multipruner.search import Step
from multipruner.search.step import TrajectoryJournal, read_trajectory
from multipruner.storage.journal import Journal

HEADER = {"format": "toy", "version": 1}


def _journal(path: Path) -> Journal:
    return Journal(path, "number", "remove it", header=HEADER)


def _number(record: dict) -> int:
    return int(record["number"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a journal with a header and three records."""
    journal = _journal(tmp_path / "deep" / "toy.jsonl")
    journal.begin(identity={"a": 1})
    journal.append({"number": number} for number in range(3))
    return journal.path


def test_records_of_others_are_seen_and_none_twice(path: Path) -> None:
    one, other = _journal(path), _journal(path)
    assert (one.refresh(_number), one.header["identity"]) == ([0, 1, 2], {"a": 1})
    other.append([{"number": 3}])
    assert (one.refresh(_number), one.refresh(_number)) == ([3], [])
    other.begin(identity={"a": 2})
    assert (one.refresh(_number), one.header["identity"]) == ([], {"a": 2})


def test_a_torn_line_is_cut_off_before_the_next_one(path: Path) -> None:
    whole = path.read_bytes()
    for end in range(whole.index(b"\n") + 1, len(whole) + 1):
        path.write_bytes(whole[:end])
        journal, kept = _journal(path), whole[: whole[:end].rfind(b"\n") + 1]
        assert journal.refresh(_number) == list(range(kept.count(b"\n") - 1))
        journal.append([{"number": 7}])
        assert path.read_bytes() == kept + b'{"number": 7}\n'
        assert journal.refresh(_number) == [7]


def test_a_long_torn_line_is_cut_off(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 200_000)
    _journal(path).append([{"number": 3}])
    assert path.read_bytes() == whole + b'{"number": 3}\n'


@pytest.mark.parametrize("line", ["{", "[]", '{"number": NaN}', '{"number": Infinity}', "{}", '{"number": "x"}', ""])
def test_a_damaged_line_is_named_with_the_way_out(path: Path, line: str) -> None:
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(OutputError, match=r"toy.jsonl, line 3: no number \(.+\); remove it"):
        _journal(path).refresh(_number)


@pytest.mark.parametrize("header", [{"format": "toy", "version": 2}, {"number": 0}, HEADER, {**HEADER, "identity": 1}])
def test_a_file_of_something_else_is_refused(path: Path, header: dict) -> None:
    path.write_text(json.dumps(header) + "\n")
    with pytest.raises(OutputError, match="line 1: no number"):
        _journal(path).refresh(_number)


@pytest.mark.parametrize("value", [nan, inf])
def test_what_is_no_number_is_not_written(path: Path, value: float) -> None:
    whole = path.read_bytes()
    with pytest.raises(NumericsError, match="finite numbers only"):
        _journal(path).append([{"number": 1}, {"number": value}])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("loss", ["NaN", "null", '"x"'])
def test_a_trajectory_with_a_loss_that_is_no_number_is_refused(tmp_path: Path, loss: str) -> None:
    journal = TrajectoryJournal(tmp_path / "trajectory.jsonl")
    journal.start({}, 0.3)
    journal.add(Step("mlp", "mlp", 0, (1, 1, 1), 4.25, 0.1, 0.1, 1))
    journal.finish()
    found = read_trajectory(journal.path)
    assert found is not None and found.finished and found.steps[0].loss == 4.25
    journal.path.write_text(journal.path.read_text().replace("4.25", loss))
    with pytest.raises(OutputError, match=r"line 2: no step of a trajectory \(.+\); remove the file to start anew"):
        read_trajectory(journal.path)


def test_a_search_history_survives_a_kill_and_names_its_damage(tmp_path: Path) -> None:
    path = tmp_path / "search.jsonl"
    write_history(path, {**FORMAT, "identity": {"a": 1}}, [{"generation": 0}, {"generation": 1}])
    path.write_bytes(path.read_bytes() + b'{"genera')
    header, records = read_history(path)
    assert header["identity"] == {"a": 1} and [record["generation"] for record in records] == [0, 1]
    path.write_text(path.read_text().replace('{"generation": 0}', '{"generation": NaN}'))
    with pytest.raises(OutputError, match=r"search\.jsonl, line 2: no line of a search history"):
        read_history(path)
    with pytest.raises(OutputError, match="no search history"):
        read_history(tmp_path / "none.jsonl")


def test_what_cannot_be_read_or_is_nested_too_deeply_is_named(path: Path) -> None:
    path.write_text(path.read_text() + "[" * 100_000 + "\n")
    with pytest.raises(OutputError, match=r"toy\.jsonl, line 5: no number"):
        _journal(path).refresh(_number)
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match=r"cannot read .*toy\.jsonl"):
        _journal(path).refresh(_number)
