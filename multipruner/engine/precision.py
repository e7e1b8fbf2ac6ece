"""The type that the engine computes in: the one that this machine multiplies fastest.

Weights keep their type on disk and in the result. bfloat16 halves their size everywhere, but a processor without
instructions for it multiplies it several times more slowly than float32. So matrices of both types are multiplied for
some milliseconds, and where float32 wins the weights are widened for as long as the engine computes with them. Every
bfloat16 and float16 number is a float32 number too, so nothing is lost on the way back.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from multipruner.core.errors import ConfigError
from multipruner.storage.layers_on_disk import LayersOnDisk

AUTO = "auto"
TYPES = (torch.bfloat16, torch.float16, torch.float32)
GAIN = 1.2
"""How many times faster float32 must be than the stored type: it takes twice the memory."""
_SIZES = {"cpu": (256, 1024)}
"""Rows, and width, of the matrices that are multiplied for the measurement."""
_SIZES_ELSEWHERE = (4096, 4096)
_REPEATS = 3


def name_of(dtype: torch.dtype) -> str:
    """Name a type without the library: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def product_rates(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> dict[str, float]:
    """Measure how fast a device multiplies matrices: the best of a few products of each type, taken in turn.

    Args:
        device: to measure.
        dtypes: of the matrices.

    Returns:
        name of the type -> 10^9 floating-point operations per second.
    """
    rows, width = _SIZES.get(device.type, _SIZES_ELSEWHERE)
    pairs = {
        dtype: (
            torch.ones(rows, width, dtype=dtype, device=device),
            torch.ones(width, width, dtype=dtype, device=device),
        )
        for dtype in dtypes
    }
    best = dict.fromkeys(dtypes, float("inf"))
    with torch.inference_mode():
        for repeat in range(1 + _REPEATS):  # the first pays for what the library sets up
            for dtype, (left, right) in pairs.items():
                began = time.perf_counter()
                torch.mm(left, right.T)
                if device.type != "cpu":
                    torch.accelerator.synchronize(device)
                if repeat:
                    best[dtype] = min(best[dtype], time.perf_counter() - began)
    return {name_of(dtype): 2 * rows * width**2 / seconds / 1e9 for dtype, seconds in best.items()}


def choose(asked: str, stored: torch.dtype, rates: Mapping[str, float]) -> torch.dtype:
    """Choose the type to compute in.

    Args:
        asked: ``auto``, or a type by its name, which then is the choice.
        stored: of the checkpoint's weights.
        rates: by type, as :func:`product_rates` gives them.

    Returns:
        For ``auto`` float32 where it is ``GAIN`` times as fast as the stored type, the stored type otherwise.
    """
    if asked != AUTO:
        return getattr(torch, asked)
    known = rates.get("float32", 0.0), rates.get(name_of(stored), float("inf"))
    return torch.float32 if known[0] > GAIN * known[1] else stored


@dataclass
class Precision:
    """How one model's weights are held while it computes, and how they are stored.

    Attributes:
        stored: type of most of the checkpoint's weights, and of the result's.
        computed: type that the engine computes in.
        rates: what decided, by type; empty where nothing had to be measured.
    """

    stored: torch.dtype
    computed: torch.dtype
    rates: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, asked: str = AUTO, rates: Mapping[str, float] | None = None) -> Precision:
        """Decide for a model as it was loaded.

        Args:
            model: its weights as they are stored.
            asked: see :func:`choose`.
            rates: measured before, such as by another process of the job; default: measured now, where they decide.
        """
        weight = _main_weight(model)
        stored = weight.dtype
        if asked == AUTO and rates is None:
            rates = product_rates(weight.device, (stored, torch.float32)) if stored != torch.float32 else {}
        return cls(stored, choose(asked, stored, rates or {}), dict(rates or {}))

    def line(self) -> str:
        """Say what is computed in, and why, in one line."""
        if self.computed == self.stored:
            what = f"computing in {name_of(self.computed)}, as the weights are stored"
        else:
            what = (
                f"computing in {name_of(self.computed)}; the weights are stored, and written, in {name_of(self.stored)}"
            )
        rates = [f"{name} {rate:,.0f}" for name, rate in self.rates.items()]
        return f"{what} (GFLOP/s here: {', '.join(rates)})" if len(rates) > 1 else what

    def to_json(self) -> dict[str, object]:
        """Return what a report says of it."""
        rates = {name: round(rate, 1) for name, rate in self.rates.items()}
        return {"computed": name_of(self.computed), "stored": name_of(self.stored), "gflops": rates}

    def held(self, model: nn.Module, layers: Sequence[nn.Module] = ()) -> Held:
        """Hold a model's weights in the type that is computed in, from now on (see :class:`Held`)."""
        return Held(model, self.stored, self.computed, layers)

    @contextmanager
    def computing(self, model: nn.Module, layers: Sequence[nn.Module] = ()) -> Iterator[Held]:
        """Hold a model's weights in the type that is computed in; as they were on leaving."""
        held = self.held(model, layers)
        try:
            yield held
        finally:
            held.release()


