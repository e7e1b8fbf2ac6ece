"""How fast this machine runs this model, measured in some hundred milliseconds."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from multipruner.core.families import cache_argument
from multipruner.engine.grouped_attention import grouped_attention, narrow_cache
from multipruner.engine.layer_calls import State
from multipruner.engine.moments import add_moments, products_of
from multipruner.engine.prunable import Prunable
from multipruner.engine.token_losses import NegativeLogLikelihood, Scores, drawn, tokens_at_once
from multipruner.importance.energies import frozen, gradients_before, parts_of
from multipruner.importance.second_order import ROUNDS, Elimination
from multipruner.sources.filled_cache import cache_for
from multipruner.sources.sampled_text import threads_for

from .work import Work

PASS_TOKENS = 1024
"""Through one layer, for its rate."""
ROWS = (4, 16)
"""Sequences of the two decoding steps between and beyond which a step's seconds lie on a line."""
STEPS = 3
"""Times that each of them is timed, in turn."""
SIDE = 1536
"""Of the largest matrix that is multiplied for the measurement."""
DISK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of one unit of every kind of work.

    Attributes:
        layer: one token through one dense decoder layer, in sequences as long as the calibration's.
        long_layer: the same in sequences as long as the evaluation's.
        head: one token through the head, to its loss.
        step: one decoding step whatever its batch; ``step_row``: and for each of its sequences.
        product: one floating-point operation of a product in float32, of moments.
        update: one of an update by few rows.
        byte: one byte written.
        walk: all layers, one after another, come in from disk, where the system holds their files.
        turn: one token through one dense decoder layer for a gradient with respect to its input, and back.
    """

    layer: float
    long_layer: float
    head: float
    step: float
    step_row: float
    product: float
    update: float
    byte: float
    walk: float = 0.0
    turn: float = 0.0

    def seconds(self, work: Work) -> float:
        """Return what some work takes."""
        decoding = sum(count * (self.step + rows * self.step_row) for rows, count in work.steps)
        return (
            decoding
            + work.dense_layers * self.layer
            + work.long_layers * self.long_layer
            + work.head_tokens * self.head
            + work.products * self.product
            + work.updates * self.update
            + work.disk * self.byte
            + work.walks * self.walk
            + work.turned_layers * self.turn
        )

    def to_json(self) -> dict[str, float]:
        """Tell by name, in seconds."""
        return asdict(self)


@torch.inference_mode()
def measured(
    prunable: Prunable,
    *,
    layers: int,
    length: int,
    long: int,
    samples: bool,
    place: Path,
    sequences: int = 4,
    turns: bool = False,
) -> Rates:
    """Measure: a layer at two lengths, the head, a decoding step at two sizes, moments, an update, and the disk.

    Args:
        prunable: the model, or a stand-in of the same sizes with fewer layers.
        layers: of the model itself; a step of a stand-in is scaled to them.
        length, long: tokens of the sequences that run.
        samples: whether decoding is needed at all.
        place: a folder, whose disk is written to.
        sequences: of the calibration that run together.
        turns: whether gradients are needed at all.
    """
    clock = _Clock(prunable)
    rows = max(1, min(sequences, PASS_TOKENS // length))
    layer = clock.layer(rows, length) / (rows * length)
    at_once, on_cpu = tokens_at_once(prunable.head_weight), prunable.model.device.type == "cpu"
    head = clock.head(min(at_once, 128) if on_cpu else at_once)
    step, per_row = clock.steps(layers, length) if samples else (0.0, 0.0)
    long_layer = layer if long == length else clock.layer(1, long) / long
    product, update = clock.algebra()
    turn = clock.turn(length) / length if turns else 0.0
    return Rates(layer, long_layer, head, step, per_row, product, update, _disk(place), clock.walk(layers), turn)


class _Clock:
    """Times single pieces of a model."""

    def __init__(self, prunable: Prunable) -> None:
        self._prunable, self._device = prunable, prunable.model.device

    def best(self, work: Callable[[], object], repeats: int = 2) -> float:
        """Return seconds of the fastest of some repeats, after one that does not count."""
        taken = []
        for _ in range(1 + repeats):
            began = time.perf_counter()
            work()
            if self._device.type != "cpu":
                torch.accelerator.synchronize(self._device)
            taken.append(time.perf_counter() - began)
        return min(taken[1:])

    def layer(self, rows: int, length: int) -> float:
        """Return one dense layer on so many sequences."""
        prunable, blocks = self._prunable, self._typical()
        inputs = prunable.inputs(torch.zeros(rows, length, dtype=torch.int64, device=self._device))

        def run() -> None:
            state: State = inputs.hidden
            for block in blocks:
                state = prunable.block(state, inputs, block, prunable.dense[block])

        return self.best(run)

    @torch.inference_mode(False)
    def turn(self, length: int) -> float:
        """Return one dense layer on one sequence, and back to the gradient with respect to its input."""
        prunable, blocks = self._prunable, self._typical()
        with frozen(prunable.model), torch.no_grad():
            inputs = prunable.inputs(torch.zeros(1, length, dtype=torch.int64, device=self._device))
            states: list[State] = [inputs.hidden]
            for block in blocks:
                states.append(prunable.block(states[-1], inputs, block, prunable.dense[block]))

            def run() -> None:
                gradients = tuple(map(torch.ones_like, parts_of(states[-1])))
                for block, state in zip(reversed(blocks), states[-2::-1], strict=True):
                    gradients = gradients_before(prunable, state, inputs, block, gradients)

            return self.best(run)

    def _typical(self) -> Sequence[int]:
        """Return the blocks of the dense layer whose work is nearest to the mean layer's."""
        anatomy, costs, dense = self._prunable.anatomy, self._prunable.costs, self._prunable.dense
        works = [sum(costs.blocks[block](dense[block]).products for block in anatomy.of_layer(layer))
                 for layer in range(anatomy.layers)]  # fmt: skip
        nearest = min(range(anatomy.layers), key=lambda layer: abs(works[layer] - sum(works) / len(works)))
        return anatomy.of_layer(nearest)

    def walk(self, layers: int) -> float:
        """Return all layers coming in, one after another."""
        layer = self._prunable.layer_of(0)
        return layers * self.best(lambda: [weight.clone() for weight in layer.parameters()])

    def head(self, tokens: int) -> float:
        """Return the head and the loss of one token."""
        prunable, weight = self._prunable, self._prunable.head_weight
        hidden = torch.full((tokens, weight.shape[1]), 0.1, dtype=weight.dtype, device=self._device)
        judge = NegativeLogLikelihood(torch.zeros(tokens, dtype=torch.int64, device=self._device))
        scores = Scores(prunable.head, prunable.cap)

        def run() -> None:
            judge(scores, hidden, slice(0, tokens))

        return self.best(run) / tokens

    def steps(self, layers: int, length: int) -> tuple[float, float]:
        """Return seconds of a decoding step: of any, and for every sequence in it."""
        few, many = ROWS
        costs = self._prunable.costs
        of_all = costs.constant + layers * costs.backbone_parameters(costs.dense) // costs.anatomy.layers
        with threads_for(of_all), grouped_attention(self._prunable.model):
            both = [self._step(rows, layers, length) for rows in (few, many)]
            # in turn: a machine that is slow for a moment must not take both ends of a line apart
            taken = [tuple(step() for step in both) for _ in range(STEPS)]
        first, last = map(min, zip(*taken, strict=True))
        per_row = max(0.0, last - first) / (many - few)
        return max(0.0, first - few * per_row), per_row

    def _step(self, rows: int, layers: int, length: int) -> Callable[[], float]:
        """Return a timer of one more token of so many sequences, at the mean room of a sampling, and its choice."""
        prunable, weight = self._prunable, self._prunable.head_weight
        model: Any = prunable.model
        cache, filled = cache_for(model, length + 8, narrow_cache(model)), max(1, length // 2)
        many = torch.zeros(rows, filled, dtype=torch.int64, device=self._device)
        name = cache_argument(model)
        cache = getattr(model(input_ids=many, use_cache=True, logits_to_keep=1, **{name: cache}), name)
        token = many[:, :1]
        hidden = torch.full((rows, weight.shape[1]), 0.1, dtype=weight.dtype, device=self._device)
        logits, draws = prunable.head(hidden), torch.full((rows, 1), 0.5)

        def run() -> None:
            nonlocal cache
            cache = getattr(model(input_ids=token, use_cache=True, **{name: cache}), name)

        def seconds() -> float:
            whole, head = self.best(run, 1), self.best(lambda: prunable.head(hidden), 1)
            choice = self.best(lambda: drawn(logits.float().softmax(-1), draws).cpu(), 1)
            return head + choice + max(0.0, whole - head) * layers / prunable.anatomy.layers

        return seconds

    def algebra(self) -> tuple[float, float]:
        """Return seconds of one operation: of second moments, and of an elimination's update."""
        columns = min(SIDE, max(*self._columns(), 16))
        rows = torch.full((256, columns), 0.5, device=self._device)
        total = torch.zeros(columns, columns, device=self._device)

        def moments() -> None:
            with products_of(self._prunable.head_weight.dtype):
                add_moments(total, rows)

        product = self.best(moments) / (len(rows) * columns * (columns + 256))
        outputs = torch.full((self._prunable.head_weight.shape[1], columns), 0.5, device=self._device)
        noise = torch.rand(columns, columns, generator=torch.Generator().manual_seed(0))  # zeros would be quicker
        inverse = (noise / columns).to(self._device) + torch.eye(columns, device=self._device)
        state = Elimination(outputs, inverse, 1)
        few = max(1, columns // ROUNDS)

        def update() -> None:
            state.remove(state.groups[torch.sort(state.prices(), stable=True).indices[:few]])

        return product, self.best(update) / (2 * few * columns**2)

    def _columns(self) -> list[int]:
        """Return columns of the output projection of every block."""
        prunable = self._prunable
        return [prunable.block_spec(n).width(prunable.counts(n)) for n in range(len(prunable.anatomy))]


def _disk(place: Path) -> float:
    """Return seconds for a byte to reach the disk of a folder; a guess where nothing can be written there."""
    data = os.urandom(DISK_BYTES)
    with suppress(OSError), tempfile.TemporaryFile(dir=place) as file:
        began = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return (time.perf_counter() - began) / DISK_BYTES
    return 1e-8
