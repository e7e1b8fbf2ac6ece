"""What a row says of one residual block: its modules, its tensors and how they lie over the block's axes; and what such
a block weighs at any size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import NamedTuple

from .axes import BLOCK_KINDS, STREAM, VALUES, Counts
from .layout import Layout
from .structure import Size, counts_of


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor of a block.

    Attributes:
        path: within the block's module.
        dims: the layout of each of its dimensions, in the tensor's own order.
    """

    path: str
    dims: tuple[Layout, ...]

    def __post_init__(self) -> None:
        for layout in self.dims:  # what cannot be cut is refused where it is written
            layout.index({}, dict.fromkeys(layout.names, 1))

    @property
    def multiplies(self) -> bool:
        """Whether it is a matrix, unlike the gains of a norm over several heads, and biases of experts."""
        return multiplies(self.dims) and not self.path.endswith("bias")

    @property
    def weighed(self) -> tuple[Layout, ...]:
        """Its dimensions as costs are counted of them: a row of numbers, where these are many and no matrix."""
        if len(self.dims) != 2 or self.multiplies:
            return self.dims
        return (Layout(" * ".join(f"({layout.text})" for layout in self.dims)),)

    def shape(self, counts: Counts) -> tuple[int, ...]:
        """Return the lengths of its dimensions."""
        return tuple(layout.size(counts) for layout in self.dims)


Tensors = tuple[TensorSpec, ...]
CONFIG = "config."
"""How an attribute of a module's configuration begins."""

STATES = frozenset(("hidden", "query_latent", "latent", "expert_latent"))
"""What matrices are from or to: the hidden states, and what queries, keys and values, or experts have made narrower."""


def multiplies(dims: tuple[Layout, ...]) -> bool:
    """Tell whether a tensor of these dimensions is a matrix from or to some states."""
    return len(dims) == 2 and any(STATES & set(layout.names) for layout in dims)


def linear(path: str, rows: str, columns: str) -> Tensors:
    """Return the tensors of an ``nn.Linear``: weight [rows, columns], and a bias [rows] where there is one."""
    return (TensorSpec(f"{path}.weight", (Layout(rows), Layout(columns))), TensorSpec(f"{path}.bias", (Layout(rows),)))


def conv1d(path: str, rows: str, columns: str) -> Tensors:
    """Return the tensors of transformers' ``Conv1D``, which holds a linear layer's weight transposed: [columns,
    rows].
    """
    return (TensorSpec(f"{path}.weight", (Layout(columns), Layout(rows))), TensorSpec(f"{path}.bias", (Layout(rows),)))


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One residual block of a decoder layer: ``x + gain * after(output(f(inputs(before(x)))))``; paths in the layer.

    Attributes:
        kind: what it is.
        path: its module within the decoder layer; empty where it is none, but ``steps`` of the layer itself.
        steps: what it runs one after the other, within the layer, where it is no module.
        before: the norm of what goes into it; empty where it has none.
        after: the norm of what comes out of it; empty where it has none.
        gain: the attribute of the layer, or of a module of it, that what it adds is multiplied by (``scale.weight``);
            empty where it has none. Such a module leaves with the block.
        tensors: its tensors that depend on its size, some of which a model may lack (biases). A matrix from the hidden
            states that is not the output's is an input projection.
        output: its output projection, within its module; the columns lie unit by unit. Empty where it has no single
            one, as experts have not: such a block is cut and never refitted.
        routed: its module of experts, within its module, that is called with (tokens [tokens, hidden_size], the experts
            of each [tokens, some], their weights, alike); empty where it has none. The last stack of matrices in
            ``tensors`` is the outputs'.
        attributes: attributes of its module that depend on its size, and what they are; those that its forward reads
            off the module's configuration begin with ``config.``.
        arguments: whether it is called with all that the layer is called with (masks, rotary embeddings, the cache), as
            attention is, or with the normed hidden states alone.
        cached: how many numbers it holds per token of context, in the order of the cache.
        scores: multiply-accumulates per token and token of context, beside those of its tensors.
        cache: the attribute of its module that names its slot in the KV cache; empty where it has none.
        resized: whether its constructor knows no size but the dense one, so that it is built so and then cut.
        parallel: whether it reads the stream as the block before it does, beside that, rather than what that leaves.
        recurrent: whether it goes through a text piece by piece, with a state that each hands on to the next.
        added_to: whether the layer adds in place to what its module returns, which then has to be of full shape.
        handed: whether its module is also given the residual stream (``residual``, behind the hidden states), and
            returns that with what it adds.
        paired: whether its module, called with hidden states alone, returns them with something that nobody reads.
    """

    kind: str
    path: str
    tensors: Tensors
    output: str
    before: str = ""
    after: str = ""
    gain: str = ""
    attributes: tuple[tuple[str, Layout], ...] = ()
    arguments: bool = False
    cached: tuple[Layout, ...] = ()
    scores: tuple[Layout, ...] = ()
    cache: str = ""
    resized: bool = False
    parallel: bool = False
    added_to: bool = False
    handed: bool = False
    paired: bool = False
    steps: tuple[str, ...] = ()
    routed: str = ""
    recurrent: bool = False

    @property
    def norms(self) -> tuple[str, ...]:
        """The norms before and after it, and the module that scales what it adds."""
        return tuple(filter(None, (self.before, self.after, self.gain.rpartition(".")[0])))

    def within(self, name: str) -> str:
        """Return the path in the layer of what is in it."""
        return f"{self.path}.{name}" if self.path else name

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules of the layer that are its own: itself, or those of its steps that have weights, in order."""
        owners = dict.fromkeys(tensor.path.rpartition(".")[0] for tensor in self.tensors)
        return tuple(owners) if self.steps else (self.path,)

    @property
    def gives(self) -> str:
        """The module of the layer that returns what it gives."""
        return self.within(self.output) if self.steps else self.path

    @property
    def valued(self) -> tuple[str, str] | None:
        """The projections that give values and that read what attention makes of them, where value dimensions can
        leave: the code between them knows heads of their dense width alone. ``None`` where they cannot.
        """
        rows = self.giving(VALUES)
        return (rows[0].path.rpartition(".")[0], self.output) if rows else None

    def giving(self, axis: str) -> Tensors:
        """Return the weights of the input projections whose rows lie over an axis."""
        return tuple(tensor for tensor in self._matrices if axis in tensor.dims[0].names)

    @property
    def own_attributes(self) -> tuple[tuple[str, Layout], ...]:
        """The attributes that the module has itself."""
        return tuple(row for row in self.attributes if not row[0].startswith(CONFIG))

    @property
    def settings(self) -> tuple[str, ...]:
        """The keys of the configuration that its forward reads, which are its layer's own."""
        return tuple(name.removeprefix(CONFIG) for name, _ in self.attributes if name.startswith(CONFIG))

    @property
    def inputs(self) -> Tensors:
        """The weights of the input projections."""
        if self.routed:
            return tuple(each for each in self.tensors if len(each.dims) == 3)[:-1]
        return tuple(tensor for tensor in self._matrices if any("hidden" in layout.names for layout in tensor.dims))

    @property
    def feeding(self) -> Tensors:
        """The weights whose rows give the units of its axes: the input projections, where nothing lies between."""
        if self.routed:
            return self.inputs
        return tuple(tensor for tensor in self._matrices if any(layout.axes for layout in tensor.dims))

    @property
    def _matrices(self) -> Tensors:
        own = f"{self.output}.weight"
        return tuple(tensor for tensor in self.tensors if tensor.multiplies and tensor.path != own)

    @property
    def weight(self) -> TensorSpec:
        """The weight of the output projection."""
        return next(tensor for tensor in self.tensors if tensor.path == f"{self.output}.weight")

    @property
    def transposed(self) -> bool:
        """Whether the output projection's weight is [columns, hidden_size], as a ``Conv1D`` has it."""
        return bool(self.weight.dims[0].axes)

    def width(self, counts: Counts) -> int:
        """Tell how many columns the output projection has; 0 where there is no single one."""
        return self.columns.size(counts) if self.output else 0

    @property
    def columns(self) -> Layout:
        """How the columns of the output projection lie: one for every input of it."""
        return self.weight.dims[0 if self.transposed else 1]


