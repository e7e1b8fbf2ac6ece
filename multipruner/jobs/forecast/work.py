"""How much a run computes, stage by stage, counted from its recipe: arithmetic, which measures nothing.

A token-layer is one token through one decoder layer. Losses, moments and repairs are counted as the engine makes them:
what is below the first block that differs is known (:mod:`multipruner.engine.objective`), so a candidate costs the
blocks from there on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ABANDONED = 0.6
"""Share of a candidate's work that a greedy step does: those that are worse than the second best are left early."""
_TRIANGLE = 256
"""Columns whose second moments are taken together (:func:`multipruner.engine.moments.add_moments`)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a dense model its work depends on.

    Attributes:
        inputs: columns of the output projection of every residual block, in their order; 0 where it has no single one.
        weights: multiply-accumulates of every block for one token.
        hidden: size of the residual stream.
        head: multiply-accumulates of the output head for one token.
        layers: decoder layers.
    """

    inputs: tuple[int, ...]
    weights: tuple[float, ...]
    hidden: int
    head: int
    layers: int

    @property
    def blocks(self) -> int:
        """Residual blocks."""
        return len(self.inputs)

    @property
    def share(self) -> float:
        """What a residual block is of a decoder layer, in the mean."""
        return self.layers / self.blocks

    @property
    def layer_weight(self) -> float:
        """Multiply-accumulates of the mean layer for one token."""
        return sum(self.weights) / self.layers


@dataclass(frozen=True, slots=True)
class Texts:
    """Sizes of the texts of a run, in sequences.

    Attributes:
        length: tokens of every sequence.
        scored: that structures are judged on.
        sketched: of these, that the first tables are judged on.
        statistics: that the last repair, and where nothing else is said second moments, are of; 0: none.
        ordered: of these, that second moments are of.
        sampled: that the model still has to write.
        side_by_side: that it writes at once.
        evaluated: tokens of the text for perplexity, in sequences of :attr:`evaluated_length`.
        evaluated_length: tokens of each.
    """

    length: int
    scored: int
    sketched: int
    statistics: int = 0
    sampled: int = 0
    side_by_side: int = 64
    evaluated: int = 0
    evaluated_length: int = 2048
    ordered: int | None = None

    @property
    def of_moments(self) -> int:
        """Sequences that second moments are of."""
        return self.statistics if self.ordered is None else min(self.ordered, self.statistics)


@dataclass(frozen=True, slots=True)
class Work:
    """Amounts that a machine has rates for; they add up.

    Attributes:
        token_layers: tokens times layers that are run, blocks that are gone left out.
        dense_layers: the same in the time of dense layers: a narrower block takes its share of one.
        turned_layers: of layers besides, run for a gradient with respect to their input, and back.
        long_layers: of sequences as long as the evaluation's, in the time of dense layers.
        head_tokens: tokens whose distribution over the vocabulary is computed.
        steps: decoding steps: (sequences side by side, how many steps).
        products: floating-point operations of large products of matrices, beside those of the layers.
        updates: of eliminations, which change a whole matrix by a few of its rows at a time.
        disk: bytes written.
        walks: how many times all layers come in from disk.
    """

    token_layers: float = 0.0
    dense_layers: float = 0.0
    long_layers: float = 0.0
    head_tokens: float = 0.0
    steps: tuple[tuple[int, int], ...] = ()
    products: float = 0.0
    updates: float = 0.0
    disk: float = 0.0
    walks: float = 0.0
    turned_layers: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, name) + getattr(other, name) for name in Work.__slots__))

    def __bool__(self) -> bool:
        return self != Work()


def passes(tokens: float, shape: Shape, *, heads: float = 0.0, share: float = 1.0) -> Work:
    """Return tokens through all layers of a model, ``heads`` times through its head too; ``share`` of its layers'
    work is left in a pruned one.
    """
    layers = tokens * shape.layers
    return Work(token_layers=layers, dense_layers=share * layers, head_tokens=heads * tokens)


