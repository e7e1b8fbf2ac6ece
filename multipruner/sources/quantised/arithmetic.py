"""What packed weights stand for, by the arithmetic of whoever packed them, in float32.

Everything here is exact in float32 up to the one rounding of the last product, so what is rounded to 16 bits afterwards
is what the quantisers' own code gives in these.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign (OCP Microscaling Formats, section 5.3.3)."""
_E8M0_BIAS = 127
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the columns of eight lie in a word (autoawq's gemm layout)."""
_WORD = 32


def fields(words: Tensor, bits: int) -> Tensor:
    """Return the unsigned numbers in the words of the last dimension, lowest bits first.

    Args:
        words: int32, any shape.
        bits: of a number; divides 32.

    Returns:
        int32, the last dimension ``32 / bits`` times as long.
    """
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    return ((words[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def fp4(packed: Tensor) -> Tensor:
    """Return E2M1 numbers, two a byte, low half first, as float32; the last dimension is twice as long."""
    table = torch.tensor([*_FP4, *(-value for value in _FP4)])
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    return table[halves.int()]


def power(scale: Tensor) -> Tensor:
    """Return scales as float32; bytes are exponents of two (E8M0)."""
    return torch.exp2(scale.float() - _E8M0_BIAS) if scale.dtype == torch.uint8 else scale.float()


def spread(scale: Tensor, shape: Sequence[int], block: Sequence[int | None] = (None, None)) -> Tensor:
    """Return scales with one for every row and column, from one a block.

    Args:
        scale: one number for all, one a row, or one for each block of a matrix; blocks at the end may be cut.
        shape: rows and columns.
        block: rows and columns of a block, where the checkpoint says them.

    Returns:
        What multiplies a matrix of this shape, of the type of ``scale``.

    Raises:
        ValueError: when the blocks do not cover the matrix.
    """
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.dim() == 1:
        scale = scale[:, None]
    for dim, (size, said) in enumerate(zip(shape, block, strict=True)):
        if (count := scale.shape[dim]) in (1, size):
            continue
        if said and ceil(size / said) == count:
            step = said
        elif size % count == 0:
            step = size // count
        else:
            raise ValueError(f"{count} scales for {size} numbers, in blocks of {said or 'nobody says how many'}")
        scale = scale.repeat_interleave(step, dim)[:, :size] if dim else scale.repeat_interleave(step, dim)[:size]
    return scale


def grouped(scale: Tensor, groups: Tensor) -> Tensor:
    """Return the scale of every column, where an index says which group it is in; shape (rows, columns)."""
    return scale[:, groups.long()]


def gptq(
    words: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor | None, bits: int, more: int, size: int = 0
) -> Tensor:
    """Return a matrix that GPTQ packed along its inputs.

    Args:
        words: int32 (inputs / numbers in a word, outputs).
        zeros: int32 (groups, outputs / numbers in a word).
        scales: (groups, outputs).
        groups: of every input; ``None`` where they follow one another.
        bits: of a number.
        more: what is added to the zeros: the first version of the format stores them less one.
        size: inputs of a group, where the checkpoint says that.

    Returns:
        float32 (outputs, inputs).
    """
    numbers = fields(words.T.contiguous(), bits)
    offsets = (fields(zeros, bits) + more) & (2**bits - 1) if more else fields(zeros, bits)
    if groups is None:
        step = size or numbers.shape[1] // len(scales)
        if ceil(numbers.shape[1] / step) != len(scales):
            raise ValueError(f"{len(scales)} groups of {step} do not make {numbers.shape[1]} inputs")
        groups = torch.arange(numbers.shape[1]) // step
    groups = groups.long()
    return (numbers - offsets.T[:, groups]) * scales.float().T[:, groups]


def awq(words: Tensor, zeros: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return a matrix that AWQ packed along its outputs, eight in a word in an order of their own.

    Args:
        words: int32 (inputs, outputs / 8).
        zeros: int32 (groups, outputs / 8).
        scales: (groups, outputs).
        bits: of a number: 4.

    Returns:
        float32 (outputs, inputs).
    """
    numbers, offsets = (_in_order(fields(one, bits)) for one in (words, zeros))
    step = len(numbers) // len(scales)
    offsets, scales = (one.repeat_interleave(step, 0) for one in (offsets, scales.float()))
    return ((numbers - offsets) * scales).T


def _in_order(numbers: Tensor) -> Tensor:
    rows = numbers.unflatten(-1, (-1, len(_AWQ_ORDER)))
    return rows[..., list(_AWQ_ORDER)].flatten(-2)


def looked_up(packed: Tensor, table: Tensor, largest: Tensor, block: int, shape: Sequence[int]) -> Tensor:
    """Return what bitsandbytes packed in four bits: entries of a table times the largest number of their block.

    Args:
        packed: bytes, two numbers each, high half first.
        table: of sixteen numbers.
        largest: one of every block.
        block: how many numbers are one.
        shape: of the result.

    Returns:
        float32.
    """
    flat = packed.flatten()
    halves = torch.stack((flat >> 4, flat & 15), dim=-1).flatten()
    return _scaled(table.float()[halves.int()], largest, block)[: torch.Size(shape).numel()].reshape(tuple(shape))


def nested(packed: Tensor, table: Tensor, largest: Tensor, block: int, offset: float) -> Tensor:
    """Return the largest numbers of blocks where they are quantised themselves (QLoRA, arXiv 2305.14314, section 3)."""
    return _scaled(table.float()[packed.int()], largest, block) + offset


def _scaled(numbers: Tensor, largest: Tensor, block: int) -> Tensor:
    return numbers * largest.float().repeat_interleave(block)[: len(numbers)]
