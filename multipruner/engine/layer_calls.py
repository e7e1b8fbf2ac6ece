"""What decoder layers are called with, and what flows between the blocks within them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from multipruner.core.blocks import BlockSpec
from multipruner.core.families import Family
from multipruner.core.families.tasks import Run

from .cutting import replaced


class Recorder(nn.Module):
    """Stands in for a decoder layer, keeps what it was called with and hands the hidden states on."""

    def __init__(self, layer: nn.Module, output: str) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer
        self.__dict__["_output"] = output
        self.__dict__["called_with"] = {}

    def __getattr__(self, name: str) -> Any:
        # some decoders read attributes of their layers, such as the attention type
        return getattr(self.__dict__["_layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        names = [*inspect.signature(self.__dict__["_layer"].forward).parameters][1 : 1 + len(args)]
        self.called_with.update(dict(zip(names, args, strict=True)), **kwargs, hidden=hidden)
        return {"tuple": (hidden,), "pair": (hidden, None)}.get(self.__dict__["_output"], hidden)


@dataclass(frozen=True, slots=True)
class Inputs:
    """One batch, ready for the first block.

    Attributes:
        hidden: input of the first decoder layer, [sequences, length, hidden_size].
        arguments: what the stock decoder calls each layer with (masks, rotary embeddings, positions)."""

    hidden: Tensor
    arguments: tuple[dict[str, Any], ...]


def recorded(decoder: nn.Module, spec: Family, ids: Tensor) -> Inputs:
    """Embed what a model reads and record how the stock decoder calls its layers, which do not run.

    Args:
        decoder: the stock module.
        spec: its family's row.
        ids: token ids [sequences, length], or pixels [pictures, channels, height, width].
    """
    layers = cast(nn.ModuleList, decoder.get_submodule(spec.layers))
    recorders = [Recorder(layer, spec.layer_output) for layer in layers]
    with replaced(decoder, spec.layers, nn.ModuleList(recorders)):
        decoder(**{spec.task.inputs: ids}, **({"use_cache": False} if spec.task.reads_text else {}))
    arguments = tuple(dict(recorder.called_with) for recorder in recorders)
    hidden = arguments[0]["hidden"]
    for row in arguments:
        del row["hidden"]
    return Inputs(hidden, arguments)


class Beside(NamedTuple):
    """The residual stream before a block that runs beside the one before it.

    Attributes:
        now: with what all blocks before have added, [sequences, length, hidden_size].
        begin: as that one read it, which is what the block reads."""

    now: Tensor
    begin: Tensor


State = Tensor | Beside
"""The residual stream before a block: one tensor, except where blocks run side by side."""


def stream_of(state: State) -> Tensor:
    """Return the residual stream with what all blocks before have added, [sequences, length, hidden_size]."""
    return state.now if isinstance(state, Beside) else state


def read_by_next(state: State) -> Tensor:
    """Return what the next block reads of the residual stream, [sequences, length, hidden_size]."""
    return state.begin if isinstance(state, Beside) else state


def left_of(states: Tensor, kept: Tensor, basis: Tensor | None) -> Tensor:
    """Return what is left of the residual stream, [..., dimensions], of [..., hidden_size].

    Args:
        states: of the dense model.
        kept: the dimensions that stay.
        basis: that they are of, [hidden_size, dimensions]; ``None``: of the dense model's own.
    """
    return states[..., kept.to(states.device)] if basis is None else states @ basis.to(states)


def gain_of(block: BlockSpec, layer: nn.Module) -> float | Tensor:
    """Return what comes out of a block is multiplied by before it is added: one number, or [hidden_size]."""
    return attrgetter(block.gain)(layer) if block.gain else 1.0


def gained(weight: Tensor, gain: float | Tensor) -> Tensor:
    """Return an output projection, [hidden_size, columns], that gives what a block adds, its gain in it."""
    if isinstance(gain, Tensor):
        return weight * gain.detach().to(weight).reshape(-1, 1)
    return weight if gain == 1.0 else weight * gain


def ungained(added: Tensor, gain: float | Tensor) -> Tensor:
    """Return what comes out of a block, [..., hidden_size], when so much is added; where the gain is zero nothing is
    added whatever it is.
    """
    if not isinstance(gain, Tensor):
        return added if gain in (0.0, 1.0) else added / gain
    gain = gain.detach().to(added)
    return added / torch.where(gain == 0, 1.0, gain)


def read_by_head(norm: Callable[[Tensor], Tensor], hidden: Tensor, runs: Sequence[Run]) -> Tensor:
    """Return what the head multiplies, from final hidden states.

    Args:
        norm: the last norm.
        hidden: of single tokens, or, where there are runs, of whole rows: [rows, positions, hidden_size].
        runs: of positions, whose means stand side by side; see :class:`~multipruner.core.families.tasks.Task`.

    Returns:
        As many states as there were, or [rows, number of runs * hidden_size].
    """
    means = [norm(hidden[:, begin:end]).mean(dim=1) for begin, end in runs]
    return torch.cat(means, dim=-1) if means else norm(hidden)


class _Reached(Exception):
    """Ends a run at the module whose input was asked for."""


def input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return the first argument that a module is called with in a run, which ends there: what follows is not computed.

    Args:
        module: the module.
        run: calls it once, within whatever surrounds it.
    """
    seen: list[Tensor] = []

    def end(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    hook = module.register_forward_pre_hook(end)
    try:
        with suppress(_Reached):
            run()
    finally:
        hook.remove()
    return seen[0]


def handed(block: BlockSpec, hidden: Tensor) -> dict[str, Tensor]:
    """Return what a block is called with besides hidden states of this shape: in place of the residual stream nothing,
    so that it returns what it adds alone.
    """
    return {"residual": torch.zeros_like(hidden)} if block.handed else {}