def text(texts: Texts, shape: Shape, *, checked: bool = False) -> Work:
    """Return sampling, and one loss of the dense model on the text for scores (``checked``: and on the text at the
    end).
    """
    work = passes(texts.scored * texts.length, shape, heads=1)
    whole, rest = divmod(texts.sampled, texts.side_by_side)
    batches = ((texts.side_by_side, whole), (rest, 1))
    steps = tuple((rows, count * (texts.length - 1)) for rows, count in batches if rows and count)
    work += Work(token_layers=texts.sampled * (texts.length - 1) * shape.layers, steps=steps)
    if checked:
        work += evaluation(1, texts.evaluated_length, shape)
    return work


def statistics(texts: Texts, shape: Shape, *, eliminates: bool) -> Work:
    """Return second moments of all blocks' inputs, and the orders that an elimination makes of them."""
    tokens = texts.of_moments * texts.length
    if not tokens:
        return Work()
    work = passes(tokens, shape) + Work(products=sum(tokens * n * (n + _TRIANGLE) for n in shape.inputs))
    cubes = sum(float(n) ** 3 for n in shape.inputs)
    return work + Work(products=cubes, updates=2 * cubes) if eliminates else work


@dataclass(frozen=True, slots=True)
class Candidate:
    """A structure that is scored: one block changed, everything from it on run again.

    Attributes:
        block: its place among the residual blocks.
        kept: share of the dense block that stays.
    """

    block: int
    kept: float


@dataclass(frozen=True, slots=True)
class Base:
    """What the candidates of a round are compared with: the share of every dense block that is there."""

    kept: tuple[float, ...]

    def from_block(self, block: int, shape: Shape) -> tuple[int, float]:
        """Return residual blocks that are there from one on, and the same in dense layers' time."""
        rest = list(zip(self.kept[block:], shape.weights[block:], strict=True))
        return sum(kept > 0 for kept, _ in rest), sum(kept * weight for kept, weight in rest) / shape.layer_weight


def losses(candidates: Sequence[Candidate], base: Base, tokens: float, shape: Shape, *, refit: bool) -> Work:
    """Return losses of candidates around a base; ``refit``: their narrowed blocks are repaired first."""
    count, time, products = 0.0, 0.0, 0.0
    for one in candidates:
        blocks, dense = base.from_block(one.block + 1, shape)
        count += blocks + (one.kept > 0)
        time += dense + one.kept * shape.weights[one.block] / shape.layer_weight
        if refit and 0 < one.kept < 1:
            products += refitted(shape.inputs[one.block], one.kept, shape.hidden)
    return Work(tokens * count * shape.share, tokens * time, head_tokens=tokens * len(candidates), products=products)


def refitted(columns: int, kept: float, hidden: int) -> float:
    """Return operations of one output projection's closed-form repair: a factorisation, the right side, its
    solution.
    """
    k = kept * columns
    return k**3 / 3 + 2 * hidden * (columns - k) * k + 2 * hidden * k * k


def tables(
    rounds: Sequence[Sequence[Candidate]],
    base: Base,
    texts: Texts,
    shape: Shape,
    *,
    kl: bool,
    refit: bool,
    solutions: int = 5,
) -> Work:
    """Return the exact program's losses: the dense model, the first tables, and every round around its best structure.

    Args:
        rounds: what each measures, block by block; the first holds the first tables.
        base: a structure such as the rounds will find.
        texts, shape: of the run.
        kl: whether losses are divergences from the dense model, which is described first.
        refit: whether candidates are scored with their repair.
        solutions: that a round after the first measures: the free one, and those with few changes.
    """
    tokens, few = texts.scored * texts.length, texts.sketched * texts.length
    dense, (blocks, time) = Base((1.0,) * shape.blocks), base.from_block(0, shape)
    whole = Work(tokens * blocks * shape.share, tokens * time, head_tokens=tokens)
    # states of the dense model for both texts; described first where losses are divergences, then its own loss
    work = sum((passes(part, shape, heads=3 if kl else 1) for part in {tokens, few}), Work())
    for number, candidates in enumerate(rounds):
        if number:
            work += losses(candidates, base, tokens, shape, refit=refit)
            again = Work(whole.token_layers, whole.dense_layers)  # the states of the new base
            work += sum([whole] * solutions, again)
        else:
            work += losses(candidates, dense, few, shape, refit=refit) + whole
    return work


