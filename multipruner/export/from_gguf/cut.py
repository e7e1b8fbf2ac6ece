"""The tensors that a plan leaves of a dense GGUF file, and the smaller file, written one tensor after another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter
from numpy.typing import NDArray

from multipruner.checkpoint.save import check_space
from multipruner.checkpoint.weights import what_stays
from multipruner.core.axes import with_unsaid
from multipruner.core.errors import OutputError
from multipruner.core.plan import PruningPlan
from multipruner.engine.cutting import Cut
from multipruner.export.gguf import add_fields, add_layer_sizes
from multipruner.export.gguf_model import architecture_for, sizes_by_layer
from multipruner.export.gguf_tensors import Architecture, LayerSizes, Shape, TensorJob, interleave, tensor_jobs
from multipruner.storage.files import whole_file

from .blocks import Indices, Piece, common_kind, encoded, shape_of
from .source import ROTARY, GgufSource

_NOT_COPIED = ("general.architecture", "general.alignment", "general.size_label")
"""Metadata that the writer says itself, or that say how large the dense model was."""
_NAMED = 3
"""Tensors that a line names."""


@dataclass(frozen=True, slots=True)
class CutTensor:
    """A tensor of the smaller file.

    Attributes:
        name: in the file.
        shape: as in a checkpoint.
        kind: the type that it is stored in.
        pieces: of the dense file, one below the other; none where it is made up.
        fill: the value of a tensor that is made up.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    pieces: tuple[Piece, ...] = ()
    fill: float = 0.0

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return int(np.prod(self.shape)) // block * size

    @property
    def computed(self) -> bool:
        """Whether its numbers are rounded anew, and not taken as they are stored."""
        return any(piece.kind != self.kind or piece.blocks is None for piece in self.pieces)

    def stored(self) -> NDArray[np.uint8]:
        """Return its bytes: of a tensor that stays whole they are those in the dense file, not read before that.

        Raises:
            NumericsError: for numbers that are not finite.
        """
        if not self.pieces:
            dtype = np.float32 if self.kind == GGMLQuantizationType.F32 else np.float16
            return np.full(self.shape, self.fill, dtype).reshape(-1).view(np.uint8)
        chunks = (chunk for piece in self.pieces for chunk in encoded(piece, self.kind))
        first = next(chunks)
        if first.nbytes == self.nbytes:
            return first.reshape(-1)
        made, at = np.empty(self.nbytes, np.uint8), 0
        for chunk in (first, *chunks):
            made[at : at + chunk.nbytes] = chunk.reshape(-1)
            at += chunk.nbytes
        return made


