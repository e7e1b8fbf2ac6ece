"""The residual stream in another basis, before its last dimensions leave.

An RMS norm divides by the length of what it norms, which no rotation changes. So with its gain in the matrices that
read it, embeddings ``E Q``, readers ``W diag(g) Q`` and writers ``Q^T W`` give the same logits for every orthogonal Q
(SliceGPT, arXiv 2401.15024, section 3), and which directions leave is free. That takes a head of its own, as the last
gain goes into it; norms that do nothing but scale; and none of them behind a block, where its gain acts on the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from multipruner.core.axes import STREAM
from multipruner.core.blocks import BlockSpec
from multipruner.engine.cutting import gains_of, without_gain
from multipruner.engine.layer_calls import gain_of
from multipruner.engine.prunable import Prunable

_HIDDEN = STREAM.axes[0].name
_CENTRES = "does more than scale what it norms, as layer norms do, which take the mean away"
_TOLERANCE = 0.02
"""Of what a norm gives, that may be no multiple of its input: bfloat16 rounds to 0.4 %."""


@torch.no_grad()
def hindrance(prunable: Prunable) -> str | None:
    """Return why a model's residual stream cannot be turned, as a part of a sentence; ``None`` where it can be.

    Args:
        prunable: the dense model.
    """
    spec, hidden = prunable.spec, prunable.anatomy.constants[_HIDDEN]
    if is_tied(prunable):
        return "its head is its embeddings, and the gain of the last norm cannot go into one without the other"
    for number in range(len(prunable.anatomy)):
        block, layer = prunable.block_spec(number), prunable.layer_of(number)
        if block.after or not block.before:
            return f"its blocks have a norm behind them ({block.after}), whose gain acts on the stream as it lies"
        if isinstance(gain_of(block, layer), Tensor):
            return f"{block.gain} scales every dimension of the stream by itself"
        if (reason := _unread(block, layer, hidden)) is not None:
            return reason
        if not _only_scales(layer.get_submodule(block.before), hidden, spec.norm_offset):
            return f"{block.before} {_CENTRES}"
    if not _only_scales(prunable.decoder.get_submodule(spec.final_norm), hidden, spec.norm_offset):
        return f"{spec.final_norm} {_CENTRES}"
    known = {f"{spec.decoder}.{spec.layers}.", f"{spec.decoder}.{spec.final_norm}.", f"{spec.head}.",
             f"{spec.decoder}.{spec.embeddings}."}  # fmt: skip
    others = (name for name, tensor in prunable.model.named_parameters()
              if hidden in tensor.shape and not name.startswith(tuple(known)))  # fmt: skip
    return next((f"{name} may lie along the stream" for name in others), None)


def is_tied(prunable: Prunable) -> bool:
    """Tell whether head and embeddings of a model are one matrix."""
    return prunable.head_weight.data_ptr() == _embeddings(prunable).weight.data_ptr()


def _embeddings(prunable: Prunable) -> Any:
    return prunable.decoder.get_submodule(prunable.spec.embeddings)


def _unread(block: BlockSpec, layer: nn.Module, hidden: int) -> str | None:
    """Return which tensor of a block's module is as long as the stream without the row saying how it lies."""
    told = {tensor.path: tensor.dims for tensor in block.tensors}
    for name, tensor in layer.get_submodule(block.path).named_parameters():
        dims = told.get(name)
        if dims is None and hidden in tensor.shape:
            return f"{name} may lie along the stream"
        if any(_HIDDEN in layout.names and layout.text != _HIDDEN for layout in dims or ()):
            return f"{name} has the stream beside something else"
    return None


def _only_scales(norm: nn.Module, hidden: int, offset: float) -> bool:
    """Tell whether a norm of so many numbers gives a multiple of them, times its gain: tried on some whose mean is not
    zero.
    """
    if {name for name, _ in norm.named_parameters()} - {"weight"}:
        return False
    like = next(norm.parameters(), torch.zeros(0))
    noise = torch.randn(4, hidden, generator=torch.Generator().manual_seed(0))
    given = (1 + noise).to(like.device, like.dtype)
    plain, wanted = without_gain(norm, offset)(given).double(), given.double()
    factor = (plain * wanted).sum(dim=1, keepdim=True) / wanted.square().sum(dim=1, keepdim=True)
    return float((plain - factor * wanted).norm() / plain.norm()) < _TOLERANCE


@torch.no_grad()
def write_turned(prunable: Prunable) -> None:
    """Have a model read and write the stream in the basis that its dimensions are of, in place; gains become 1.

    Products are taken in float32 and rounded once, to what the result can hold.

    Args:
        prunable: the narrower model, as it was cut, its matrices of other dimensions; the dense one is untouched.
    """
    assert prunable.wider is not None and prunable.wider.basis is not None, "it has a basis of its own"
    spec, source, basis = prunable.spec, prunable.original, prunable.wider.basis
    for number in range(len(prunable.anatomy)):
        block, layers = prunable.block_spec(number), (source.layer_of(number), prunable.layer_of(number))
        old, new = (dict(of.module(number).named_parameters()) for of in (source, prunable))
        gain = gains_of(layers[0].get_submodule(block.before), spec.norm_offset)
        for path, side, reads in _along(block):
            if path in old:
                told = old[path].float().movedim(side, -1)
                turned = (told * gain if reads else told) @ basis.to(told)
                new[path].copy_(prunable.as_stored(turned.movedim(-1, side)))
        _fill(layers[1].get_submodule(block.before), spec.norm_offset)
    gain = gains_of(source.decoder.get_submodule(spec.final_norm), spec.norm_offset)
    _fill(prunable.decoder.get_submodule(spec.final_norm), spec.norm_offset)
    scale = (len(basis) / basis.shape[1]) ** 0.5 if spec.embeddings_scaled else 1.0
    for weight, told in ((_embeddings(prunable).weight, _embeddings(source).weight.float() * scale),
                         (prunable.head_weight, source.head_weight.float() * gain)):  # fmt: skip
        weight.copy_(prunable.as_stored(told @ basis.to(told)))


def _fill(norm: nn.Module, offset: float) -> None:
    for parameter in norm.parameters(recurse=False):
        parameter.fill_(1.0 - offset)


def _along(block: BlockSpec) -> Iterator[tuple[str, int, bool]]:
    """Yield the tensors of a block that lie along the stream: path, side, whether it reads it rather than writes."""
    last = [tensor.path for tensor in block.tensors if len(tensor.dims) == 3][-1:] if block.routed else []
    writers = tuple(f"{block.output}." if block.output else path for path in (last or [""]))
    for tensor in block.tensors:
        for side, layout in enumerate(tensor.dims):
            if _HIDDEN in layout.names:
                yield tensor.path, side, not tensor.path.startswith(writers)
