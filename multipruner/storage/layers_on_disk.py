"""Layers of a model whose weights stay in their files: one is in memory at a time, as long as it is used.

A weight that was loaded as it is stored is a view of its file, mapped: it takes no memory that the system could not
take back at once. What takes memory is a layer that is computed with, in the type that is computed in, its units in
another order. So a layer comes in when something asks for it, and goes when something asks for another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class LayersOnDisk:
    """The layers of a model, of which one at most is in memory.

    The forward pass of a layer asks for it by itself, so that the stock model runs as ever; what runs parts of a layer
    calls :meth:`enter` before.

    Args:
        layers: in their order, every weight a view of its file.
        cast: makes of a weight what is computed with.
    """

    def __init__(self, layers: Sequence[nn.Module], cast: Callable[[Tensor], Tensor]) -> None:
        self._layers, self._cast = list(layers), cast
        self._files: list[tuple[nn.Parameter, Tensor]] = []
        self._here: int | None = None
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._arrange: Callable[[int], None] | None = None
        self.read = 0
        """How many layers have come in so far."""

    @property
    def walks(self) -> float:
        """How many times the whole model has been read so far."""
        return self.read / max(1, len(self._layers))

    def begin(self) -> None:
        """Have layers come in from now on; until then, and after :meth:`end`, their weights are as they are stored."""
        for number, layer in enumerate(self._layers):
            self._hooks.append(layer.register_forward_pre_hook(partial(self._asked, number)))

    def end(self) -> None:
        """Have no layer in memory, and let none come in."""
        self.leave()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _asked(self, number: int, module: nn.Module, args: tuple[object, ...]) -> None:
        self.enter(number)

    @contextmanager
    def arranged(self, arrange: Callable[[int], None]) -> Iterator[None]:
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
            self._here = number
            self.read += 1
            if self._arrange is not None:
                self._arrange(number)
        return True

    def leave(self) -> None:
        """Have no layer in memory; what somebody still holds of one stays with them."""
        for weight, stored in self._files:
            weight.data = stored
        self._files.clear()
        self._here = None
