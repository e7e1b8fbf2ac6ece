"""What the engine's passes over text cost done plainly, and as the engine does them on a CPU.

    python benchmarks/passes.py [--model llama] [--sequences 8] [--length 512] [--threads N] [--repeats 3]
        [--compute-dtype auto] [--record FILE]

Printed are the best of some repeats, in milliseconds: one decoder layer's attention block on all sequences, one new
token for 64 of them with a full cache (as when text is sampled), the second moments of one MLP's channels, all
statistics, the losses of all tokens from their final hidden states, and the order of one MLP's channels. Plain are
stock attention and a stock cache of fixed size, products in full float32, all logits at once, and an elimination whose
matrices keep their size. Weights are held in the type that the engine would compute in here.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from results import Cell, flag, markdown, record
from torch import Tensor
from transformers import StaticCache

from multipruner.config.recipe import Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.engine import moments as statistics
from multipruner.engine import prunable as engine
from multipruner.engine.cutting import Projection
from multipruner.engine.grouped_attention import grouped_attention, narrow_cache
from multipruner.engine.precision import Precision
from multipruner.engine.prunable import Prunable
from multipruner.engine.token_losses import NegativeLogLikelihood, Scores, tokens_at_once
from multipruner.importance import second_order
from multipruner.recipes import mapping_for
from multipruner.sources.dense import load_dense
from multipruner.sources.filled_cache import cache_for
from multipruner.sources.resolve import resolve

SAMPLED = 64


@contextmanager
def unchanged(*_: Any) -> Iterator[None]:
    """In place of what makes a difference."""
    yield


class InFull:
    """Weights and inverse second moments for an elimination that moves nothing: what left is zero, and still there."""

    def __init__(self, weight: Tensor, inverse: Tensor, size: int) -> None:
        assert size == 1
        self.weight, self.inverse, self.groups = weight.clone(), inverse, torch.arange(len(inverse))

    @property
    def there(self) -> int:
        return len(self.groups)

    def prices(self) -> Tensor:
        return self.weight[:, self.groups].square().sum(dim=0) / self.inverse.diagonal()[self.groups]

    def remove(self, out: Tensor) -> None:
        self.groups = self.groups[torch.isin(self.groups, out, invert=True)]
        rows = self.inverse[out]
        solved = torch.linalg.solve(rows[:, out], rows)
        self.weight -= self.weight[:, out] @ solved
        self.inverse -= rows.T @ solved
        self.weight[:, out] = 0
        self.inverse[out] = 0
        self.inverse[:, out] = 0
        self.inverse[out, out] = 1


@contextmanager
def stock() -> Iterator[None]:
    """Everything done plainly."""
    with (
        mock.patch.object(engine, "grouped_attention", unchanged),
        mock.patch.object(statistics, "products_of", unchanged),
        mock.patch.object(statistics, "_PASS_TOKENS", statistics.BATCH_TOKENS),
        mock.patch.object(Scores, "_parted", lambda *_: None),
        mock.patch.object(second_order, "Elimination", InFull),
    ):
        yield


def best(repeats: int, work: Callable[[], object]) -> float:
    """Milliseconds of the fastest of some repeats, after one that does not count."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return 1000 * min(taken)


def passes(model: Any, ids: Tensor) -> dict[str, Callable[[], object]]:
    """Name -> work, on token ids [sequences, length]."""
    prunable, (sequences, length) = Prunable.of(model), ids.shape
    inputs, dtype = prunable.inputs(ids), prunable.head_weight.dtype
    chance = torch.Generator().manual_seed(0)
    attention, mlp = (prunable.anatomy.at(0, kind) for kind in ("attention", "mlp"))
    rows = torch.randn(sequences * length, *prunable.dense[mlp], generator=chance).to(dtype)
    total = torch.zeros(rows.shape[1], rows.shape[1])
    normed, labels = prunable.normed(inputs.hidden).flatten(0, 1), ids.flatten()
    scores, loss = Scores(prunable.head), NegativeLogLikelihood(labels)
    block = prunable.block_spec(mlp)
    down = Projection.of(prunable.dense_output(mlp), block.transposed).weight.detach().float()

    def moments() -> None:
        with statistics.products_of(rows.dtype):
            statistics.add_moments(total, rows.float())

    def losses() -> None:
        for begin in range(0, len(labels), chunk := tokens_at_once(prunable.head_weight)):
            loss(scores, normed[begin : begin + chunk], slice(begin, begin + chunk))

    def order() -> object:
        gram = rows.float().T @ rows.float() / len(rows)
        return second_order.elimination_order(down, gram, groups=len(gram))

    return {
        "an attention block": lambda: prunable.block(inputs.hidden, inputs, attention, prunable.dense[attention]),
        f"one more token of {SAMPLED} sequences": one_more_token(model, ids),
        "second moments of one MLP": moments,
        "all moments": lambda: statistics.gather(prunable, ids),
        "losses of all tokens": losses,
        "the order of one MLP's channels": order,
    }


def one_more_token(model: Any, ids: Tensor) -> Callable[[], object]:
    """The last step of sampling: a cache of fixed size, or one of which only what is filled is read."""
    many, length = ids.repeat(SAMPLED // len(ids) + 1, 1)[:SAMPLED], ids.shape[1]
    plain: Any = StaticCache(config=model.config, max_cache_len=length)
    model(input_ids=many[:, :-1], past_key_values=plain, logits_to_keep=1)
    with grouped_attention(model):
        ours: Any = cache_for(model, length, narrow_cache(model))
    for number, layer in enumerate(plain.layers):
        ours.update(layer.keys[:, :, : length - 1], layer.values[:, :, : length - 1], number)

    def token() -> None:
        cache = plain if engine.grouped_attention is unchanged else ours
        for layer in cache.layers:  # the same place again
            layer.cumulative_length = torch.tensor(length - 1)
            layer._filled = length - 1
        with engine.grouped_attention(model):
            model(input_ids=many[:, -1:], past_key_values=cache)

    return token


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compute-dtype", default="auto")
    flag(parser)
    typed = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(typed.threads)
    recipe = Recipe.build(mapping_for(typed.model))
    model, _ = load_dense(resolve(recipe, print), recipe)
    precision = Precision.of(model, typed.compute_dtype)
    precision.held(model)
    print(precision.line())
    with grouped_attention(model):
        print(f"{model.dtype}, {model.device.type}, {typed.threads} threads, attention: ", end="")
        print(model.config._attn_implementation)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (typed.sequences, typed.length), generator=torch.Generator().manual_seed(0))
    heading = f"{typed.sequences} x {typed.length} tokens"
    columns = ((heading, "{}"), ("plain, ms", "{:.1f}"), ("here, ms", "{:.1f}"), ("times faster", "{:.1f}"))
    rows: list[list[Cell]] = []
    for name, work in passes(model, ids.to(model.device)).items():
        with stock():
            before = best(typed.repeats, work)
        after = best(typed.repeats, work)
        rows.append([name, before, after, before / after])
    print(markdown(columns, rows))
    record(
        typed.record,
        "passes",
        columns,
        rows,
        setting={"model": typed.model, "dtype": str(precision.stored), "computed": str(precision.computed)},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
