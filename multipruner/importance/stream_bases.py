"""The basis of the residual stream in which dimensions leave, where a model is the same in any: the last ones first.

What blocks and head read is the normed stream x_l; with the gains of norms in the matrices that read it, principal
components of the sum of ``E[x_l x_l^T]`` over all readers l are the basis in which the first dimensions keep most of
it, for every number of them (SliceGPT, arXiv 2401.15024, section 3, with one basis for all blocks, so that nothing has
to be added between them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from multipruner.core.axes import STREAM
from multipruner.core.errors import NumericsError
from multipruner.engine.cutting import without_gain
from multipruner.engine.layer_calls import State, stream_of
from multipruner.engine.moments import embedded
from multipruner.engine.prunable import Prunable

from .hidden_dims import second_moments

BASIS = "principal components"
"""What a run's identity says of it."""


@torch.inference_mode()
def basis_of_stream(prunable: Prunable, ids: Tensor, progress: Callable[[int, int], None] | None = None) -> Tensor:
    """Return an orthonormal basis of the residual stream, float32 [hidden_size, hidden_size]: its columns are the new
    dimensions, the last to leave first.

    Args:
        prunable: the dense model, whose blocks read the stream through RMS norms.
        ids: token ids, [sequences, length].
        progress: called with (readers seen, so many in all).

    Raises:
        NumericsError: when second moments are not finite.
    """
    width = prunable.anatomy.constants[STREAM.axes[0].name]
    total = torch.zeros(width, width, dtype=torch.float64)
    for number, moments in enumerate(_read(prunable, ids)):
        total += moments.cpu()
        if progress is not None:
            progress(number + 1, len(prunable.anatomy) + 1)
    if not bool(torch.isfinite(total).all()):
        raise NumericsError("the moments of the calibration text are not finite: check the weights for NaN")
    vectors = torch.linalg.eigh(total).eigenvectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    basis = (vectors * largest.sign()).float()  # of two opposite directions always the same
    return basis.to(prunable.model.device)


def _read(prunable: Prunable, ids: Tensor) -> Iterator[Tensor]:
    """Yield second moments of the normed stream without the norm's gain, float32 [hidden_size, hidden_size], as blocks
    read it and the head at last.
    """
    batches, offset = embedded(prunable, ids), prunable.spec.norm_offset
    states: list[State] = [batch.hidden for batch in batches]
    for number, size in enumerate(prunable.dense):
        norm = without_gain(prunable.layer_of(number).get_submodule(prunable.block_spec(number).before), offset)
        yield second_moments([norm(stream_of(state)) for state in states])
        states = [prunable.block(state, batch, number, size) for state, batch in zip(states, batches, strict=True)]
    norm = without_gain(prunable.decoder.get_submodule(prunable.spec.final_norm), offset)
    yield second_moments([norm(stream_of(state)) for state in states])
