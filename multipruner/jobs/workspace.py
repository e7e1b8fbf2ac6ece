"""The output folder and, beside it, what a running search keeps: ``runs/x`` and ``runs/x.partial``."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from multipruner.checkpoint.run_folder import check_name, is_written, unwritten
from multipruner.config.spellings import now_called
from multipruner.core.errors import OutputError
from multipruner.core.identity import differences
from multipruner.search.step import Trajectory, TrajectoryJournal, read_trajectory
from multipruner.storage.files import write_atomically
from multipruner.storage.partial import LOCK, PartialFolder, header_of

TRAJECTORY = "trajectory.jsonl"
MEASUREMENTS = "measurements.jsonl"
"""Every loss that an allocation measured; its first line says what of."""
SEARCH = "search.jsonl"
"""The history of an evolutionary search."""
MEASUREMENTS_FORMAT = {"format": "multipruner-measurements", "version": 1}
STATE = (TRAJECTORY, f"{MEASUREMENTS}*", SEARCH, "nsga2.json", "random.json", "state.safetensors")
"""What commands keep in a partial folder, by name."""

_WAYS_OUT = "choose another --output, or give that run up with --overwrite"


class Workspace:
    """Where one run keeps its state until its folder appears; entered, no other run can have it.

    Args:
        output: the folder that will hold the result.
        model: what is read, where that may be a folder; the output cannot be within it.
    """

    def __init__(self, output: Path, model: str | None = None) -> None:
        check_name(output)
        place = output.absolute().resolve()
        if place in (Path.cwd(), *Path.cwd().parents):
            raise OutputError(f"{output} cannot be replaced by a model's folder; choose another --output")
        refuse_within(output, model)
        self.output = output
        self.partial = place.with_name(place.name + ".partial")
        self._folder = PartialFolder(self.partial, STATE)
        self._lock = FileLock(self.partial / LOCK, timeout=0)

    @property
    def trajectory_path(self) -> Path:
        """The trajectory of the run at hand (in the partial folder until the run ends)."""
        return self.partial / TRAJECTORY

    @property
    def journal_path(self) -> Path:
        """What the search left to go on from: its trajectory, or its measurements."""
        return self.trajectory_path if self.trajectory_path.exists() else self.measurements_path

    @property
    def measurements_path(self) -> Path:
        """The losses that the allocation at hand has measured (in the partial folder until the run ends)."""
        return self.partial / MEASUREMENTS

    def __enter__(self) -> Workspace:
        self._check()
        return self

    def __exit__(self, *error: object) -> None:
        """Let others have the folder; leave nothing of a run that has not taken a step."""
        try:
            measured = _read_identity(self.measurements_path)[1]
            with suppress(OutputError):  # what cannot be read is not ours to remove
                if self.trajectory_path.exists() and read_trajectory(self.trajectory_path) is None:
                    self.trajectory_path.unlink()
            if not self.trajectory_path.exists() and not measured and not (self.partial / SEARCH).exists():
                self._folder.remove()
        finally:
            self._lock.release()  # last: what another process has begun here must not be removed

    def _check(self) -> None:
        """Refuse an output folder that holds something else, or that another run writes to, before any work.

        Raises:
            OutputError: naming what is there.
        """
        if self.output.exists() and not self.output.is_dir():
            raise OutputError(f"{self.output} is a file; choose another --output")
        if self.output.is_dir() and any(self.output.iterdir()) and not _is_run(self.output):
            raise OutputError(f"{self.output} holds something that is no multipruner run; choose another --output")
        if self.output.is_dir() and (others := unwritten(self.output)):
            raise OutputError(
                f"{self.output} holds {others[0]}, which no run wrote and a run would replace or be misread with; "
                "move it, or choose another --output"
            )
        self._folder.claim()
        try:
            self._lock.acquire()
        except Timeout:
            raise OutputError(
                f"another process is writing to {self.output}; wait, or choose another --output"
            ) from None
        except OSError as error:
            raise OutputError(f"cannot write to {self.partial}: {error.strerror}") from error

    def open(
        self, identity: Mapping[str, Any], ratio: float, overwrite: bool
    ) -> tuple[Trajectory | None, TrajectoryJournal]:
        """Return the trajectory to go on with, if any, and the journal to write to.

        Raises:
            OutputError: when the folder holds a run with other settings, to a smaller ratio or of another kind, unless
                overwritten.
        """
        journal = TrajectoryJournal(self.trajectory_path)
        interrupted = read_trajectory(self.trajectory_path)
        if interrupted is not None and _serves(interrupted, identity, ratio):
            return interrupted, journal
        there = read_trajectory(self.output / TRAJECTORY)
        if there is not None and there.finished and _serves(there, identity, ratio):
            _copy(self.output / TRAJECTORY, self.trajectory_path)
            return there, journal
        for folder, found in ((self.partial, interrupted), (self.output, there)):
            if found is not None and not overwrite:
                raise OutputError(
                    _conflict(folder, found.identity, identity, f"to a ratio of {found.ratio:g}, not {ratio:g}")
                )
            other = _read_identity(folder / MEASUREMENTS)[1] or (folder / SEARCH).exists()
            other = other or (folder is self.output and _is_run(folder))
            if found is None and other and not overwrite:
                raise OutputError(_other_kind(folder, "no greedy path"))
        self.measurements_path.unlink(missing_ok=True)  # of a given-up run of the other method
        self._give_up_search()
        journal.start(identity, ratio)
        return None, journal

    def open_measurements(self, identity: Mapping[str, Any], overwrite: bool) -> Path:
        """Return the file of measured losses to go on with: of an interrupted run, or of a finished one in the output
        folder.

        Raises:
            OutputError: when the folder holds a run with other settings, unless overwritten.
        """
        for folder in (self.partial, self.output):
            found, measured = _read_identity(folder / MEASUREMENTS)
            if found == dict(identity):
                if folder is self.output:  # also over what a given-up run measured
                    _copy(folder / MEASUREMENTS, self.measurements_path)
                    self.trajectory_path.unlink(missing_ok=True)
                return self.measurements_path
            if not overwrite and (measured or _is_run(folder)):
                if found is None:
                    raise OutputError(_other_kind(folder, "none of the exact program"))
                raise OutputError(_conflict(folder, found, identity))
        self.trajectory_path.unlink(missing_ok=True)  # of a given-up run of the other method
        self._give_up_search()
        header = json.dumps({**MEASUREMENTS_FORMAT, "identity": dict(identity)}) + "\n"
        write_atomically(self.measurements_path, header)
        return self.measurements_path

    def _give_up_search(self) -> None:
        """Remove the state of an evolutionary search."""
        for path in (*self._folder.own(SEARCH), *self._folder.own("*.json")):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what only a running search needs."""
        self._folder.remove()


