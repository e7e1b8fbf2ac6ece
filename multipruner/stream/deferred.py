"""Tensors that are known by name, shape and type, and read from their files only when they are asked for.

What is done to them meanwhile, such as slices of a plan or transformers' own change of a checkpoint's layout, is
written down and done to what is read. So one tensor at a time is in memory, whatever the size of the model; of a
mixture whose experts lie apart in files and together in the model, those of one layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_SAME = (_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten._to_copy.default)
"""What leaves values as they are, where type and strides stay: a tensor that is written needs no memory of its own."""


class WrittenError(TypeError):
    """Somebody writes into a deferred tensor, which has no memory that could be written into."""


@dataclass(frozen=True, eq=False, slots=True)
class Read:
    """A tensor in a file.

    Attributes:
        read: gives it.
    """

    read: Callable[[], Tensor]


@dataclass(frozen=True, eq=False, slots=True)
class Made:
    """What an operation makes of other tensors.

    Attributes:
        operation: of torch.
        arguments, options: for it; deferred tensors in them stand for what they will be.
        number: which of its results, where it has several.
    """

    operation: Callable[..., Any]
    arguments: Sequence[Any]
    options: Mapping[str, Any]
    number: int | None


class Deferred(Tensor):
    """A tensor without values that knows where they come from. It says that it lies on the CPU, where they will.

    Attributes:
        origin: where the values come from.
    """

    origin: Read | Made

    @staticmethod
    def __new__(cls, like: Tensor, origin: Read | Made) -> Deferred:
        """Make one of the shape and type of a tensor that may lie on the meta device."""
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=torch.device("cpu"), requires_grad=False
        )
        made.origin = origin
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Deferred({tuple(self.shape)}, {self.dtype})"

    def data_ptr(self) -> int:
        """Return a number that only tensors with the same values share."""
        return id(self.origin)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Write an operation down; shapes and types follow from doing it on the meta device."""
        options = dict(kwargs or {})
        if func is _aten.equal.default:
            return args[0].data_ptr() == args[1].data_ptr() or func(*map(values_of, args))
        if any(argument.alias_info is not None and argument.alias_info.is_write for argument in func._schema.arguments):
            raise WrittenError(f"{func} would write into a tensor that is in a file")
        result = func(*tree_map(_shape_of, args), **{key: _shape_of(value) for key, value in options.items()})
        if func in _SAME and (result.dtype, result.stride()) == (args[0].dtype, args[0].stride()):
            return cls(result, args[0].origin)
        if isinstance(result, Tensor):
            return cls(result, Made(func, args, options, None))
        return [cls(one, Made(func, args, options, number)) for number, one in enumerate(result)]


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return torch.device("meta") if isinstance(value, torch.device) else value


def values_of(tensor: Tensor) -> Tensor:
    """Return a tensor with its values: a deferred one's are read, and what was done to it is done."""
    return Values([tensor]).of(tensor)


class Values:
    """Gives values of tensors, each once; what several of them are made of is kept until the last has it.

    Args:
        tensors: those that will be asked for.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._uses: Counter[Read | Made] = Counter()
        self._kept: dict[Read | Made, Tensor] = {}
        waiting = [tensor.origin for tensor in tensors if isinstance(tensor, Deferred)]
        while waiting:
            origin = waiting.pop()
            self._uses[origin] += 1
            if self._uses[origin] == 1 and isinstance(origin, Made):
                waiting += _origins(origin)

    def of(self, tensor: Tensor) -> Tensor:
        """Return a tensor with its values."""
        return self._of(tensor.origin) if isinstance(tensor, Deferred) else tensor

    def _of(self, origin: Read | Made) -> Tensor:
        found = self._kept.pop(origin, None)
        if found is None:
            found = origin.read() if isinstance(origin, Read) else self._make(origin)
        self._uses[origin] -= 1
        if self._uses[origin] > 0:
            self._kept[origin] = found
        return found

    def _make(self, origin: Made) -> Tensor:
        made = origin.operation(*tree_map(self._value, origin.arguments), **tree_map(self._value, dict(origin.options)))
        return made if origin.number is None else made[origin.number]

    def _value(self, argument: Any) -> Any:
        return self.of(argument) if isinstance(argument, Tensor) else argument


def _origins(made: Made) -> list[Read | Made]:
    leaves = tree_leaves((made.arguments, dict(made.options)))
    return [leaf.origin for leaf in leaves if isinstance(leaf, Deferred)]
