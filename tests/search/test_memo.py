"""The memo of evaluations: nothing is lost, torn or mixed up."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from math import inf, nan
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from multipruner.core.errors import ConfigError, OutputError
from multipruner.search.memo import Memo

CANDIDATE = {"blocks": [[1, 2], [8], [], [16]]}


def test_values_come_back_to_the_bit(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "memo.jsonl"
    memo = Memo(path, "a")
    assert memo.get(CANDIDATE, 0) is None
    memo.add([(CANDIDATE, 0, (0.1 + 0.2,)), (CANDIDATE, 1, (inf,)), ({"b": 1, "a": 2}, 0, (1.0, 2.0))])
    again = Memo(path, "a")
    assert again.get(CANDIDATE, 0) == (0.1 + 0.2,)
    assert again.get(CANDIDATE, 1) == (inf,)
    assert again.get({"a": 2, "b": 1}, 0) == (1.0, 2.0)
    assert again.get(CANDIDATE, 2) is None
    assert len(again) == 3
    assert all(json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())


def test_structures_of_version_1_are_the_same_candidates(tmp_path: Path) -> None:
    """Rows of layers and rows of blocks have one key, whichever is written and whichever is asked for."""
    path, rows = tmp_path / "memo.jsonl", [[2, 1, 8], [0, 0, 16]]
    line = {"namespace": "a", "candidate": rows, "fidelity": 0, "values": [0.5]}
    path.write_text(json.dumps(line) + "\n")
    memo = Memo(path, "a")
    assert memo.get(CANDIDATE, 0) == memo.get(rows, 0) == (0.5,)
    memo.add([(CANDIDATE, 0, (9.0,)), (rows, 0, (9.0,)), ([[3, 2, 8]], 0, (1.0,))])
    again = Memo(path, "a")
    assert again.get(CANDIDATE, 0) == (0.5,)
    assert again.get([[3, 2, 8]], 0) == (1.0,), "which is no structure, and a candidate all the same"
    assert len(path.read_text().splitlines()) == len(again) == 2


def test_namespaces_and_fidelities_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "memo.jsonl"
    one, other = Memo(path, "model-1"), Memo(path, "model-2")
    one.add([(CANDIDATE, 0, (1.0,))])
    other.refresh()
    assert other.get(CANDIDATE, 0) is None
    other.add([(CANDIDATE, 0, (2.0,))])
    assert Memo(path, "model-1").get(CANDIDATE, 0) == (1.0,)
    assert Memo(path, "model-2").get(CANDIDATE, 0) == (2.0,)
    with pytest.raises(ConfigError, match="namespace"):
        Memo(path, "")


@settings(max_examples=20)
@given(st.data())
def test_a_torn_last_line_costs_one_evaluation_only(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("memo") / "memo.jsonl"
    memo = Memo(path, "a")
    for number in range(4):
        memo.add([([number], 0, (float(number),))])
    whole = path.read_bytes()
    keep = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:keep])
    lines = whole[:keep].count(b"\n")
    torn = Memo(path, "a")
    assert [torn.get([n], 0) for n in range(4)] == [(float(n),) if n < lines else None for n in range(4)]
    torn.add([([n], 0, (float(n),)) for n in range(5)])
    healed = Memo(path, "a")
    assert [healed.get([n], 0) for n in range(5)] == [(float(n),) for n in range(5)]
    assert len(path.read_bytes().splitlines()) == 5


@pytest.mark.parametrize("line", [b'{"namespace": "a", "candi', b"[1, 2]", b"\xff", b'{"namespace": "a"}'])
def test_a_damaged_line_inside_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "memo.jsonl"
    Memo(path, "a").add([([1], 0, (1.0,))])
    whole = path.read_bytes()
    path.write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(OutputError, match=r"memo.jsonl, line 2: no evaluation .*; remove the line"):
        Memo(path, "a")


def test_a_loss_that_is_no_number_is_kept_as_the_worst(tmp_path: Path) -> None:
    memo = Memo(tmp_path / "memo.jsonl", "a")
    memo.add([([1], 0, (nan,))])
    assert memo.get([1], 0) == Memo(memo.path, "a").get([1], 0) == (inf,)


def test_what_others_append_is_seen_and_the_first_value_stays(tmp_path: Path) -> None:
    path = tmp_path / "memo.jsonl"
    one, other = Memo(path, "a"), Memo(path, "a")
    one.add([([1], 0, (1.0,))])
    other.add([([1], 0, (9.0,)), ([2], 0, (2.0,))])
    one.refresh()
    assert (one.get([1], 0), one.get([2], 0)) == ((1.0,), (2.0,))
    assert Memo(path, "a").get([1], 0) == (1.0,)
    path.write_bytes(b"")  # emptied by hand: what is known stays known, what comes is read from the start
    one.add([([3], 0, (3.0,))])
    other.refresh()
    assert other.get([3], 0) == (3.0,)


WRITER = """
import sys
from pathlib import Path
from multipruner.search.memo import Memo
memo, mine = Memo(Path(sys.argv[1]), "a"), int(sys.argv[2])
for number in range(60):
    memo.add([([mine, number, i], 0, (mine * 1000.0 + number,)) for i in range(1 + number % 7)])
"""


def test_two_processes_write_at_once_and_no_line_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "memo.jsonl"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(mine)]) for mine in (1, 2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    memo = Memo(path, "a")
    for mine in (1, 2):
        for number in range(60):
            for i in range(1 + number % 7):
                assert memo.get([mine, number, i], 0) == (mine * 1000.0 + number,)


def test_a_writer_waits_while_another_one_is_at_it(tmp_path: Path) -> None:
    path = tmp_path / "memo.jsonl"
    memo = Memo(path, "a")
    writer = threading.Thread(target=memo.add, args=([([1], 0, (1.0,))],))
    with FileLock(f"{path}.lock"):
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        assert not path.exists()
    writer.join(10)
    assert Memo(path, "a").get([1], 0) == (1.0,)


def test_a_memo_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        Memo(tmp_path / "file" / "memo.jsonl", "a").add([([1], 0, (1.0,))])