@dataclass(frozen=True, slots=True)
class CutModel:
    """What a plan leaves of a dense GGUF file.

    Attributes:
        source: the dense file.
        architecture: llama.cpp's for the smaller model.
        layers: what each layer keeps.
        hidden: width of the residual stream.
        tensors: of the smaller file, in order.
    """

    source: GgufSource
    architecture: Architecture
    layers: tuple[LayerSizes, ...]
    hidden: int
    tensors: tuple[CutTensor, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes the tensors take."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def lines(self) -> Iterator[str]:
        """Yield what a person is told: what is taken as it is stored, and what is rounded anew, by types."""
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for tensor in self.tensors:
            if tensor.computed:
                before = " and ".join(sorted({piece.kind.name for piece in tensor.pieces}))
                groups[before, tensor.kind.name].append(tensor.name)
        same = sum(bool(tensor.pieces) and not tensor.computed for tensor in self.tensors)
        yield f"{same} of {len(self.tensors)} tensors keep their stored numbers, bit for bit"
        for (before, after), names in groups.items():
            shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
            what = f"{before} -> {after}" if before != after else f"{before} again"
            yield f"{len(names)} cut within blocks and rounded anew ({what}): {shown}"


def cut_model(source: GgufSource, plan: PruningPlan) -> CutModel:
    """Return what a plan leaves of a dense GGUF file; nothing of a tensor is read.

    Raises:
        ConfigError: when the plan does not fit the tensors.
        UnsupportedModelError: when llama.cpp cannot compute the smaller model, or a tensor's type cannot be cut.
    """
    dense = {name: shape_of(piece.tensor) for name, piece in source.pieces.items()}
    sizes = {"hidden": source.shape.hidden_size, "head_dim": source.shape.head_dim}
    stays = dict(what_stays(dense, plan, source.spec, with_unsaid({**plan.anatomy.constants, **sizes})))
    shapes = {name: _cut_shape(dense[old], cut) for name, (old, cut) in stays.items()}
    layers = sizes_by_layer(plan.anatomy, plan.structure, plan.layers)
    hidden = source.shape.hidden_size if plan.stream is None else len(plan.stream)
    config = SimpleNamespace(
        hidden_size=hidden,
        tie_word_embeddings=source.shape.tied_embeddings,
        attention_bias=any(name.endswith(".bias") for name in dense) and source.family.stock.biases,
    )
    chosen = architecture_for(plan.model_type, source.family, config, layers, source.shape.head_dim, plain=source.plain)
    of = source.shape
    shape = Shape(hidden, of.head_dim, of.vocab_size, of.tied_embeddings, chosen, of.head_norms)
    tensors = [_tensor(job, stays, source) for job in tensor_jobs(source.spec, layers, shape, shapes)]
    if source.factors is not None:
        piece = Piece(source.factors)
        tensors.insert(1, CutTensor(ROTARY, shape_of(source.factors), piece.kind, (piece,)))
    return CutModel(source, chosen, layers, hidden, tuple(tensors))


def write_cut(model: CutModel, target: Path, tick: Callable[[int], object]) -> None:
    """Write the smaller file; it appears whole or not at all, and one tensor at a time is in memory.

    Args:
        model: what it holds.
        target: the file.
        tick: called with the bytes of every tensor that was written.

    Raises:
        NumericsError: for numbers that are not finite, of tensors that are rounded anew.
        OutputError: when it cannot be written.
    """
    check_space(target.absolute(), model.nbytes)
    with whole_file(target) as partial:
        writer = GGUFWriter(partial, model.architecture.name)
        _add_metadata(writer, model)
        for tensor in model.tensors:
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in model.tensors:
                writer.write_tensor_data(tensor.stored())
                tick(tensor.nbytes)
        finally:
            writer.close()
        wanted = {tensor.name: (tensor.shape, tensor.kind) for tensor in model.tensors}
        if wanted != {one.name: (shape_of(one), one.tensor_type) for one in GGUFReader(partial).tensors}:
            raise OutputError(f"{target} does not hold what was written: the disk may be damaged")


def _add_metadata(writer: GGUFWriter, model: CutModel) -> None:
    """Write the sizes that are left, then everything else as the dense file says it."""
    source, head_dim = model.source, model.source.shape.head_dim
    add_layer_sizes(writer, source.spec, model.layers, model.architecture)
    writer.add_embedding_length(model.hidden)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head_dim)
    before, after = f"{source.family.stock.name}.", f"{model.architecture.name}."
    named = ((after + row[0].removeprefix(before), *row[1:]) if row[0].startswith(before) else row for row in
             source.fields)  # fmt: skip
    add_fields(writer, [row for row in named if row[0] not in _NOT_COPIED])


def _tensor(job: TensorJob, stays: dict[str, tuple[str, Cut]], source: GgufSource) -> CutTensor:
    """Return a tensor of the smaller file, from what stays of the dense ones."""
    if not job.sources:
        kind = GGMLQuantizationType.F32 if len(job.shape) == 1 else GGMLQuantizationType.F16
        return CutTensor(job.name, job.shape, kind, fill=job.fill)
    pieces = []
    for name, _ in job.sources:
        old, cut = stays[name]
        dense = source.pieces[old]
        rows = _indices(cut, 0, shape_of(dense.tensor))
        rows = interleave(rows, job.heads) if job.heads else rows
        rows = rows if dense.rows is None else dense.rows[rows]  # where they lie in the file
        whole = np.array_equal(rows, np.arange(shape_of(dense.tensor)[0]))
        columns = _indices(cut, 1, shape_of(dense.tensor)) if 1 in cut else None
        pieces.append(Piece(dense.tensor, None if whole else rows, columns))
    return CutTensor(job.name, job.shape, common_kind(tuple(pieces)), tuple(pieces))


def _indices(cut: Cut, side: int, shape: Sequence[int]) -> Indices:
    index = cut.get(side, slice(0, shape[side]))
    return np.arange(index.stop) if isinstance(index, slice) else index.numpy()


def _cut_shape(shape: tuple[int, ...], cut: Cut) -> tuple[int, ...]:
    return tuple(len(_indices(cut, side, shape)) for side in range(len(shape)))
