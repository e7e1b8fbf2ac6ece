"""Rows and columns of quantised tensors, cut without changing a bit where the blocks of their types allow that.

A type of GGUF stores so many numbers of a row together, its block: 32 for the old types, 256 for K-quants. Rows can
always be taken as they are, columns where those that stay are whole blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, ReaderTensor
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from multipruner.core.errors import NumericsError, UnsupportedModelError

Indices = NDArray[np.int64]
FLOATS = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16, GGMLQuantizationType.F32)
"""Types that are not quantised."""
_WIDER = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16)
"""What takes the place of a type that cannot be made here or does not fit the rows, the smaller first."""
_TOGETHER = 1 << 22
"""Numbers that are in memory as float32 at once."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor in a file.

    Attributes:
        tensor: in its file.
        rows: those that stay, in order; ``None``: all.
        columns: of them; ``None``: all.
    """

    tensor: ReaderTensor
    rows: Indices | None = None
    columns: Indices | None = None

    @property
    def kind(self) -> GGMLQuantizationType:
        """The type that it is stored in."""
        return self.tensor.tensor_type

    @property
    def width(self) -> int:
        """How many columns it has, 1 where it is a vector."""
        whole = shape_of(self.tensor)
        return len(self.columns) if self.columns is not None else whole[1] if len(whole) > 1 else 1

    @property
    def blocks(self) -> Indices | None:
        """The blocks of a row that stay, where columns that stay are whole blocks; ``None`` where they are not."""
        size = GGML_QUANT_SIZES[self.kind][0]
        if self.columns is None:
            return np.arange(self.width // size)
        if len(self.columns) % size:
            return None
        rows = self.columns.reshape(-1, size)
        whole = (rows[:, 0] % size == 0).all() and (rows == rows[:, :1] + np.arange(size)).all()
        return rows[:, 0] // size if whole else None

    def stored(self) -> Iterator[NDArray[np.uint8]]:
        """Yield its bytes, [rows, bytes] each, of a piece whose columns are whole blocks."""
        raw, blocks = raw_of(self.tensor), self.blocks
        assert blocks is not None
        if self.columns is None:
            yield from [raw] if self.rows is None else (raw[part] for part in self._slabs())
            return
        size = GGML_QUANT_SIZES[self.kind][1]
        for part in self._slabs():
            rows = raw[part]
            yield rows.reshape(len(rows), -1, size)[:, blocks].reshape(len(rows), -1)

    def values(self) -> Iterator[NDArray[np.float32]]:
        """Yield its numbers, [rows, columns] each.

        Raises:
            NumericsError: when one is not finite.
        """
        raw = raw_of(self.tensor)
        for part in self._slabs():
            found = dequantize(np.ascontiguousarray(raw[part]), self.kind)
            if not np.isfinite(found).all():
                raise NumericsError(f"{self.tensor.name} holds NaN or infinity; take a file whose weights are finite")
            yield found if self.columns is None else np.ascontiguousarray(found[:, self.columns])

    def _slabs(self) -> Iterator[Indices]:
        raw = raw_of(self.tensor)
        rows = np.arange(len(raw)) if self.rows is None else self.rows
        block, size = GGML_QUANT_SIZES[self.kind]
        step = max(1, _TOGETHER // max(1, raw.shape[1] // size * block))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]


def shape_of(tensor: ReaderTensor) -> tuple[int, ...]:
    """Return a tensor's shape as in a checkpoint; files have it turned round."""
    return tuple(int(side) for side in reversed(tensor.shape))


def raw_of(tensor: ReaderTensor) -> NDArray[np.uint8]:
    """Return a tensor's bytes, [rows, bytes], as they lie in the file; a vector has rows of one number."""
    return np.asarray(tensor.data).reshape(-1).view(np.uint8).reshape(shape_of(tensor)[0], -1)


def encoded(piece: Piece, kind: GGMLQuantizationType) -> Iterator[NDArray[np.uint8]]:
    """Yield a piece's bytes in a type: as they are where they can be, else computed anew.

    Raises:
        NumericsError: for numbers that are not finite, or beyond the range of 16-bit floats.
    """
    if kind == piece.kind and piece.blocks is not None:
        yield from piece.stored()
        return
    for values in piece.values():
        with np.errstate(over="ignore"):
            found = quantize(values, kind)
        if kind == GGMLQuantizationType.F16 and not np.isfinite(found).all():
            raise NumericsError(f"{piece.tensor.name} holds values that f16 cannot, and its own type does not fit")
        yield np.ascontiguousarray(found).reshape(-1).view(np.uint8).reshape(len(values), -1)


def common_kind(pieces: tuple[Piece, ...]) -> GGMLQuantizationType:
    """Return the type of the tensor that some pieces, one below the other, become.

    Raises:
        UnsupportedModelError: when a piece has to be computed anew, and is of a type that cannot be read here.
    """
    kinds = {piece.kind for piece in pieces}
    if len(kinds) == 1 and all(piece.blocks is not None for piece in pieces):
        return pieces[0].kind
    for piece in pieces:
        if not _can(dequantize, piece.kind):
            raise UnsupportedModelError(
                f"{piece.tensor.name} is of type {piece.kind.name}, which cannot be read here and does not stay whole; "
                "take a file of another type"
            )
    if kinds <= set(FLOATS):
        return GGMLQuantizationType.F32
    own = [pieces[0].kind] if len(kinds) == 1 and _can(quantize, pieces[0].kind) else []
    return next(kind for kind in (*own, *_WIDER) if pieces[0].width % GGML_QUANT_SIZES[kind][0] == 0)


@cache
def _can(work: Callable[[Any, GGMLQuantizationType], Any], kind: GGMLQuantizationType) -> bool:
    """Tell whether gguf-py can quantise or dequantise a type."""
    numbers, nbytes = GGML_QUANT_SIZES[kind]
    rows = np.zeros((1, nbytes), np.uint8) if work is dequantize else np.zeros((1, numbers), np.float32)
    try:
        work(rows, kind)
    except NotImplementedError:
        return False
    return True
