"""Layers of a model whose weights stay in their files: one is in memory at a time, as long as it is used.

A weight that was loaded as it is stored is a view of its file, mapped: it takes no memory that the system could not
take back at once. What takes memory is a layer that is computed with, in the type that is computed in, its units in
another order. So a layer comes in when something asks for it, and goes when something asks for another one.

Meanwhile a thread reads the pages of the layer that is expected next, so that they are in the system's cache of files
when it comes in. That changes nothing and keeps nothing: a wrong guess costs a read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from threading import Event

import torch
from torch import Tensor, nn

_PAGE = 4096
"""Bytes that a system reads at least; where its pages are larger, some are touched twice."""
_TOGETHER = 1 << 24
"""Bytes of a weight that are touched in one go."""


class LayersOnDisk:
    """The layers of a model, of which one at most is in memory.

    The forward pass of a layer asks for it by itself, so that the stock model runs as ever; what runs parts of a layer
    calls :meth:`enter` before.

    Args:
        layers: in their order, every weight a view of its file.
        cast: makes of a weight what is computed with.
        ahead: whether the layer that is expected next is read while one is used.
    """

    def __init__(self, layers: Sequence[nn.Module], cast: Callable[[Tensor], Tensor], ahead: bool = True) -> None:
        self._layers, self._cast = list(layers), cast
        self._files: list[tuple[Tensor, Tensor]] = []
        self._here: int | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._arrange: Callable[[int], object] | None = None
        self._last, self._step = -1, 1
        self._reader: ThreadPoolExecutor | None = None
        self._reading: Future[None] | None = None
        self._unwanted = Event()
        self.ahead = ahead
        self.read = 0
        """How many layers have come in so far."""

    @property
    def walks(self) -> float:
        """How many times the whole model has been read so far."""
        return self.read / max(1, len(self._layers))

    def begin(self) -> None:
        """Have layers come in from now on; until then, and after :meth:`end`, their weights are as they are stored."""
        if self.ahead and self._reader is None and len(self._layers) > 1:
            self._reader = ThreadPoolExecutor(1, "read-ahead")
        for number, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_pre_hook(partial(self._asked, number)))

    def end(self) -> None:
        """Have no layer in memory, and let none come in."""
        self.leave()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._reader is not None:
            self._unwanted.set()
            self._reader.shutdown(cancel_futures=True)
            self._reader = self._reading = None

    def _asked(self, number: int, module: nn.Module, args: tuple[object, ...]) -> None:
        self.enter(number)

    @contextmanager
    def arranged(self, arrange: Callable[[int], object]) -> Iterator[None]:
        """Call something with the number of every layer that comes in, which changes the layer in place; on leaving,
        layers come in as they are again."""
        self.leave()
        self._arrange = arrange
        try:
            yield
        finally:
            self._arrange = None
            self.leave()

    def enter(self, number: int) -> bool:
        """Have a layer in memory, and no other one; tell whether it has just come in."""
        if not self._hooks or number == self._here:
            return False
        self.leave()
        with torch.inference_mode(False), torch.no_grad():  # whoever asks, what comes in can be differentiated through
            for weight in self._layers[number].parameters():
                self._files.append((weight, weight.data))
                weight.data = self._cast(weight.data)
            self._files += [(buffer, buffer.data) for buffer in self._layers[number].buffers()]  # arranged with them
            self._here = number
            self.read += 1
            if self._arrange is not None:
                self._arrange(number)
        self._read_ahead(number)
        return True

    def _read_ahead(self, number: int) -> None:
        """Have the neighbour on the way that layers are asked for read, from the end the first one."""
        self._step = number - self._last if abs(number - self._last) == 1 else self._step
        self._last, expected = number, number + self._step
        if self._reader is None or expected < 0:
            return
        if self._reading is not None and not self._reading.done():  # nobody waits for a guess
            self._unwanted.set()
            self._reading.result()
        self._unwanted.clear()
        stored = [weight.data for weight in self._layers[expected % len(self._layers)].parameters()]
        self._reading = self._reader.submit(_touch, stored, self._unwanted)

    def leave(self) -> None:
        """Have no layer in memory; what somebody still holds of one stays with them."""
        for weight, stored in self._files:
            weight.data = stored
        self._files.clear()
        self._here = None


def _touch(stored: Sequence[Tensor], unwanted: Event) -> None:
    """Read a byte of every page of some tensors, until nobody wants that any more."""
    for tensor in stored:
        if not tensor.numel() or not tensor.is_contiguous():
            continue
        for part in tensor.detach().view(-1).view(torch.uint8).split(_TOGETHER):
            if unwanted.is_set():
                return
            part[::_PAGE].max()
