"""The memory that a run was allowed: held against what is foretold, before anything large is done.

What makes a run smaller at no cost to its result is done; after that what changes how it measures; and where that is
not enough either, one line says what is needed, what was allowed, and which settings lower it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from multipruner.config.recipe import Recipe
from multipruner.console.say import Say
from multipruner.core.errors import ConfigError, MemoryShortError
from multipruner.engine.objective import STATE_BYTES
from multipruner.engine.precision import name_of
from multipruner.engine.prunable import Prunable
from multipruner.sources.dense import device_of
from multipruner.storage.memory import size_text

from .count import Searched, Unwritten, shape_of, texts_for, work_of
from .memory import Sizes, peaks
from .walks import layers_on_disk, walking
from .work import Texts, Work

_LAYERS = 2
"""Layers from disk that are in memory: one, and what it is made of, or leaves of it."""
_LEAST = 64
"""Tokens and sequences below which no advice goes."""
_LOWER = 0.99
"""Of the peak: advice that does not lower it so far is none."""


def memory_of(
    recipe: Recipe, prunable: Prunable, texts: Texts, work: Mapping[str, Work], searched: Searched, item: int, *,
    idle: int, on_disk: bool,
) -> dict[str, int]:  # fmt: skip
    """Return bytes of the whole process, by stage; on a GPU, of its memory.

    Args:
        recipe: of the run.
        prunable: its model.
        texts, work, searched: what is counted of the two.
        item: bytes of a number that is computed with.
        idle: bytes that are there besides.
        on_disk: whether decoder layers stay on disk.
    """
    costs = prunable.costs
    both = costs.bytes_per_parameter if item < costs.bytes_per_parameter else 0  # what is narrowed is kept besides
    kv = costs.kv_bytes_per_token(prunable.dense) * item // costs.bytes_per_parameter
    held = costs.constant + _LAYERS * costs.backbone_parameters(prunable.dense) // prunable.anatomy.layers
    weights = held * item if on_disk else costs.parameters(prunable.dense) * (item + both)
    in_memory = recipe.moments == "memory"
    sizes = Sizes(weights, int(work["writing"].disk), item, kv, len(prunable.head_weight), STATE_BYTES, in_memory,
                  on_disk)  # fmt: skip
    options = [one for round_ in searched.rounds for one in round_] if recipe.repair_stage == "search" else []
    found = peaks(work, texts, shape_of(prunable), sizes, searched.base, options)
    return {stage: idle + size for stage, size in found.items()}


@dataclass(frozen=True)
class Allowed:
    """A bound on memory that was typed.

    Attributes:
        nbytes: of it.
        flag: that says so.
    """

    nbytes: int
    flag: str

    @classmethod
    def of(cls, recipe: Recipe) -> Allowed | None:
        """Return the bound that counts on a recipe's device, if there is one.

        Raises:
            ConfigError: when a GPU's memory is bounded, and the run is on a CPU.
        """
        cpu = device_of(recipe.device).type == "cpu"
        if cpu and recipe.max_device_memory is not None:
            raise ConfigError("--max-device-memory is of a GPU, and this run is on the CPU; give --max-host-memory")
        said = recipe.max_host_memory if cpu else recipe.max_device_memory
        return None if said is None else cls(int(said * 2**30), "--max-host-memory" if cpu else "--max-device-memory")


@dataclass(frozen=True)
class Fitting:
    """What is known when a run is to fit into memory.

    Attributes:
        prunable: the model.
        computed: type that its weights will have in memory.
        idle: bytes that the process has besides.
        walks: whether decoder layers may stay on disk, and moments too.
        copied: tells why weights are no views of their files, where some are not.
        unwritten: tells how many sequences are still to be sampled.
        stages: that will run; none: all.
    """

    prunable: Prunable
    computed: torch.dtype
    idle: int = 0
    walks: bool = True
    copied: Callable[[], Sequence[str]] = tuple
    unwritten: Unwritten | None = None
    stages: Collection[str] = ()

    def peak(self, recipe: Recipe, on_disk: bool, computed: torch.dtype | None = None) -> int:
        """Return the most bytes that a run will have at once."""
        recipe = walking(recipe) if on_disk else recipe
        texts = texts_for(recipe, self.prunable, self.unwritten)
        work, searched = work_of(recipe, self.prunable, texts)
        item = (computed or self.computed).itemsize
        found = memory_of(recipe, self.prunable, texts, work, searched, item, idle=self.idle, on_disk=on_disk)
        return max(size for stage, size in found.items() if not self.stages or stage in self.stages)

    def layers(self, recipe: Recipe) -> Sequence[nn.Module]:
        """Return the decoder layers if they can stay on disk; none otherwise, and where they shall not."""
        if recipe.offload == "none":
            return ()
        try:
            asked = recipe.model_copy(update={"offload": "disk"})
            return layers_on_disk(asked, self.prunable, self.computed, walks=self.walks, copied=self.copied)
        except ConfigError:
            return ()

    def fit(self, recipe: Recipe, layers: Sequence[nn.Module], say: Say) -> tuple[Recipe, Sequence[nn.Module]]:
        """Return a recipe that keeps to the memory that it allows, and the decoder layers that stay on disk.

        Args:
            recipe: as it was asked for.
            layers: that stay on disk anyway.
            say: told what is done to make it fit.

        Raises:
            ConfigError: when a bound is of another device.
            MemoryShortError: when nothing that may be done is enough.
        """
        allowed = Allowed.of(recipe)
        if allowed is None or (peak := self.peak(recipe, bool(layers))) <= allowed.nbytes:
            return recipe, layers
        if self.walks and not layers and recipe.moments == "memory" and "moments" not in recipe.model_fields_set:
            moved = recipe.model_copy(update={"moments": "disk"})
            if self.peak(moved, False) <= allowed.nbytes:
                say(f"moments go to disk, so that {allowed.flag} is kept: the result is the same")
                return moved, layers
        if not layers and (found := self.layers(recipe)) and self.peak(recipe, True) <= allowed.nbytes:
            say(f"decoder layers go to disk, so that {allowed.flag} is kept")
            return recipe, found
        lower = self._advice(recipe, bool(layers), peak)
        does = f"what lowers that: {', '.join(lower)}" if lower else "no setting lowers that: take a smaller model"
        raise MemoryShortError(
            f"at most {size_text(peak)} of memory are foretold, and {allowed.flag} allows {size_text(allowed.nbytes)}; "
            f"{does}"
        )

    def _advice(self, recipe: Recipe, on_disk: bool, peak: int) -> list[str]:
        """Return settings that lower the peak, each with what it leaves, the lowest first."""
        text, found = recipe.calibration, {}
        if recipe.moments == "memory" and not on_disk:
            found["--moments disk"] = self.peak(recipe.model_copy(update={"moments": "disk"}), False)
        if not on_disk and self.layers(recipe.model_copy(update={"offload": "auto"})):
            found["--offload disk"] = self.peak(recipe, True)
        for key, flag in (("moments_sequences", "--moments-sequences"), ("length", "--length")):
            if (less := getattr(text, key) // 2) >= _LEAST:
                fewer = recipe.model_copy(update={"calibration": text.model_copy(update={key: less})})
                found[f"{flag} {less}"] = self.peak(fewer, on_disk)
        for dtype in (torch.bfloat16, torch.float16):
            if self.prunable.costs.bytes_per_parameter == dtype.itemsize < self.computed.itemsize:
                found[f"--compute-dtype {name_of(dtype)}"] = self.peak(recipe, on_disk, dtype)
                break
        lower = sorted((size, flag) for flag, size in found.items() if size < _LOWER * peak)
        return [f"{flag} ({size_text(size)})" for size, flag in lower]
