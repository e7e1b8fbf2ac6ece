"""How the dimensions of tensors lie over axes.

A tensor's dimension has a *layout*, such as ``kv_groups * queries * head_dim``. What stays of the dimension follows
from what stays of the axes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

from .axes import AXES, Counts, Kept, Selection

_Node = str | int | tuple[str, "_Node", "_Node"]
"""A name, a number, or a sum or product of two such."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a dimension of a tensor lies over axes: sums and products of axes, constants of the model and numbers.

    A product is nested, its first factor slowest: ``kv_groups * queries * head_dim``. A sum is one after the other:
    ``channels + channels`` is a fused gate and up, ``kv_groups * (queries + 2) * head_dim`` the queries of a KV group
    with its key and value behind them, group by group.

    Attributes:
        text: the expression.

    Raises:
        ValueError: when the text is no such expression.
    """

    text: str

    def __post_init__(self) -> None:
        _parsed(self.text)

    @property
    def axes(self) -> frozenset[str]:
        """The names in it along which something can be cut."""
        return frozenset(name for name in self.names if name in AXES)

    @property
    def names(self) -> tuple[str, ...]:
        """Axes and constants in it, in order."""
        return tuple(_names(_parsed(self.text)))

    def size(self, counts: Counts) -> int:
        """Return the length of the dimension.

        Args:
            counts: of every name in the layout.

        Raises:
            ValueError: naming what has no count.
        """
        return _size(_parsed(self.text), counts)

    def index(self, kept: Kept, dense: Counts) -> slice | tuple[int, ...]:
        """Return what stays of the dimension, in the order of what stays of its axes.

        Args:
            kept: what stays of the axes.
            dense: counts of the whole dimension.

        Returns:
            A slice where it is the beginning of the dimension, so that tensors can be views; indices otherwise.

        Raises:
            ValueError: when an axis is not multiplied with the one that it is within, to its left.
        """
        _check(_parsed(self.text), (), self.text)
        node, selected = _parsed(self.text), {name: _beginning(part) for name, part in kept.items()}
        length = _leading(node, selected, dense)
        return tuple(_elements(node, selected, dense, {})) if length is None else slice(0, length)

    def units(self, axis: str, dense: Counts) -> tuple[tuple[int, ...], ...]:
        """Return for every unit of an axis, group by group where it is within another one, what leaves with it.

        Args:
            axis: a name in :data:`AXES`.
            dense: counts of the whole dimension.
        """
        return _units(self, axis, tuple(sorted(dense.items())))


def kept_counts(kept: Kept, dense: Counts) -> dict[str, int]:
    """Tell how many units of every axis stay, constants as they are.

    Raises:
        ValueError: when units of an axis keep different numbers of those within them.
    """
    return {**dense, **{name: count_of(selection, name) for name, selection in kept.items()}}


def count_of(selection: Selection, name: str = "a block") -> int:
    """Tell how many units stay, of an axis within another one in each of that one's.

    Raises:
        ValueError: when units keep different numbers of those within them; it begins with the name.
    """
    if isinstance(selection, int):
        return selection
    lengths = {len(unit) for unit in selection if not isinstance(unit, int)}
    if len(lengths) > 1:
        raise ValueError(f"{name}: every unit must keep the same number, not {sorted(lengths)}")
    return lengths.pop() if lengths else len(selection)


def _beginning(selection: Selection) -> Selection:
    """Return the same as a number, where it is so many from the beginning (in every unit)."""
    if isinstance(selection, int):
        return selection
    inner = [unit for unit in selection if not isinstance(unit, int)]
    if not inner:
        return len(selection) if _in_order(cast(Sequence[int], selection)) else selection
    if len({len(unit) for unit in inner}) == 1 and all(_in_order(unit) for unit in inner):
        return len(inner[0])
    return selection


def _in_order(units: Sequence[int]) -> bool:
    return all(place == unit for place, unit in enumerate(units))


@cache
def _parsed(text: str) -> _Node:
    try:
        return _node(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError) as error:
        raise ValueError(f"layout {text!r}: expected sums and products of names and positive numbers") from error


def _node(tree: ast.expr) -> _Node:
    match tree:
        case ast.Name(id=name):
            return name
        case ast.Constant(value=int(number)) if number > 0 and number is not True:
            return number
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return ("+", _node(left), _node(right))
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _times(_node(left), _node(right))
    raise TypeError(ast.dump(tree))


def _times(left: _Node, right: _Node) -> _Node:
    """Return a product whose left side is no product itself, so that the slowest factor always stands alone."""
    if isinstance(left, tuple) and left[0] == "*":
        return ("*", left[1], _times(left[2], right))
    return ("*", left, right)


def _check(node: _Node, before: tuple[_Node, ...], text: str) -> None:
    """Look at every axis within another one: is that a factor before it?"""
    if isinstance(node, tuple):
        _check(node[1], before, text)
        _check(node[2], (*before, node[1]) if node[0] == "*" else before, text)
    elif isinstance(node, str) and node in AXES and AXES[node].within not in ("", *before):
        raise ValueError(f"layout {text!r}: {node} must be multiplied with {AXES[node].within}, to its left")


def _names(node: _Node) -> list[str]:
    if isinstance(node, tuple):
        return _names(node[1]) + _names(node[2])
    return [node] if isinstance(node, str) else []


def _size(node: _Node, counts: Counts) -> int:
    if isinstance(node, tuple):
        left, right = _size(node[1], counts), _size(node[2], counts)
        return left + right if node[0] == "+" else left * right
    if isinstance(node, int):
        return node
    if node not in counts:
        raise ValueError(f"nothing says how many {node} there are; known: {', '.join(sorted(counts))}")
    return counts[node]


def _leading(node: _Node, kept: Kept, dense: Counts) -> int | None:
    """Return the length of what stays if it is the beginning, else ``None``."""
    if isinstance(node, str):
        selection = kept.get(node, _size(node, dense))
        return selection if isinstance(selection, int) else None
    if isinstance(node, int):
        return node
    sign, left, right = node
    first, then = _leading(left, kept, dense), _leading(right, kept, dense)
    if sign == "*":
        if 0 in (first, then):
            return 0
        if first is None or then is None or (first > 1 and then < _size(right, dense)):
            return None
        return first * then
    if first is None or then is None or (then > 0 and first < _size(left, dense)):
        return None
    return first + then


def _elements(node: _Node, kept: Kept, dense: Counts, place: Mapping[str, int]) -> list[int]:
    """Return what stays, as numbers within the node.

    Args:
        node: a part of a layout.
        kept, dense: of its axes.
        place: for the axes to the left, which of the units that stay this is about.
    """
    if isinstance(node, int):
        return list(range(node))
    if isinstance(node, str):
        selection = kept.get(node, _size(node, dense))
        if isinstance(selection, int):
            return list(range(selection))
        chosen = selection[place[AXES[node].within]] if _is_nested(selection) else selection
        return list(cast(Sequence[int], chosen))
    sign, left, right = node
    outer = _elements(left, kept, dense, place)
    if sign == "+":
        return outer + [_size(left, dense) + element for element in _elements(right, kept, dense, place)]
    whole = _size(right, dense)
    if isinstance(left, str) and any(AXES[name].within == left for name in _names(right) if name in AXES):
        inner = [_elements(right, kept, dense, {**place, left: number}) for number in range(len(outer))]
    else:
        inner = [_elements(right, kept, dense, place)] * len(outer)
    return [at * whole + element for at, elements in zip(outer, inner, strict=True) for element in elements]


def _is_nested(selection: Sequence[int] | Sequence[Sequence[int]]) -> bool:
    return any(not isinstance(unit, int) for unit in selection)


@cache
def _units(layout: Layout, axis: str, counts: tuple[tuple[str, int], ...]) -> tuple[tuple[int, ...], ...]:
    dense, outer = dict(counts), AXES[axis].within
    found = []
    for group in range(dense[outer] if outer else 1):
        there: dict[str, Selection] = {outer: (group,)} if outer else {}
        nothing: Selection = ((),) if outer else ()
        without = set(_numbers(layout.index({**there, axis: nothing}, dense)))
        for unit in range(dense[axis]):
            alone = _numbers(layout.index({**there, axis: ((unit,),) if outer else (unit,)}, dense))
            found.append(tuple(number for number in alone if number not in without))
    return tuple(found)


def _numbers(index: slice | tuple[int, ...]) -> Sequence[int]:
    return range(index.stop) if isinstance(index, slice) else index
