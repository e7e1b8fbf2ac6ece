"""Repair of a model whose residual stream has lost dimensions, first block to last, on its own stream.

With h the dense model's stream, S the dimensions that stay, h' the stream of the narrower model and n, n' the norms:

- A norm over fewer dimensions divides by another mean of squares; its gain is multiplied by
  ``c = sqrt(E[|n(h)_S|^2 / |n'(h')|^2])``. Where the stream is what it was, that is the root of the mean of squares of
  what stays over that of all.
- Every input projection W becomes ``argmin_W' E|W n(h) - W' c n'(h')|^2 + r |W' - W_S|^2``: what stays of the stream
  tells, as far as it can, what left (linear regression, as in SliceGPT's projection, arXiv 2401.15024, section 3).
- Every output projection is refitted to lead back to ``h_S``, as in :mod:`.stream`.

- A head that is a matrix of its own is refitted as input projections are.

Where the stream was turned (:mod:`.rotation`), ``h_S`` is made of the directions that stay, and norms are compared
without gains. Closed form, nothing is added to the model. Embeddings stay as they are, and so does a head that is them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multipruner.engine.cutting import Projection, gains_of, scaled_norm, without_gain
from multipruner.engine.layer_calls import Inputs, gain_of, stream_of, ungained
from multipruner.engine.moments import embedded
from multipruner.engine.prunable import Prunable

from .rotation import is_tied
from .stream import RIDGE, Fit, outputs_of

INPUT_RIDGE = 0.02
"""Of the mean squared input."""
_ROWS = 8192
"""Of a head, that are refitted together."""


@torch.inference_mode()
def fit_to_wider(
    prunable: Prunable,
    ids: Tensor,
    *,
    refit: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Refit a narrower model in place: gains of norms, input projections, output projections.

    Args:
        prunable: the narrower model, as it was cut.
        ids: token ids, [sequences, length]; hidden states of all of them are kept for both models.
        refit: whether projections are refitted; the gains of norms are in any case.
        progress: called with (blocks done, blocks in all).

    Raises:
        NumericsError: when the equations cannot be solved.
    """
    wide, batches = embedded(prunable.original, ids), embedded(prunable, ids)
    dense, narrow = [batch.hidden for batch in wide], [batch.hidden for batch in batches]
    for number in range(len(prunable.anatomy)):
        step = _Block(prunable, number, refit)
        dense, narrow = step.run(dense, narrow, wide, batches)
        if progress is not None:
            progress(number + 1, len(prunable.anatomy))
    norm, last = (of.decoder.get_submodule(of.spec.final_norm) for of in (prunable.original, prunable))
    norm = _comparable(prunable, norm)
    _rescale(prunable, last, [norm(states) for states in dense], [last(states) for states in narrow])
    if refit and not is_tied(prunable):
        _refit_head(prunable, dense, narrow)


def _refit_head(prunable: Prunable, dense: list[Tensor], narrow: list[Tensor]) -> None:
    """Refit a head in place: as it is linear, what it reads in the dense model is told by what it reads here, for all
    of its rows alike.
    """
    source, spec = prunable.original, prunable.spec
    whole, last = (of.decoder.get_submodule(spec.final_norm) for of in (source, prunable))
    fit, head = Fit(), prunable.head_weight
    for before, after in zip(dense, narrow, strict=True):
        fit.add(last(after), whole(before).float(), False)
    stays = prunable.narrowed(torch.eye(source.anatomy.constants["hidden"], device=head.device))
    if prunable.wider is not None and prunable.wider.basis is not None:
        gain = torch.as_tensor(gains_of(whole, spec.norm_offset), device=head.device)  # one number, where it has none
        stays = gain.float().reshape(-1, 1) * stays
    told = fit.solve(stays, INPUT_RIDGE)
    for rows, own in zip(source.head_weight.split(_ROWS), head.split(_ROWS), strict=True):
        own.copy_(prunable.as_stored(rows.float() @ told))


def _comparable(prunable: Prunable, norm: nn.Module) -> nn.Module:
    """Return a norm of the dense model with the gain that the narrower one's has: none where the stream was turned."""
    turned = prunable.wider is not None and prunable.wider.basis is not None
    return without_gain(norm, prunable.spec.norm_offset) if turned else norm


