"""The table of quantised formats: which tensors stand for one weight, and what they say that it is.

Formats: transformers' ``quantization_config`` of a ``config.json``, https://huggingface.co/docs/transformers/quantization;
compressed-tensors, https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from multipruner.core.errors import UnknownModelError
from multipruner.storage.tensor_headers import StoredTensor

from . import arithmetic

_BITS = (2, 4, 8)
"""Of numbers that words hold a whole number of."""
_STATE = "quant_state.bitsandbytes__"


@dataclass(frozen=True, slots=True)
class Packed:
    """The tensors of one weight.

    Attributes:
        stem: how the names of all begin.
        tensors: by how their names go on.
        settings: what the configuration says of the quantisation.
    """

    stem: str
    tensors: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]

    def __contains__(self, ending: str) -> bool:
        return ending in self.tensors

    def shape(self, ending: str) -> tuple[int, ...]:
        """Return that of one of them."""
        return self.tensors[ending].shape

    def read(self, ending: str, number: int | None = None) -> Tensor:
        """Read one of them, or one matrix of several.

        Raises:
            UnknownModelError: when its file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        tensor, name = self.tensors[ending], self.stem + ending
        try:
            with safe_open(tensor.file, "pt") as file:
                return file.get_tensor(name) if number is None else file.get_slice(name)[number]
        except (OSError, ValueError, SafetensorError) as error:
            raise UnknownModelError(f"cannot read {name} from {tensor.file}: {error}; download it again") from error

    def read_or_none(self, ending: str) -> Tensor | None:
        """Read one that need not be there."""
        return self.read(ending) if ending in self else None