def refuse_within(output: Path, model: str | None) -> None:
    """Refuse an output inside the folder of the model that is read.

    Raises:
        OutputError: naming both.
    """
    folder = Path(model).expanduser() if model else None
    if folder is not None and folder.is_dir() and folder.resolve() in output.absolute().resolve().parents:
        raise OutputError(f"{output} is inside the model's own folder {folder}; choose another --output")


def _is_run(folder: Path) -> bool:
    """Tell whether a folder holds what a finished run writes, by what is in the files."""
    state = (header_of(folder / name) for name in (TRAJECTORY, MEASUREMENTS, SEARCH))
    return any(header is not None for header in state) or is_written(folder)


def _read_identity(path: Path) -> tuple[dict[str, Any] | None, bool]:
    """Return what a file of measurements is of, if it is one, and whether there are any."""
    try:
        with path.open(encoding="utf-8") as stream:
            header = json.loads(stream.readline())
            return header["identity"], bool(stream.readline())
    except (OSError, KeyError, TypeError, ValueError):
        return None, False


def _serves(found: Trajectory, identity: Mapping[str, Any], ratio: float) -> bool:
    """Tell whether a trajectory is of this run, or of a finished one that this is a part of."""
    same = not differences(found.identity, identity)
    return same and (ratio == found.ratio or (found.finished and ratio < found.ratio))


def _conflict(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any], otherwise: str = "") -> str:
    """Return what is in the way: a run with other settings, or with the same ones and different ``otherwise``."""
    found = differences(now_called(theirs), now_called(ours))
    what = f"with other settings ({'; '.join(found)})" if found else otherwise
    return f"{folder} holds a run {what}; {_WAYS_OUT}"


def _other_kind(folder: Path, what: str) -> str:
    return f"{folder} holds another kind of run, {what}; {_WAYS_OUT}"


def _copy(source: Path, target: Path) -> None:
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror}") from error