class Held:
    """A model whose weights are held in another type than they are stored in; buffers stay as they are.

    Args:
        model: changed in place.
        stored: weights of this type are cast, weights of another (norms that a checkpoint has in float32) stay.
        computed: what they are cast to. Where that is the narrower type, the weights themselves are kept beside it.
        layers: those of the model that are to be in memory one at a time (:class:`.LayersOnDisk`); none: all are.

    Attributes:
        on_disk: has these layers in memory.
    """

    def __init__(
        self, model: nn.Module, stored: torch.dtype, computed: torch.dtype, layers: Sequence[nn.Module] = ()
    ) -> None:
        self._model, self._stored, self._computed = model, stored, computed
        self.on_disk = LayersOnDisk(layers, self._as_computed) if layers else None
        alone = {id(weight) for layer in layers for weight in layer.parameters()}
        weights = [(name, weight) for name, weight in model.named_parameters() if id(weight) not in alone]
        self._cast = {name for name, weight in weights if weight.dtype == stored != computed}
        self._kept: dict[str, Tensor] = {}
        self._hold()

    def _as_computed(self, weight: Tensor) -> Tensor:
        return weight.to(self._computed) if weight.dtype == self._stored else weight

    def _hold(self) -> None:
        if self.on_disk is not None:
            self.on_disk.begin()
        narrower = self._computed.itemsize < self._stored.itemsize or {self._computed, self._stored} == _HALVES
        for name, weight in self._model.named_parameters():
            if name in self._cast:
                if narrower:
                    self._kept[name] = weight.data
                weight.data = weight.data.to(self._computed)

    def release(self) -> None:
        """Give the weights their stored type back: the very numbers that the model was loaded with."""
        if self.on_disk is not None:
            self.on_disk.end()
        for name, weight in self._model.named_parameters():
            if name in self._cast:
                weight.data = self._kept.pop(name) if name in self._kept else weight.data.to(self._stored)

    @contextmanager
    def released(self) -> Iterator[None]:
        """Have the model as it is stored; held again on leaving."""
        self.release()
        try:
            yield
        finally:
            self._hold()


@dataclass(frozen=True)
class Together:
    """Two models whose weights are held in the type that is computed in.

    Attributes:
        dense, narrower: what holds them.
    """

    dense: Held
    narrower: Held

    @contextmanager
    def released(self) -> Iterator[None]:
        """Have both models as they are stored; held again on leaving."""
        with self.dense.released(), self.narrower.released():
            yield


_HALVES = {torch.bfloat16, torch.float16}


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast all parameters, in place, and nothing else.

    ``model.to(dtype)`` would round the rotary frequencies, which are float32 in any checkpoint.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _main_weight(model: nn.Module) -> Tensor:
    """Return the largest weight: its type is the checkpoint's, whatever single norms have.

    Raises:
        ConfigError: for a model without weights.
    """
    weights = list(model.parameters())
    if not weights:
        raise ConfigError("the model has no weights")
    return max(weights, key=Tensor.numel)