@dataclass(frozen=True, slots=True)
class Packing:
    """One way in which a weight is packed: the row of a format.

    Attributes:
        main: ending of the tensor that holds the numbers.
        beside: endings of those that come with it; together they tell this way from others.
        shape: gives the shape of the weight.
        values: gives it in float32; of several matrices in one tensor, that of a number.
        result: ending of the weight's own name.
        may: endings of further tensors that may be there.
        types: that ``main`` has.
    """

    main: str
    beside: tuple[str, ...]
    shape: Callable[[Packed], Sequence[int]]
    values: Callable[[Packed, int | None], Tensor]
    result: str = ""
    may: tuple[str, ...] = ()
    types: tuple[str, ...] = ("U8",)

    def find(self, stored: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> list[Packed]:
        """Return every weight that is packed in this way."""
        first = self.beside[0]
        stems = [name.removesuffix(first) for name in stored if name.endswith(first)]
        found = []
        for stem in stems:
            needed = {ending: stored.get(stem + ending) for ending in (self.main, *self.beside)}
            tensors = {ending: tensor for ending, tensor in needed.items() if tensor is not None}
            if len(tensors) == len(needed) and tensors[self.main].dtype in self.types:
                more = {ending: stored[stem + ending] for ending in self.may if stem + ending in stored}
                found.append(Packed(stem, {**tensors, **more}, settings))
        return found


def _same(packed: Packed) -> Sequence[int]:
    return packed.shape("")


def _weight(packed: Packed) -> Sequence[int]:
    rows, columns = packed.shape("weight")
    return rows, columns


def _fp8(packed: Packed, number: int | None) -> Tensor:
    values, scale = packed.read("", number).float(), arithmetic.power(packed.read("_scale_inv", number))
    return values * arithmetic.spread(scale, values.shape, packed.settings.get("weight_block_size") or (None, None))


def _mxfp4_shape(packed: Packed) -> Sequence[int]:
    experts, rows, groups, half = packed.shape("_blocks")
    return experts, 2 * half * groups, rows


def _mxfp4(packed: Packed, number: int | None) -> Tensor:
    numbers = arithmetic.fp4(packed.read("_blocks", number))
    return (numbers * arithmetic.power(packed.read("_scales", number))[..., None]).flatten(-2).mT


def _block(packed: Packed) -> Sequence[int | None]:
    """Return rows and columns of a block, as compressed-tensors' groups of layers say them where all say the same."""
    said = [group.get("weights") or {} for group in (packed.settings.get("config_groups") or {}).values()]
    blocks = {tuple(one["block_structure"]) for one in said if one.get("block_structure")}
    groups = {int(one.get("group_size") or 0) for one in said}
    whole = next(iter(groups)) if len(groups) == 1 else 0
    return next(iter(blocks)) if len(blocks) == 1 else (None, whole if whole > 0 else None)


def _scales(packed: Packed, scale: Tensor, shape: Sequence[int]) -> Tensor:
    groups = packed.read_or_none("weight_g_idx")
    if groups is None:
        return arithmetic.spread(scale, shape, _block(packed))
    return arithmetic.grouped(scale, groups)


def _plain(packed: Packed, number: int | None) -> Tensor:
    values = packed.read("weight").float()
    zero = packed.read_or_none("weight_zero_point")
    if zero is not None:
        values = values - _scales(packed, zero.float(), values.shape)
    return values * _scales(packed, arithmetic.power(packed.read("weight_scale")), values.shape)


def _words_bits(packed: Packed) -> int:
    (_, columns), (_, words) = _words_shape(packed), packed.shape("weight_packed")
    found = [bits for bits in _BITS if ceil(columns * bits / 32) == words]
    if len(found) != 1:
        raise ValueError(f"{columns} columns in {words} words: not of 2, 4 or 8 bits")
    return found[0]


def _words_shape(packed: Packed) -> Sequence[int]:
    return packed.read("weight_shape").tolist()


def _words(packed: Packed, number: int | None) -> Tensor:
    (rows, columns), bits = _words_shape(packed), _words_bits(packed)
    values = arithmetic.fields(packed.read("weight_packed"), bits)[:, :columns].float()
    zero = packed.read_or_none("weight_zero_point")
    if zero is not None and zero.dtype == torch.int32:
        zero = arithmetic.fields(zero.T.contiguous(), bits)[:, :rows].T
    else:
        zero = torch.tensor([[2 ** (bits - 1)]]) + (0 if zero is None else zero)
    shape = (rows, columns)
    values = values - _scales(packed, zero.float(), shape)
    return values * _scales(packed, packed.read("weight_scale").float(), shape)


def _halves_shape(packed: Packed) -> Sequence[int]:
    rows, half = packed.shape("weight_packed")
    return rows, 2 * half


def _halves(packed: Packed, number: int | None) -> Tensor:
    values, scale = arithmetic.fp4(packed.read("weight_packed")), arithmetic.power(packed.read("weight_scale"))
    whole = packed.read_or_none("weight_global_scale")
    scale = scale if whole is None else scale / whole.float()
    return values * arithmetic.spread(scale, values.shape)


def _bits(packed: Packed) -> int:
    bits = packed.settings.get("bits", 4)
    if bits not in _BITS:
        raise ValueError(f"numbers of {bits} bits")
    return bits


def _gptq_shape(packed: Packed) -> Sequence[int]:
    words, outputs = packed.shape("qweight")
    return outputs, words * 32 // _bits(packed)


def _gptq(packed: Packed, number: int | None) -> Tensor:
    words, zeros, scales = (packed.read(ending) for ending in ("qweight", "qzeros", "scales"))
    more = 0 if packed.settings.get("checkpoint_format") == "gptq_v2" else 1
    return arithmetic.gptq(words, zeros, scales, packed.read_or_none("g_idx"), _bits(packed), more,
                           size=max(0, int(packed.settings.get("group_size") or 0)))  # fmt: skip


def _awq_shape(packed: Packed) -> Sequence[int]:
    version = str(packed.settings.get("version", "gemm")).lower()
    if version != "gemm" or packed.settings.get("bits", 4) != 4:
        raise ValueError(
            f"AWQ of version {version} with {packed.settings.get('bits', 4)} bits; that of gemm, 4, is read"
        )
    inputs, words = packed.shape("qweight")
    return words * 8, inputs


def _awq(packed: Packed, number: int | None) -> Tensor:
    return arithmetic.awq(packed.read("qweight"), packed.read("qzeros"), packed.read("scales"), 4)


def _state(packed: Packed) -> dict[str, Any]:
    ending = next(ending for ending in packed.tensors if _STATE in ending)
    return json.loads(bytes(packed.read(ending).tolist()))


def _bnb_shape(packed: Packed) -> Sequence[int]:
    return _state(packed)["shape"]


def _bnb_4bit(packed: Packed, number: int | None) -> Tensor:
    state, largest = _state(packed), packed.read(".absmax")
    if ".nested_absmax" in packed:
        table, of_those = packed.read(".nested_quant_map"), packed.read(".nested_absmax")
        largest = arithmetic.nested(largest, table, of_those, state["nested_blocksize"], state["nested_offset"])
    numbers, table = packed.read(""), packed.read(".quant_map")
    return arithmetic.looked_up(numbers, table, largest, state["blocksize"], state["shape"])


def _bnb_8bit(packed: Packed, number: int | None) -> Tensor:
    return packed.read("weight").float() * packed.read("SCB").float()[:, None] * (1 / 127)


def _bnb(kind: str) -> Packing:
    return Packing("", (".absmax", ".quant_map", f".{_STATE}{kind}"), _bnb_shape, _bnb_4bit,
                   may=(".nested_absmax", ".nested_quant_map"))  # fmt: skip


_ZERO = ("weight_zero_point", "weight_g_idx")
FORMATS: dict[str, tuple[Packing, ...]] = {
    "awq": (Packing("qweight", ("qzeros", "scales"), _awq_shape, _awq, "weight", types=("I32",)),),
    "bitsandbytes": (
        _bnb("nf4"),
        _bnb("fp4"),
        Packing("weight", ("SCB",), _weight, _bnb_8bit, "weight", ("weight_format",), ("I8",)),
    ),
    "compressed-tensors": (
        Packing("weight_packed", ("weight_shape", "weight_scale"), _words_shape, _words, "weight", _ZERO, ("I32",)),
        Packing("weight_packed", ("weight_scale",), _halves_shape, _halves, "weight", ("weight_global_scale",)),
        Packing("weight", ("weight_scale",), _weight, _plain, "weight", _ZERO, ("I8", "F8_E4M3")),
    ),
    "fp8": (Packing("", ("_scale_inv",), _same, _fp8, types=("F8_E4M3",)),),
    "gptq": (Packing("qweight", ("qzeros", "scales"), _gptq_shape, _gptq, "weight", ("g_idx",), ("I32",)),),
    "mxfp4": (Packing("_blocks", ("_scales",), _mxfp4_shape, _mxfp4),),
}  # fmt: skip
"""How weights are packed, by the ``quant_method`` of a configuration."""
