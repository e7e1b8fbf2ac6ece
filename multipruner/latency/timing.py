"""Wall-clock times of whole models: one forward pass of a workload, robustly, models in alternation."""

from __future__ import annotations

import gc
import inspect
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from multipruner.checkpoint.classes import family_of
from multipruner.core.families import spec_for
from multipruner.core.latency_table import Workload

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
        """Between two points; on CUDA only after :meth:`wait`."""
        return start.elapsed_time(end) if self._cuda else 1e3 * (end - start)


class Runner:
    """One model, ready to run a workload again and again.

    Prompts are random token ids (time does not depend on them). Prefill fills a cache and computes the logits of the
    last token alone, as generation does; a decoding step appends to the cache of the steps before it.

    Args:
        model: any causal language model of transformers.
        workload: what to run.
    """

    def __init__(self, model: PreTrainedModel, workload: Workload) -> None:
        self.clock = Clock(model.device)
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
        self._steps = REFILL

    def prepare(self) -> None:
        """What must not be timed: the cache of a decoding step is filled when it is due."""
        if self._workload.phase == "decode" and self._steps >= REFILL:
            self._cache = None  # the old one goes before a new one comes
            self._cache = self._model(input_ids=self._ids, use_cache=True, **self._arguments).past_key_values
            self._steps = 0

    def forward(self) -> None:
        """The pass itself; on CUDA it may still be running on return."""
        if self._workload.phase == "prefill":
            self._model(input_ids=self._ids, use_cache=True, **self._arguments)
        else:
            last = self._ids[:, -1:]
            self._model(input_ids=last, past_key_values=self._cache, use_cache=True, **self._arguments)
            self._steps += 1

    def sample(self) -> float:
        """Milliseconds of one pass."""
        self.prepare()
        self.clock.wait()
        start = self.clock.now()
        self.forward()
        end = self.clock.now()
        self.clock.wait()
        return self.clock.milliseconds(start, end)


@contextmanager
def quiet_process() -> Iterator[None]:
    """Without gradients, and without a garbage collection in the middle of a sample."""
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
        model: any causal language model of transformers.
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
    """The samples of :func:`time_side_by_side`: the n-th of every model were taken one after the other."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    with quiet_process():
        runners = {name: Runner(model, workload) for name, model in models.items()}
        for runner in runners.values():
            for _ in range(warmup):
                runner.sample()
        for number in range(rounds):
            names = list(runners)
            for name in names if number % 2 == 0 else reversed(names):
                samples[name].append(runners[name].sample())
    return samples


def compile_blocks(model: PreTrainedModel) -> None:
    """Compile every attention and MLP block by itself (regional compilation); they stay compiled.

    Args:
        model: of a family that has a row, dense or pruned.

    Raises:
        UnsupportedModelError: when it has none.
    """
    spec = family_of(model.config) or spec_for(model.config)
    for layer in model.get_submodule(f"{spec.decoder}.{spec.layers}").children():
        for block in (spec.attention, spec.mlp):
            module = layer.get_submodule(block.path)
            if any(True for _ in module.parameters()):  # nothing to gain where a block was removed
                module.compile()


@contextmanager
def room_for_sizes(compiled: bool) -> Iterator[None]:
    """Within, every block size is compiled: beyond 8 variants of a module, dynamo silently stops compiling it."""
    if not compiled:
        yield
        return
    from torch._dynamo import config

    with config.patch(recompile_limit=1024, accumulated_recompile_limit=4096):  # pyright: ignore[reportAttributeAccessIssue]
        yield


def device_name(device: torch.device) -> str:
    """What the hardware calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        facts: dict[str, str] = {}
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
        if "model name" in facts:
            ids = [facts[key] for key in ("cpu family", "model") if key in facts]
            return f"{facts['model name']} ({'/'.join(ids)})" if ids else facts["model name"]
    return platform.processor() or platform.machine()


def environment_of(model: PreTrainedModel, *, compiled: bool = False) -> dict[str, Any]:
    """Machine, software and settings that a model's times depend on, as latency tables record them."""
    device = model.device
    return {
        "device": device.type,
        "device_name": device_name(device),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attn_implementation": str(model.config._attn_implementation),
        "compiled": compiled,
        "torch": version("torch"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "transformers": version("transformers"),
        "platform": platform.platform(terse=True),
    }


class Probe:
    """Time marks at the borders of a model's residual blocks, set while it runs its own forward pass.

    A block reaches from the call of its norm to the call of the next block's norm, so its residual addition and what
    the decoder does between layers count, and all blocks and the rest make up the whole pass.

    Args:
        norms: the norm of every block in the order of the forward pass, then the final norm.
        clock: of the model's device.
    """

    def __init__(self, norms: Sequence[nn.Module], clock: Clock) -> None:
        self._norms, self._clock, self._marks = norms, clock, []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within, every forward pass leaves its marks."""
        handles = [norm.register_forward_pre_hook(self._mark) for norm in self._norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _mark(self, module: nn.Module, arguments: Any) -> None:
        self._marks.append(self._clock.now())

    def sample(self, runner: Runner) -> tuple[float, list[float]]:
        """Milliseconds of one whole pass, and of each of its blocks."""
        runner.prepare()
        self._clock.wait()
        self._marks = [self._clock.now()]
        runner.forward()
        self._marks.append(self._clock.now())
        self._clock.wait()
        start, *borders, end = self._marks
        assert len(borders) == len(self._norms), "a norm was not called exactly once"
        pairs = pairwise(borders)
        return self._clock.milliseconds(start, end), [self._clock.milliseconds(a, b) for a, b in pairs]
