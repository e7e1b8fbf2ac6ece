"""A device that is none, so that what is written for GPUs can be tested without one.

Its tensors say that they are on ``meta`` and hold CPU tensors that they are computed with, so they have numbers. As on
a GPU

- tensors of two devices do not meet, except where one is copied to the other, is a number without dimensions, or is an
  index on the CPU of a tensor elsewhere;
- whoever wants to know a number waits for the device: every such place is counted.

It cannot tell anything about speed or rounding on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_aten = torch.ops.aten
_COPIES = {_aten._to_copy.default, _aten.copy_.default}
_INDEXES = {_aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default, _aten._index_put_impl_.default}
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default, _aten.masked_select.default,
          _aten._linalg_check_errors.default}  # fmt: skip
HERE, THERE = torch.device("cpu"), torch.device("meta")


class Sham(Tensor):
    """A tensor of the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Sham:
        with torch.inference_mode(False):  # views of what is outside of it are made inside, too
            made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
                device=THERE, requires_grad=inner.requires_grad,
            )  # fmt: skip
        made.held = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def __repr__(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"Sham({self.held!r})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def data(self) -> Sham:  # pyright: ignore[reportIncompatibleVariableOverride]
        return Sham(self.held)

    @data.setter
    def data(self, value: Sham) -> None:
        self.held = value.held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside of the device's context")


class ShamDevice(TorchDispatchMode):
    """The device, while it is entered.

    Attributes:
        waits: place in the package -> how often somebody waited there for a number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self._depth = 0
        generator, tensor = torch.Generator, torch.tensor

        def made(data: Any, *, device: Any = None, **more: Any) -> Tensor:
            return tensor(data, **more) if device is None else tensor(data, **more).to(device)

        # neither reaches the dispatcher: numbers are drawn where they are computed, and lists go to the device
        self._patches = [patch.object(torch, "Generator", lambda device="cpu": generator()),
                         patch.object(torch, "tensor", made)]  # fmt: skip

    def __enter__(self) -> Any:
        if not self._depth:
            for each in self._patches:
                each.start()
        self._depth += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._depth -= 1
        if not self._depth:
            for each in self._patches:
                each.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, Sham)]
        wanted = next((torch.device(leaf) for leaf in leaves if isinstance(leaf, torch.device)), None)
        goes = wanted.type == THERE.type if wanted is not None else bool(there)
        if there:
            self._check(func, args, tensors)
            self._count(func, args, goes)
        known = {id(tensor.held): tensor for tensor in there}
        result = func(*tree_map(_inside, args), **tree_map(_inside, kwargs))

        def outside(value: Any) -> Any:
            if id(value) in known:
                return known[id(value)]
            return Sham(value) if goes and isinstance(value, Tensor) else value

        if func is _aten.copy_.default:
            return args[0]
        return tree_map(outside, result)

    @staticmethod
    def _check(func: Any, args: Any, tensors: list[Tensor]) -> None:
        if func in _COPIES or (func in _INDEXES and isinstance(args[0], Sham)):
            return
        mixed = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, Sham) and tensor.ndim]
        assert not mixed, f"{func} of tensors elsewhere and of {mixed} on the CPU"

    def _count(self, func: Any, args: Any, goes: bool) -> None:
        masks = func in _INDEXES and any(
            isinstance(index, Sham) and index.dtype is torch.bool for index in tree_leaves(args[1])
        )
        comes = (func is _aten._to_copy.default and not goes) or (
            func is _aten.copy_.default and isinstance(args[1], Sham) and not isinstance(args[0], Sham)
        )
        if func in _READS or masks or comes:
            self.waits[_place()] += 1

    def moved(self, model: nn.Module) -> nn.Module:
        """Move parameters and buffers of a model there, in place."""
        made: dict[int, Tensor] = {}
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        own: Tensor = Sham(tensor.detach())
                        made.setdefault(id(tensor), nn.Parameter(own, False) if table is module._parameters else own)
                        table[name] = made[id(tensor)]  # pyright: ignore[reportArgumentType]
        return model


def _inside(value: Any) -> Any:
    if isinstance(value, Sham):
        return value.held
    return HERE if isinstance(value, torch.device) else value


def _place() -> str:
    """Where in the package the code is that runs."""
    frame: Any = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if "/multipruner/" in path and "/tests/" not in path and "/site-packages/" not in path:
            return f"{path.rpartition('/multipruner/')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"