def energies(tokens: float, shape: Shape, ran: Mapping[int, Sequence[float]]) -> Work:
    """Return the backward pass that sensitivities come from: every block forward, again (but the first), and back; and
    one more walk in which blocks are run at several sizes (``ran``: the shares of the dense block that these have).
    """
    share, last = tokens * shape.share, max(ran, default=-1) + 1
    again, sizes = share * (shape.blocks - 1), last + sum(kept > 0 for row in ran.values() for kept in row)
    time = sum(shape.weights[:last]) + sum(sum(row) * shape.weights[block] for block, row in ran.items())
    at_sizes = Work(share * sizes, tokens * time / shape.layer_weight)
    return at_sizes + Work(
        share * shape.blocks + again, share * shape.blocks, head_tokens=3 * tokens, turned_layers=again
    )


def path(
    candidates: Mapping[str, int], texts: Texts, shape: Shape, *, kl: bool, left: float, finished: float = ABANDONED
) -> Work:
    """Return the greedy path's losses: blocks on all sequences, widths on the first of them.

    Args:
        candidates: how many are compared, by dimension.
        texts, shape: of the run.
        kl: as for :func:`tables`.
        left: share of the decoder layers that stays at the end.
        finished: share of a candidate's work that is done.
    """
    share, work = (1 + left) / 2, Work()
    tokens = {name: (texts.scored if name == "blocks" else texts.sketched) * texts.length for name in candidates}
    for part in {texts.scored * texts.length, texts.sketched * texts.length}:
        work += passes(part, shape, heads=2 * kl)
    for name, count in candidates.items():
        steps = count / max(1, shape.blocks)  # after each, the states above the change are computed anew
        layers = tokens[name] * shape.layers / 2 * share * (finished * count + steps)
        work += Work(layers, layers, head_tokens=finished * count * tokens[name])
    return work


def last_repair(texts: Texts, shape: Shape, *, left: float, gain: bool, kl: bool, gain_tokens: int) -> Work:
    """Return every output projection refitted on the pruned model's stream, the last norm, and losses before and after.

    Args:
        texts, shape: of the run.
        left: share of the decoder layers that stays.
        gain: whether the gain of the last norm is fitted, on ``gain_tokens`` tokens at most.
        kl: as for :func:`tables`.
        gain_tokens: see ``gain``.
    """
    tokens, judged = texts.statistics * texts.length, texts.scored * texts.length
    work = passes(tokens, shape) + passes(tokens, shape, share=left)
    for n in (left * n for n in shape.inputs):
        work += Work(products=tokens * n * (n + _TRIANGLE) + 4 * tokens * n * shape.hidden + n**3 / 3)
    if gain:
        few = min(tokens, gain_tokens)
        work += Work(head_tokens=4 * few, products=4 * few * shape.hidden * (shape.hidden + _TRIANGLE))
    work += passes(judged, shape, heads=2) if kl else Work()
    return work + sum([passes(judged, shape, heads=1, share=left)] * (2 + gain), Work())


def evaluation(sequences: int, length: int, shape: Shape, share: float = 1.0) -> Work:
    """Return perplexity of one model, of whose layers a share is left."""
    layers = sequences * length * shape.layers
    return Work(token_layers=layers, long_layers=share * layers, head_tokens=sequences * length)


def writing(bytes_: float) -> Work:
    """Return the checkpoint."""
    return Work(disk=bytes_)
