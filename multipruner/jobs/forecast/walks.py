"""Whether the layers of a model stay on disk, what that asks of a recipe, and how often a run reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

import torch
from torch import nn
from transformers import PreTrainedModel

from multipruner.config.precedence import trusts
from multipruner.config.recipe import Recipe
from multipruner.core.errors import ConfigError
from multipruner.engine.moments import BATCH_TOKENS
from multipruner.engine.precision import choose, name_of, product_rates
from multipruner.engine.prunable import Prunable
from multipruner.eval.scoring import context_length
from multipruner.sources.dense import Accounted, device_of, stored_otherwise
from multipruner.sources.resolve import ResolvedModel
from multipruner.storage.memory import check_memory, free_memory, size_text
from multipruner.stream.dense import dtype_of
from multipruner.stream.stacked import stacked_model

from .needs import sampled
from .work import Texts

_PROBES = 2
"""Passes by which a perplexity finds out what a model's head does."""
SHARE = 0.6
"""Of the memory, that weights may take: what else a run keeps has to fit, too."""


def memory_for(recipe: Recipe) -> int:
    """Return bytes that a run may take: what is free, or what was said."""
    said = recipe.max_host_memory
    return free_memory() if said is None else int(min(said * 2**30, free_memory()))


class Experts:
    """Where the experts of a mixture are: in memory, or, where a run goes over its layers on disk, in stacks there.

    Args:
        recipe: of the run.
        rates: how fast this machine multiplies (:class:`.Precision`); default: measured where it decides.
        say: told before what takes long.
        walks: whether the job at hand can do with layers on disk.
    """

    def __init__(
        self, recipe: Recipe, rates: Mapping[str, float] | None, say: Callable[[str], None], *, walks: bool
    ) -> None:
        self._recipe, self._rates, self._say, self._walks = recipe, rates, say, walks
        self._in_memory = False

    def stacked(self, found: Accounted) -> PreTrainedModel | None:
        """Return a mixture whose weights are views of files; ``None`` where it is to be in memory."""
        recipe, stored = self._recipe, dtype_of(found)
        can = self._walks and recipe.offload != "none" and recipe.dtype in ("auto", name_of(stored))
        self._in_memory = not (can and _too_large(recipe, self._size(found, stored)))
        return None if self._in_memory else stacked_model(found, trusts(recipe.trust_remote_code), self._say)

    def _size(self, found: Accounted, stored: torch.dtype) -> int:
        """Return bytes of all weights in the type that is computed in."""
        rates = self._rates or product_rates(device_of("cpu"), (stored, torch.float32))
        numbers = sum(prod(tensor.shape) for tensor in found.stored.values())
        return choose(self._recipe.compute_dtype, stored, rates).itemsize * numbers

    def copied(self, source: ResolvedModel, stored: torch.dtype) -> list[str]:
        """Return why weights are no views of their files, and the ways out."""
        others = stored_otherwise(source, name_of(stored))
        way = "is of another type in its file than it was loaded in; give no --dtype, or --offload none"
        experts = ["experts were put together in memory; give --offload disk, or none"] * self._in_memory
        return [*(f"{name} {way}" for name in others), *experts]


def _too_large(recipe: Recipe, size: int) -> bool:
    """Tell whether weights of this size are to stay on disk where they can."""
    return recipe.offload == "disk" or (recipe.offload == "auto" and size > SHARE * memory_for(recipe))


