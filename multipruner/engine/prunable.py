"""A stock model seen as a row of residual blocks, any of which can run at any size.

No transformers code is repeated: stock modules with leading slices of their weights, called as the stock model does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from multipruner.core.axes import PAIRS, Counts, Kept
from multipruner.core.blocks import BlockSpec
from multipruner.core.costs import Costs
from multipruner.core.families import Family, anatomy_of, spec_for
from multipruner.core.plan import Ranking
from multipruner.core.structure import Anatomy, Size, Structure
from multipruner.storage.layers_on_disk import LayersOnDisk
from multipruner.storage.tensors_on_disk import mapped

from . import layer_calls
from .coefficients import costs_of, weight_of
from .cutting import Projection, replaced, scaled_norm, silencing, slim_block, with_output
from .grouped_attention import grouped_attention
from .layer_calls import Beside, Inputs, State, handed, input_of, read_by_next, recorded, stream_of
from .values.bases import arrange
from .values.partial import PartlyRead, leading

OutputOf = Callable[[int, Size, Projection], Projection]
"""(block, size, whole output projection in ranked order) -> the projection of a block of that size."""
Outputs = dict[int, Projection]
"""Block -> an output projection, columns in ranked order."""


class Wider(NamedTuple):
    """The model that a narrower one was made of, the dimensions left, and a basis that these are of, if they are."""

    prunable: Prunable
    kept: Tensor
    basis: Tensor | None = None


@dataclass
class Prunable:
    """The pruning engine's view of a dense model.

    Attributes:
        model: the stock model, in evaluation mode.
        spec: its family's row.
        anatomy: its residual blocks, which are called by their numbers here.
        costs: what any structure costs, in the type that the weights are stored in.
        stored: that type, which the engine may compute in another than (:mod:`multipruner.precision`).
        wider: the dense model, where this one has a narrower residual stream: what it is measured against.
        on_disk: has decoder layers in memory one at a time; then what goes over the model takes all text along.
        bases: those that the values of a block's KV groups are in, within :meth:`in_order`, [groups, width, width]."""

    model: PreTrainedModel
    spec: Family
    anatomy: Anatomy
    costs: Costs
    stored: torch.dtype
    wider: Wider | None = None
    on_disk: LayersOnDisk | None = field(default=None, repr=False)
    bases: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _pairs: dict[int, Any] = field(default_factory=dict, repr=False)
    _repair: OutputOf | None = field(default=None, repr=False)
    _outputs: Outputs = field(default_factory=dict, repr=False)
    _final_norm: nn.Module | None = field(default=None, repr=False)
    _slim: dict[tuple[int, Size], nn.Module] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: Any, stored: torch.dtype | None = None, along: Collection[str] = ()) -> Prunable:
        """Look a model's family up and take its measure.

        Args:
            model: the dense model.
            stored: type of its weights on disk and in the result; default: the type that they are held in.
            along: the axes that sizes name besides those that every size does, such as ``value_dim``.

        Raises:
            UnsupportedModelError: when its family has no row, or its weights have other shapes than the row says."""
        spec, anatomy = spec_for(model.config), anatomy_of(model.config, along)
        stored = stored or weight_of(model.get_submodule(spec.head)).dtype
        return cls(model, spec, anatomy, costs_of(model, spec, anatomy, stored), stored)

    @classmethod
    def narrower(cls, model: Any, wider: Wider) -> Prunable:
        """Look at a model that was made of another one by taking dimensions out of its residual stream."""
        dense, costs = wider.prunable, wider.prunable.costs.narrowed(len(wider.kept))
        return cls(model, dense.spec, costs.anatomy, costs, dense.stored, wider)

    def keep(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is to last: as it is, or on disk where layers are."""
        return mapped(tensor) if self.on_disk else tensor

    @property
    def original(self) -> Prunable:
        """The dense model: this one, unless it has a narrower residual stream."""
        return self if self.wider is None else self.wider.prunable

    def narrowed(self, states: Tensor) -> Tensor:
        """Return what the states of the residual stream should be, of the dense model's, [..., hidden_size]."""
        return states if self.wider is None else layer_calls.left_of(states, self.wider.kept, self.wider.basis)

    @property
    def dense(self) -> Structure:
        return self.anatomy.dense

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_submodule(self.spec.decoder)

    @property
    def layers(self) -> Any:
        return self.decoder.get_submodule(self.spec.layers)

    def counts(self, block: int, size: Size | None = None) -> Counts:
        """Tell how much of every axis a block has, dense or of another size, and the constants."""
        return self.anatomy.counts(block, size)

    def block_spec(self, block: int) -> BlockSpec:
        """Return what the family's row says of a block."""
        return self.spec.block(self.anatomy[block].kind)

    def layer_of(self, block: int) -> nn.Module:
        """Return the decoder layer that a block is in; it stays in memory until another one is asked for."""
        if self.on_disk and self.on_disk.enter(self.anatomy[block].layer):
            self._slim.clear()
        return self.layers[self.anatomy[block].layer]

    def module(self, block: int) -> nn.Module:
        """Return a block's module, dense: its layer, where it is none itself."""
        return self.layer_of(block).get_submodule(self.block_spec(block).path)

    def dense_output(self, block: int) -> nn.Module:
        """Return the output projection of a block, dense."""
        return self.module(block).get_submodule(self.block_spec(block).output)

    @property
    def head(self) -> nn.Module:
        """The output projection; its logits are in the model's dtype."""
        return self.model.get_submodule(self.spec.head)

    @property
    def head_weight(self) -> Tensor:
        return weight_of(self.head)

    def as_stored(self, weight: Tensor) -> Tensor:
        """Round a weight to what the result can hold, in the type that is computed in."""
        return weight.to(self.stored).to(self.head_weight.dtype)

    def state_bytes(self, length: int) -> int:
        """Return memory for the hidden states at the input of every block, and after the last, of one sequence."""
        return (len(self.anatomy) + 1) * length * self.anatomy.constants["hidden"] * self.head_weight.element_size()

    def inputs(self, ids: Tensor) -> Inputs:
        """Embed token ids [sequences, length], or pixels, and record how the stock decoder calls its layers."""
        return recorded(self.decoder, self.spec, ids)

    def block(self, state: State, inputs: Inputs, block: int, size: Size) -> State:
        """Return the residual stream after one block of a given size, from that before it."""
        return self.after(state, self.output(state, inputs, block, size) if size else None, block)

    def after(self, state: State, output: Tensor | None, block: int) -> State:
        """Return the residual stream after a block, from what its output projection gives (``None``: it is gone)."""
        stream = stream_of(state) if output is None else stream_of(state) + self.added(output, block)
        beside = block + 1 < len(self.anatomy) and self.block_spec(block + 1).parallel
        return Beside(stream, read_by_next(state)) if beside else stream

    def output(self, state: State, inputs: Inputs, block: int, size: Size) -> Tensor:
        """Return what the output projection of a block of a given size gives, or what its experts do."""
        spec, normed, module = self.block_spec(block), self.read_by(state, block), self._slimmed(block, size)
        if spec.steps:
            output = reduce(lambda x, step: getattr(module, step)(x), spec.steps, normed)
        elif not spec.arguments:
            output = module(normed, **handed(spec, normed))
        else:
            with grouped_attention(module, self.model):
                arguments = {**handed(spec, normed), **inputs.arguments[self.anatomy[block].layer]}
                output = module(hidden_states=normed, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def read_by(self, state: State, block: int) -> Tensor:
        """Return what the input projections of a block are multiplied with: the residual stream, normed if at all."""
        before, hidden = self.block_spec(block).before, read_by_next(state)
        return self.layer_of(block).get_submodule(before)(hidden) if before else hidden

    def added(self, output: Tensor, block: int) -> Tensor:
        """Return what a block adds to the residual stream, from what comes out of its output projection."""
        spec, layer = self.block_spec(block), self.layer_of(block)
        output = layer.get_submodule(spec.after)(output) if spec.after else output
        return output * layer_calls.gain_of(spec, layer) if spec.gain else output

    def output_of(self, block: int, size: Size) -> nn.Module:
        """Return the output projection of a block of a given size."""
        return self._slimmed(block, size).get_submodule(self.block_spec(block).output)

    def output_input(self, state: State, inputs: Inputs, block: int, size: Size) -> Tensor:
        """Return the inputs of the output projection of a block of a given size, [sequences, length, columns]."""
        output = self.output_of(block, size)
        x = input_of(output, lambda: self.output(state, inputs, block, size))
        return output.read(x) if isinstance(output, PartlyRead) else x

    def normed(self, hidden: Tensor) -> Tensor:
        """Return what the head multiplies, of final hidden states (:func:`.read_by_head`), scaled as the logits are."""
        spec, norm = self.spec, self._final_norm or self.decoder.get_submodule(self.spec.final_norm)
        normed, scale = layer_calls.read_by_head(norm, hidden, spec.task.pooled), spec.logit_scale(self.model.config)
        return normed if scale == 1.0 else normed * scale

    @property
    def cap(self) -> float | None:
        """What a tanh keeps the logits within, where one does."""
        return getattr(self.model.config, self.spec.head_cap) if self.spec.head_cap else None

    def _slimmed(self, block: int, size: Size) -> nn.Module:
        spec, module, key = self.block_spec(block), self.module(block), (block, size)
        if size == self.anatomy[block].dense and self._outputs.get(block) is None:
            return module
        if key not in self._slim:
            if len(self._slim) >= 2 * len(self.anatomy):
                self._slim.clear()  # views cost nothing, but slices of fused projections and parts of groups are copies
            kept = leading(self.counts(block, size), self._pairs.get(block, ()))
            slim = slim_block(module, spec, kept, self.counts(block))
            self._slim[key] = self._refitted(slim, block, size) if spec.output else slim
        return self._slim[key]

    def _refitted(self, slim: nn.Module, block: int, size: Size) -> nn.Module:
        """Return a smaller block with the output projection that it is to have, where that is not its own."""
        spec, fixed = self.block_spec(block), self._outputs.get(block)
        own = Projection.of(slim.get_submodule(spec.output), spec.transposed)
        if fixed is not None and fixed.weight.shape == own.weight.shape:
            return with_output(slim, spec, fixed)
        if self._repair is None or size == self.anatomy[block].dense:
            return slim
        dense = Projection.of(self.dense_output(block), spec.transposed)
        return with_output(slim, spec, self._repair(block, size, dense))

    @contextmanager
    def applied(self, structure: Structure) -> Iterator[None]:
        """Make the stock model itself compute a structure, for reference; undone on leaving."""
        with ExitStack() as stack:
            if self._final_norm is not None:
                stack.enter_context(replaced(self.decoder, self.spec.final_norm, self._final_norm))
            for number, size in enumerate(structure):
                spec, slim = self.block_spec(number), self._slimmed(number, size) if size else None
                if slim is not None:
                    for path in spec.modules:
                        own = slim.get_submodule(path) if spec.steps else slim
                        stack.enter_context(replaced(self.layer_of(number), path, own))
                else:
                    silent = self.layer_of(number).get_submodule(spec.gives).register_forward_hook(silencing(spec))
                    stack.callback(silent.remove)
            yield

    @contextmanager
    def in_order(self, ranking: Ranking, repair: OutputOf | None = None) -> Iterator[None]:
        """Reorder units by a ranking, so that every size is a leading slice (of every leading unit, for units within
        others), values in their bases, pairs in their places; undone on leaving. A repair gives narrowed outputs."""
        orders = [dict(ranking.all_of(number, place.kind)) for number, place in enumerate(self.anatomy)]
        with ExitStack() as stack:
            stack.callback(lambda: (self._slim.clear(), self._pairs.clear()))
            self._pairs |= {block: order.pop(PAIRS) for block, order in enumerate(orders) if PAIRS in order}
            if self.on_disk is not None:
                stack.enter_context(self.on_disk.arranged(partial(self._arrange, orders)))
            else:
                for layer in range(self.anatomy.layers):
                    stack.callback(self._arrange(orders, layer))
            self._repair = repair
            stack.callback(setattr, self, "_repair", None)
            yield

    def _arrange(self, orders: Sequence[Kept], layer: int) -> Callable[[], object]:
        undo = [arrange(self.module(block), self.block_spec(block), orders[block], self.counts(block),
                        self.bases.get(block)) for block in self.anatomy.of_layer(layer)]  # fmt: skip
        return lambda: [back() for back in undo]

    @contextmanager
    def with_outputs(self, outputs: Outputs, gain: Tensor | None = None) -> Iterator[None]:
        """Give blocks of matching width other output projections (inside :meth:`in_order`); undone on leaving. They
        belong to the sizes that they were made for: two groups of one query head are as wide as one of two.

        Args:
            outputs: the projections.
            gain: that the last norm's output is multiplied by, [hidden_size]."""
        self._slim.clear()
        self._outputs = outputs
        if gain is not None:
            norm, spec = self.decoder.get_submodule(self.spec.final_norm), self.spec
            self._final_norm = scaled_norm(norm, gain, spec.norm_offset)
        try:
            yield
        finally:
            self._outputs, self._final_norm = {}, None
            self._slim.clear()