def _rescale(prunable: Prunable, norm: nn.Module, wide: list[Tensor], narrow: list[Tensor]) -> None:
    """Multiply a norm's parameters, in place, so that it gives as much as that of the dense model.

    Args:
        prunable: the narrower model.
        norm: one of its norms.
        wide, narrow: what that norm gives in both models, [sequences, length, hidden_size] each.
    """
    ratios = [
        prunable.narrowed(a).float().square().sum(-1) / b.float().square().sum(-1).clamp(min=1e-12)
        for a, b in zip(wide, narrow, strict=True)
    ]
    factor = torch.cat([ratio.flatten() for ratio in ratios]).mean().sqrt()
    for name, value in scaled_norm(norm, factor, prunable.spec.norm_offset).named_parameters(recurse=False):
        norm.get_parameter(name).copy_(prunable.as_stored(value))


class _Block:
    """One block of both models.

    Args:
        prunable: the narrower model.
        number: of the block.
        refit: whether its projections are refitted.
    """

    def __init__(self, prunable: Prunable, number: int, refit: bool) -> None:
        self.prunable, self.number, self.refit = prunable, number, refit
        self.spec, self.size = prunable.block_spec(number), prunable.dense[number]

    def run(
        self, dense: list[Tensor], narrow: list[Tensor], wide: list[Inputs], batches: list[Inputs]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Refit the block, and return the residual streams after it in both models."""
        prunable, source, number = self.prunable, self.prunable.original, self.number
        layer = prunable.layer_of(number)
        read = [source.read_by(states, number) for states in dense]
        if self.spec.before:
            now = [prunable.read_by(states, number) for states in narrow]
            norm = _comparable(prunable, source.layer_of(number).get_submodule(self.spec.before))
            _rescale(prunable, layer.get_submodule(self.spec.before), [norm(h) for h in dense], now)
        if self.refit:
            self._refit_inputs(read, [prunable.read_by(states, number) for states in narrow])
        with outputs_of(source.dense_output(number)) as given:
            after = [stream_of(source.block(h, batch, number, self.size)) for h, batch in zip(dense, wide, strict=True)]
        inputs = [prunable.output_input(h, b, number, self.size) for h, b in zip(narrow, batches, strict=True)]
        if self.refit:
            self._refit_output(inputs, given, dense, narrow, after)
        output: Any = prunable.dense_output(number)
        told = [output(x) for x in inputs]
        if self.spec.after:
            norm, own = source.layer_of(number).get_submodule(self.spec.after), layer.get_submodule(self.spec.after)
            _rescale(prunable, own, [norm(each) for each in given], [own(each) for each in told])
        return after, [h + prunable.added(each, number) for h, each in zip(narrow, told, strict=True)]

    def _refit_inputs(self, wide: list[Tensor], narrow: list[Tensor]) -> None:
        """Refit all input projections together, as they read the same."""
        source, own, fit = self._inputs(self.prunable.original), self._inputs(self.prunable), Fit()
        whole = torch.cat([projection.weight for projection in source])
        for x, target in zip(narrow, wide, strict=True):
            fit.add(x, F.linear(target, whole).float(), False)
        now = torch.cat([projection.weight for projection in own])
        fitted = self.prunable.as_stored(fit.solve(now.float(), INPUT_RIDGE))
        for projection, weight in zip(own, fitted.split([len(each.weight) for each in own]), strict=True):
            projection.weight.copy_(weight)

    def _inputs(self, prunable: Prunable) -> list[Projection]:
        """Return the input projections of the block, weights [outputs, hidden_size] as they are in the model."""
        module, tensors = prunable.module(self.number), self.spec.inputs
        paths = {tensor.path.rpartition(".")[0]: tensor.dims[0].text == "hidden" for tensor in tensors}
        return [Projection.of(module.get_submodule(path), transposed) for path, transposed in paths.items()]

    def _refit_output(
        self, inputs: list[Tensor], given: list[Tensor], dense: list[Tensor], narrow: list[Tensor], after: list[Tensor]
    ) -> None:
        prunable, own = self.prunable, self.prunable.dense_output(self.number)
        bias = Projection.of(own).bias
        gain = gain_of(self.spec, prunable.layer_of(self.number))
        fit = Fit()
        for x, gave, now, end in zip(inputs, given, narrow, after, strict=True):
            if self.spec.after:  # what adds up does not go back through a norm: the block gives what it gave
                wanted = prunable.narrowed(gave).float()
            else:
                wanted = ungained(prunable.narrowed(end).float() - now.float(), gain)
            fit.add(x, wanted if bias is None else wanted - bias.float(), False)
        now = Projection.of(own, self.spec.transposed).weight
        now.copy_(prunable.as_stored(fit.solve(now.float(), RIDGE)))
