"""Several processes that share one job: one decides, all compute (torchrun, or `accelerate launch`).

Every process loads the same model and holds the same handlers. The first process, rank 0, asks; all of them, rank 0
included, answer for their share; the answers come back in the order of the ranks. What travels is JSON, as bytes in
tensors over gloo, whatever device the models are on. Only rank 0 writes and prints.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from multipruner.core.errors import MultiprunerError

T = TypeVar("T")
Handler = Callable[[Any], Any]
"""What a process answers to a request, for its own share; both are JSON values."""

IDLE = timedelta(days=7)
"""How long a process waits for the next request: another one may be at work alone for hours."""
PATIENCE = 600.0
"""Seconds that rank 0 waits at least for the others once its own share is done; or 20 times what that took."""


class DistributedError(MultiprunerError):
    """A process of the job has failed, or has gone."""


class Team:
    """The processes of a job; alone, where none was launched beside this one.

    Attributes:
        rank: of this process.
        size: how many there are.
        local_rank: of this process on its machine.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._handlers: dict[str, Handler] = {}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Team:
        """Return what the launcher says in ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``.

        Raises:
            DistributedError: when the processes do not find each other.
        """
        size = int(environment.get("WORLD_SIZE", "1"))
        if size == 1 or "RANK" not in environment:
            return cls()
        team = cls(int(environment["RANK"]), size, int(environment.get("LOCAL_RANK", environment["RANK"])))
        if not dist.is_initialized():
            with team.watched():
                dist.init_process_group("gloo", timeout=IDLE)
        return team

    def device(self, wanted: str) -> str:
        """Return the device of this process: with several GPUs each process has its own; a named device stays."""
        if self.size == 1 or wanted not in ("auto", "cuda") or not torch.cuda.is_available():
            return wanted
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    def share(self, count: int) -> range:
        """Return the places of this process among ``count`` things in a row: stretches of (nearly) equal length."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def told(self, work: Callable[[], Any]) -> Any:
        """Return what rank 0 finds, a JSON value, told to everybody."""
        if self.size == 1:
            return work()
        with self.watched():
            if self.rank:
                return self._receive()["told"]
            found = work()
            self._broadcast({"told": found})
        return found

    def one_first(self, work: Callable[[], T], identity: Callable[[T], str]) -> T:
        """Do the same work everywhere, rank 0 first (it fills the caches), and make sure that it came out the same.

        Args:
            work: what to do.
            identity: of its result, such as a hash.

        Raises:
            DistributedError: on rank 0, when another process failed; everywhere, when results differ.
        """
        if self.size == 1:
            return work()
        if self.rank:
            with self.watched():
                self._receive()
        try:
            made, reply = work(), {}
        except MultiprunerError as error:
            if self.rank == 0:  # the others have not begun
                raise
            made, reply = None, {"error": f"process {self.rank} of {self.size}: {error}"}
        with self.watched():
            if self.rank == 0:
                self._broadcast({"ready": True})
            replies = self._gather(reply if made is None else {"value": identity(made)})
        for rank, each in enumerate(replies):
            if each["value"] != replies[0]["value"]:
                raise DistributedError(
                    f"process {rank} of {self.size} prepared another model or text than process 0: give every "
                    "machine the same files, versions and kind of device"
                )
        assert made is not None, "its error was raised by everybody"
        return made

    def handle(self, name: str, handler: Handler) -> None:
        """Set what this process answers to requests of a name; alike in all processes, before they are asked."""
        self._handlers[name] = handler

    def ask(self, name: str, request: Any) -> list[Any]:
        """Return the answers of all processes, by rank (on rank 0).

        Raises:
            DistributedError: when a process failed, has gone, or does not answer.
        """
        if self.size == 1:
            return [self._handlers[name](request)]
        with self.watched():
            self._broadcast({"ask": name, "request": request})
            return self._answer(name, request)

    def serve(self) -> None:
        """Answer what rank 0 asks until it says stop (on the other ranks).

        Raises:
            DistributedError: when a process failed or has gone.
        """
        with self.watched():
            while "stop" not in (message := self._receive()):
                self._answer(message["ask"], message["request"])

    def stop(self) -> None:
        """Let the other processes go (on rank 0)."""
        if self.size > 1:
            with self.watched():
                self._broadcast({"stop": True})

    def _answer(self, name: str, request: Any) -> list[Any]:
        began = time.perf_counter()
        try:
            reply = {"value": self._handlers[name](request)}
        except Exception as error:
            # the others wait for an answer: they must hear of it, and fail with the same words
            what = str(error) if isinstance(error, MultiprunerError) else f"{type(error).__name__}: {error}"
            reply = {"error": f"process {self.rank} of {self.size}: {what}"}
        if self.rank == 0:
            patience = max(PATIENCE, 20 * (time.perf_counter() - began))
            dist.monitored_barrier(timeout=timedelta(seconds=patience), wait_all_ranks=True)
        else:
            dist.monitored_barrier(timeout=IDLE)
        return [reply["value"] for reply in self._gather(reply)]

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Say in one line what happened when the connection to another process breaks."""
        try:
            yield
        except DistributedError:
            raise
        except (RuntimeError, ValueError) as error:  # torch's DistError among them
            if isinstance(error, torch.OutOfMemoryError):
                raise
            why = " ".join(str(error).split())[:200]
            raise DistributedError(
                f"a process of this job has ended or does not answer (process {self.rank} of {self.size} says: {why}); "
                "the same command goes on from here"
            ) from error

    # Bytes in tensors.

    def _broadcast(self, message: Any) -> None:
        data = _encode(message)
        dist.broadcast(torch.tensor([len(data)]), src=0)
        dist.broadcast(data, src=0)

    def _receive(self) -> Any:
        length = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(length, src=0)
        data = torch.zeros(int(length), dtype=torch.uint8)
        dist.broadcast(data, src=0)
        return _decode(data)

    def _gather(self, reply: Any) -> list[Any]:
        """Return everybody's reply, on every rank; raises everywhere when one of them is an error."""
        data = _encode(reply)
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        longest = max(int(length) for length in lengths)
        rows = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(rows, torch.nn.functional.pad(data, (0, longest - len(data))))
        replies = [_decode(row[: int(length)]) for row, length in zip(rows, lengths, strict=True)]
        errors = [reply["error"] for reply in replies if "error" in reply]
        if errors:
            raise DistributedError("; ".join(errors))
        return replies


def leave() -> None:
    """Close the connections of this process, if it has any."""
    if dist.is_initialized():
        with suppress(RuntimeError, ValueError):
            dist.destroy_process_group()


def _encode(message: Any) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)


def _decode(data: torch.Tensor) -> Any:
    return json.loads(data.numpy().tobytes())
