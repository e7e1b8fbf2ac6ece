"""The output folder and, beside it, what a running search keeps: ``runs/x`` and ``runs/x.partial``."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import OutputError
from .journal import Journal, Trajectory, read_trajectory

TRAJECTORY = "trajectory.jsonl"


class Workspace:
    """Where one run keeps its state until its folder appears.

    Args:
        output: the folder that will hold the result.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.partial = output.with_name(output.name + ".partial")

    @property
    def trajectory_path(self) -> Path:
        """The trajectory of the run at hand (in the partial folder until the run ends)."""
        return self.partial / TRAJECTORY

    def check(self, overwrite: bool) -> None:
        """Refuse an output folder that holds something else, before any work.

        Raises:
            OutputError: naming what is there.
        """
        if self.output.exists() and not self.output.is_dir():
            raise OutputError(f"{self.output} is a file; choose another --output")
        if self.output.is_dir() and any(self.output.iterdir()) and not (self.output / TRAJECTORY).exists():
            raise OutputError(f"{self.output} holds something that is no multipruner run; choose another --output")
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            (self.partial / ".probe").write_text("")
            (self.partial / ".probe").unlink()
        except OSError as error:
            raise OutputError(f"cannot write to {self.partial}: {error.strerror}") from error

    def open(self, identity: Mapping[str, Any], ratio: float, overwrite: bool) -> tuple[Trajectory | None, Journal]:
        """The trajectory to go on with, if any, and the journal to write to.

        Raises:
            OutputError: when the folder holds a run with other settings, or to a smaller ratio.
        """
        journal = Journal(self.trajectory_path)
        if overwrite and not self._matches(self.trajectory_path, identity, ratio):
            journal.begin(identity, ratio)
            return None, journal
        finished = self._usable(self.output / TRAJECTORY, identity, ratio, overwrite)
        if finished is not None and finished.finished:
            shutil.copyfile(self.output / TRAJECTORY, self.trajectory_path)
            return finished, journal
        interrupted = self._usable(self.trajectory_path, identity, ratio, overwrite)
        if interrupted is None:
            journal.begin(identity, ratio)
        return interrupted, journal

    def _matches(self, path: Path, identity: Mapping[str, Any], ratio: float) -> bool:
        found = read_trajectory(path)
        return found is not None and not found.differences(identity) and found.ratio == ratio

    def _usable(self, path: Path, identity: Mapping[str, Any], ratio: float, overwrite: bool) -> Trajectory | None:
        """A trajectory that serves this run; one that does not is an error."""
        found = read_trajectory(path)
        if found is None:
            return None
        where = f"{path.parent} holds a run"
        mend = "choose another --output, or give it up with --overwrite"
        if differences := found.differences(identity):
            raise OutputError(f"{where} with other settings ({'; '.join(differences)}); {mend}")
        if ratio > found.ratio or (ratio != found.ratio and not found.finished):
            raise OutputError(f"{where} to a ratio of {found.ratio:g}, not {ratio:g}; {mend}")
        return found

    def close(self) -> None:
        """Remove what only a running search needs."""
        shutil.rmtree(self.partial, ignore_errors=True)
