"""Wall-clock times of whole models: one forward pass of a workload, robustly, models in alternation."""

from __future__ import annotations

import gc
import inspect
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from multipruner.checkpoint.classes import spec_of
from multipruner.core.families import cache_argument
from multipruner.core.latency_table import Workload

from .clock import Clock
from .summarise import relative_iqr

REFILL = 16
"""Decoding steps before the cache, which grows by one token each, is filled anew: about its nominal length."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds of one forward pass.

    Attributes:
        median_ms: the median of all samples.
        spread: their interquartile range, relative to the median.
        best_ms: the least sample: what is left of it when others use the machine too.
        samples: how many there were.
    """

    median_ms: float
    spread: float
    best_ms: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """Summarise samples, in milliseconds."""
        return cls(statistics.median(samples), relative_iqr(samples), min(samples), len(samples))


class Runner:
    """One model, ready to run a workload again and again.

    Args:
        model: any causal language model of transformers; for pictures, an image classifier of a family that has a row.
        workload: what to run.
    """

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        self.clock = Clock(model.device)
        self._pass: _Pass = _PASSES[workload.phase](model, workload)

    def prepare(self) -> None:
        """Do what must not be timed."""
        self._pass.prepare()

    def forward(self) -> None:
        """Run the pass itself; on CUDA it may still be running on return."""
        self._pass.forward()

    def sample(self) -> float:
        """Return milliseconds of one pass."""
        self.prepare()
        self.clock.wait()
        start = self.clock.now()
        self.forward()
        end = self.clock.now()
        self.clock.wait()
        return self.clock.milliseconds(start, end)


class _Pass(Protocol):
    """One forward pass, again and again."""

    def prepare(self) -> None: ...
    def forward(self) -> None: ...


class _Text:
    """Prompts of random token ids (time does not depend on them). Prefill fills a cache and computes the logits of the
    last token alone, as generation does; a decoding step appends to the cache of the steps before it.
    """

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        self._model, self._workload = model, workload
        length = workload.tokens
        if workload.phase == "decode":
            length = max(length - REFILL // 2, 1)
        vocabulary = int(model.config.vocab_size)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, vocabulary, (workload.batch, length), generator=generator)
        self._ids = ids.to(model.device)
        takes = inspect.signature(model.forward).parameters
        self._arguments: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._cache: Any = None
        self._cache_name = cache_argument(model)
        self._steps = REFILL

    def prepare(self) -> None:
        """Do what must not be timed: the cache of a decoding step is filled when it is due."""
        if self._workload.phase == "decode" and self._steps >= REFILL:
            self._cache = None  # the old one goes before a new one comes
            filled = self._model(input_ids=self._ids, use_cache=True, **self._arguments)
            self._cache = getattr(filled, self._cache_name)
            self._steps = 0

    def forward(self) -> None:
        """Run the pass itself; on CUDA it may still be running on return."""
        if self._workload.phase == "prefill":
            self._model(input_ids=self._ids, use_cache=True, **self._arguments)
        else:
            last = self._ids[:, -1:]
            self._model(input_ids=last, use_cache=True, **{self._cache_name: self._cache}, **self._arguments)
            self._steps += 1


class _Pictures:
    """Square pictures of noise."""

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        spec, side = spec_of(model.config), workload.tokens
        shape = (workload.batch, spec.part_of(model.config).num_channels, side, side)
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        self._model, self._arguments = model, {spec.task.inputs: pixels.to(model.device, model.dtype)}

    def prepare(self) -> None:
        """Do nothing: nothing is kept from pass to pass."""

    def forward(self) -> None:
        """Run the pass itself."""
        self._model(**self._arguments)


_PASSES: Mapping[str, Callable[[PreTrainedModel, Workload], _Pass]] = {
    "prefill": _Text, "decode": _Text, "pictures": _Pictures,
}  # fmt: skip


@contextmanager
def quiet_process() -> Iterator[None]:
    """Run without gradients, and without a garbage collection in the middle of a sample."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.inference_mode():
            yield
    finally:
        if collecting:
            gc.enable()


def time_model(model: PreTrainedModel, workload: Workload, *, rounds: int = 20, warmup: int = 3) -> Timing:
    """Time one model on a workload, on its own device.

    Args:
        model: see :class:`Runner`.
        workload: what to run.
        rounds: samples to take.
        warmup: passes before the first sample.
    """
    return time_side_by_side({"model": model}, workload, rounds=rounds, warmup=warmup)["model"]


def time_side_by_side(
    models: Mapping[str, PreTrainedModel], workload: Workload, *, rounds: int = 20, warmup: int = 3
) -> dict[str, Timing]:
    """Time several models in alternation, so that a drift of the machine's speed hits all alike.

    Args:
        models: by name.
        workload: what to run.
        rounds: samples per model; the order is turned round with every round.
        warmup: passes per model before the first sample.
    """
    samples = side_by_side_samples(models, workload, rounds=rounds, warmup=warmup)
    return {name: Timing.of(values) for name, values in samples.items()}


def side_by_side_samples(
    models: Mapping[str, PreTrainedModel], workload: Workload, *, rounds: int = 20, warmup: int = 3
) -> dict[str, list[float]]:
    """Return the samples of :func:`time_side_by_side`: the n-th of every model were taken one after the other."""
    with quiet_process():
        runners = {name: Runner(model, workload) for name, model in models.items()}
        return alternating({name: runner.sample for name, runner in runners.items()}, rounds, warmup)


def alternating(samples: Mapping[str, Callable[[], float]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Return samples of several models in alternation, so that a drift of the machine's speed hits all alike.

    Args:
        samples: by name, what takes one.
        rounds: how many each; the order is turned round with every round.
        warmup: how many each before, which do not count.
    """
    found: dict[str, list[float]] = {name: [] for name in samples}
    for number in range(-warmup, rounds):
        for name in list(samples) if number % 2 == 0 else reversed(list(samples)):
            value = samples[name]()
            if number >= 0:
                found[name].append(value)
    return found


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile every attention and MLP block by itself (regional compilation); they stay compiled.

    Args:
        model: of a family that has a row, dense or pruned.

    Raises:
        UnsupportedModelError: when it has none.
    """
    spec = spec_of(model.config)
    for layer in model.get_submodule(f"{spec.decoder}.{spec.layers}").children():
        for path in (path for block in spec.blocks for path in block.modules):
            module = layer.get_submodule(path)
            if any(True for _ in module.parameters()):  # nothing to gain where a block was removed
                module.compile()


@contextmanager
def room_for_sizes(compiled: bool) -> Iterator[None]:
    """Let every block size be compiled, within: beyond 8 variants of a module, dynamo silently stops."""
    if not compiled:
        yield
        return
    from torch._dynamo import config

    with config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):  # pyright: ignore[reportAttributeAccessIssue]
        yield