def layers_on_disk(
    recipe: Recipe,
    prunable: Prunable,
    computed: torch.dtype,
    *,
    walks: bool = True,
    copied: Callable[[], Sequence[str]] = tuple,
) -> Sequence[nn.Module]:
    """Return the decoder layers where they are to stay on disk; none where they are to be in memory.

    Args:
        recipe: of the run.
        prunable: its model, whose weights are views of their files.
        computed: type that the weights would have in memory.
        walks: whether the job at hand can do with layers on disk.
        copied: tells why weights are no such views, where some are not.

    Raises:
        ConfigError: when it is asked for and cannot be; the reason is named.
        MemoryShortError: when the weights do not fit in memory, and cannot stay on disk.
    """
    if not walks and recipe.offload == "disk":
        raise ConfigError("--offload disk: this job needs all layers in memory; give --offload none, or prune alone")
    size, free = prunable.costs.parameters(prunable.dense) * computed.itemsize, memory_for(recipe)
    if not walks or not _too_large(recipe, size):
        return ()
    reason = _hindrance(recipe, prunable, copied)
    if reason is None:
        return prunable.layers
    if recipe.offload == "disk":
        raise ConfigError(f"--offload disk: {reason}")
    if device_of(recipe.device).type == "cpu":
        check_memory("the weights", size, free)
    return ()


def _hindrance(recipe: Recipe, prunable: Prunable, copied: Callable[[], Sequence[str]]) -> str | None:
    """Return why a run cannot go over a model layer by layer, and the way out; ``None`` where it can."""
    if (device := device_of(recipe.device)).type != "cpu":
        return f"layers come from disk to the CPU alone, not to {device}; give --device cpu, or --offload none"
    if reasons := copied():
        return reasons[0]
    if recipe.greedy:
        return f"--method {recipe.method} runs the model thousands of times; give --method program"
    if recipe.hidden_size is not None:
        return "a narrower residual stream is made of weights in memory; give no --hidden-size"
    if not recipe.on_curves:
        return "tables of energies need candidates that are repaired; give --repair lstsq and --repair-stage search"
    if sampled(recipe):
        return "a model that writes text is read anew for every token of it; give --calibration FILE"
    return None


def walking(recipe: Recipe) -> Recipe:
    """Return a recipe that asks for nothing that would read the model hundreds of times, or keep what is as large."""
    return recipe.model_copy(update={"tables": "energies", "rounds": 0, "refine": 0.0, "moments": "disk"})


def together_in(prunable: Prunable, length: int) -> int:
    """Return sequences that go through the stock model together: many where each pass reads the model."""
    length = min(length, context_length(prunable.model.config))
    return max(1, BATCH_TOKENS // length) if prunable.on_disk else 1


def said(prunable: Prunable, computed: torch.dtype) -> str:
    """Return the line that says that layers are on disk."""
    size = prunable.costs.backbone_parameters(prunable.dense) * computed.itemsize
    return (
        f"decoder layers stay on disk ({size_text(size)} in {name_of(computed)}), one at a time is in memory: "
        "first tables from energies, no rounds, moments on disk"
    )


def kept_in_cache(prunable: Prunable, result: int) -> int:
    """Return bytes that a run with layers on disk keeps in the cache folder: what was cut and what was refitted, each
    as large as the result, and stacks of experts.
    """
    dense, costs = prunable.dense, prunable.costs
    routed = (block for block in range(len(dense)) if prunable.block_spec(block).routed)
    stacks = sum(costs.blocks[block](dense[block]).parameters for block in routed)
    return 2 * result + stacks * costs.bytes_per_parameter


def walks_of(recipe: Recipe, prunable: Prunable, texts: Texts) -> dict[str, int]:
    """Return how many times every stage of a run reads all layers, blocks that are measured without aside."""
    routed = prunable.spec.routes(prunable.anatomy.kinds)  # run at several sizes
    kl, sketch = recipe.objective == "kl", texts.sketched < texts.scored
    judged = _PROBES + -(-texts.evaluated // max(1, BATCH_TOKENS // texts.evaluated_length)) if texts.evaluated else 0
    read = _PROBES + 1 if "ppl" in recipe.evaluation.tasks and recipe.evaluation.text is not None else 0
    return {
        "text": _PROBES + -(-texts.scored // max(1, BATCH_TOKENS // texts.length)) + read,
        "moments": 2 + 2 * (recipe.rope_pair_step is not None),  # and for the order; that of pairs, and their errors
        # forward, backward, errors (of experts, too), the solution; and the dense model's losses
        "search": 4 + routed + (1 + kl) * (1 + sketch),
        "repair": 3 + kl + (recipe.final_norm == "refit"),
        "evaluation": judged,
    }