class Amounts(NamedTuple):
    """What a block of some size weighs.

    Attributes:
        parameters: of it and of the norms that go with it.
        products: multiply-accumulates of its matrices for one token (no norms, no biases).
        cached: numbers that it keeps per token of context.
        scores: multiply-accumulates per token and token of context, beside those of its matrices."""

    parameters: int
    products: int
    cached: int
    scores: int


@dataclass(frozen=True)
class BlockCost:
    """What one residual block weighs at any size.

    Attributes:
        kind, constants: of the block, and the numbers that no size changes, by their names in layouts.
        fixed: parameters that stay as long as the block does, the norms that leave with it among them.
        tensors: the layouts of the tensors that depend on its size.
        cached, scores: see :class:`BlockSpec`.
        products: multiply-accumulates of matrices that stay as long as the block does, for one token.
        stream: how many of ``fixed`` there are for every dimension of the residual stream."""

    kind: str
    constants: Counts
    fixed: int
    tensors: tuple[tuple[Layout, ...], ...]
    cached: tuple[Layout, ...] = ()
    scores: tuple[Layout, ...] = ()
    products: int = 0
    stream: int = 0
    _known: dict[Size, Amounts] = field(default_factory=dict, repr=False, compare=False)

    def __call__(self, size: Size) -> Amounts:
        """Return the amounts of a block of this size; all zero where it is gone."""
        if size not in self._known:
            self._known[size] = self._amounts(size) if size else Amounts(0, 0, 0, 0)
        return self._known[size]

    def _amounts(self, size: Size) -> Amounts:
        counts = {**self.constants, **counts_of(self.kind, size)}

        def lengths(layouts: tuple[Layout, ...]) -> list[int]:
            return [layout.size(counts) for layout in layouts]

        matrices = [lengths(dims) for dims in self.tensors if multiplies(dims)]
        # a tensor of three dimensions is a stack of matrices, of which a token meets some
        met = counts.get(BLOCK_KINDS[self.kind].finest.active, 1)
        matrices += [[met, *lengths(dims[1:])] for dims in self.tensors if len(dims) == 3]
        return Amounts(
            self.fixed + sum(prod(lengths(dims)) for dims in self.tensors),
            self.products + sum(map(prod, matrices)),
            sum(lengths(self.cached)),
            sum(lengths(self.scores)),
        )

    def narrowed(self, hidden: int) -> BlockCost:
        """Return the cost of the same block on a residual stream of another width."""
        axis = STREAM.axes[0].name
        fixed = self.fixed - self.stream * (self.constants[axis] - hidden)
        return replace(self, constants={**self.constants, axis: hidden}, fixed=fixed, _known={})
