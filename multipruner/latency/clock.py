"""Points in time on a device."""

from __future__ import annotations

import time
from typing import Any

import torch


class Clock:
    """Points in time on a device: CUDA events in the stream, or the processor's clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._device = device

    def now(self) -> Any:
        """Mark this point; never waits for the device."""
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def milliseconds(self, start: Any, end: Any) -> float:
        """Return between two points; on CUDA only after :meth:`wait`."""
        return start.elapsed_time(end) if self._cuda else 1e3 * (end - start)
