"""Files and folders are whole or not there, whoever stops the writer; what killed writers leave goes one day."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from multipruner.core.errors import OutputError
from multipruner.storage.cache import work_folder
from multipruner.storage.files import DAY, sweep, whole_file, whole_folder, write_atomically


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def private_group() -> Iterator[None]:
    """The umask that lets the group read, and nobody else anything."""
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_texts_and_bytes_replace_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_atomically(path, "gr\u00f6\u00dfer")
    assert path.read_text(encoding="utf-8") == "gr\u00f6\u00dfer"
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert _names(path.parent) == ["file"]


@pytest.mark.usefixtures("private_group")
def test_permissions_are_the_umask_s_whoever_writes(tmp_path: Path) -> None:
    write_atomically(tmp_path / "text", "")
    with whole_file(tmp_path / "weights") as aside:
        save_file({"x": torch.zeros(1)}, aside)
    with whole_folder(tmp_path / "folder") as made:
        save_file({"x": torch.zeros(1)}, made / "weights")
    found = [tmp_path / name for name in ("text", "weights", "folder/weights")]
    assert [path.stat().st_mode & 0o777 for path in found] == [0o640] * 3


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EIO, "bad disk"), "bad disk"),
    ],
)
def test_a_failure_leaves_what_was_there_and_says_why(tmp_path: Path, error: OSError, said: str) -> None:
    write_atomically(tmp_path / "file", "old")
    with whole_folder(tmp_path / "folder") as made:
        (made / "inside").write_text("old")
    with pytest.raises(OutputError, match=f"cannot write .*file: {said}"), whole_file(tmp_path / "file") as aside:
        aside.write_text("half")
        raise error
    with pytest.raises(OutputError, match=f"cannot write .*folder: {said}"), whole_folder(tmp_path / "folder") as made:
        (made / "inside").write_text("half")
        raise error
    assert [(tmp_path / name).read_text() for name in ("file", "folder/inside")] == ["old", "old"]
    assert _names(tmp_path) == ["file", "folder"]
    with pytest.raises(OutputError, match=r"cannot write .*below: File exists: .*file$"):
        write_atomically(tmp_path / "file" / "below", "")


def test_a_folder_takes_along_what_it_is_told_to(tmp_path: Path) -> None:
    for number in range(2):
        with whole_folder(tmp_path / "out", lambda old, new: (old / "0").rename(new / "0")) as made:
            (made / str(number)).write_text("")
    assert _names(tmp_path / "out") == ["0", "1"]
    assert _names(tmp_path) == ["out"]


WRITER = """
import os, signal, sys
from pathlib import Path
from multipruner.storage.files import whole_file
with whole_file(Path(sys.argv[1])) as aside:
    aside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _old(path: Path) -> None:
    for one in (*path.rglob("*"), path):
        os.utime(one, (time.time() - 2 * DAY, time.time() - 2 * DAY))


def test_what_a_killed_writer_leaves_goes_after_a_day(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", "old")
    assert subprocess.run([sys.executable, "-c", WRITER, tmp_path / "file"], check=False).returncode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.name != "file")
    sweep(tmp_path)
    assert left.exists(), "it may be looked at for a day"
    _old(left)
    write_atomically(tmp_path / "other", "")
    assert _names(tmp_path) == ["file", "other"]
    assert (tmp_path / "file").read_text() == "old"


def test_only_our_own_dead_are_swept(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "run") as made:
        mine = made.name
        host, dead = mine.split("-")[1], subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        stay = [
            mine,
            f".run.partial-{host}-{os.getppid()}-00000000",
            f".gone.old-{host}-{dead.pid}-00000000",  # the only one that is left of it
            f"run.partial-{host}-{dead.pid}-00000000",
            ".run.partial-4711",
            ".run.12",
            "run.partial",
        ]
        go = [
            f".run.partial-{host}-{dead.pid}-00000000",
            f".run.partial-{host}-99999999999999999999-00000000",
            f".run.partial-ffffffff-{os.getpid()}-00000000",
            f".kept.old-{host}-{dead.pid}-00000000",
        ]
        for name in ("kept", *stay[1:], *go):
            (tmp_path / name).mkdir()
        for path in tmp_path.iterdir():
            _old(path)
        sweep(tmp_path)
        assert _names(tmp_path) == sorted(["kept", *stay])


def test_the_cache_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTIPRUNER_CACHE", str(tmp_path))
    (tmp_path / ".work.partial-ffffffff-1-00000000").mkdir()
    _old(tmp_path / ".work.partial-ffffffff-1-00000000")
    with work_folder() as folder:
        assert _names(tmp_path) == [folder.name]
