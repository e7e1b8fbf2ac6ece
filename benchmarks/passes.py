"""What the engine's passes over text cost with stock attention and float32 products, and with what it uses on a CPU.

    python benchmarks/passes.py [--model llama] [--sequences 8] [--length 512] [--threads N] [--repeats 3]
        [--record FILE]

Printed are the best of some repeats, in milliseconds: one decoder layer's attention block on all sequences, one new
token for 64 of them with a full cache (as when text is sampled), the second moments of one MLP's channels, and all
statistics. Where the processor does not multiply bfloat16 both sides are the same.
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
from transformers import StaticCache

from multipruner.config.recipe import Recipe
from multipruner.console.quiet import quiet_libraries
from multipruner.engine import moments as statistics
from multipruner.engine import prunable as engine
from multipruner.engine.grouped_attention import grouped_attention
from multipruner.engine.prunable import Prunable
from multipruner.recipes import mapping_for
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

SAMPLED = 64


@contextmanager
def unchanged(_: Any) -> Iterator[None]:
    """In place of what makes a difference."""
    yield


@contextmanager
def stock() -> Iterator[None]:
    """Stock attention in the engine's blocks, and products in full float32."""
    with (
        mock.patch.object(engine, "grouped_attention", unchanged),
        mock.patch.object(statistics, "products_of", unchanged),
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


def passes(model: Any, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Name -> work, on token ids [sequences, length]."""
    prunable, (sequences, length) = Prunable.of(model), ids.shape
    inputs = prunable.inputs(ids)
    many = ids.repeat(SAMPLED // sequences + 1, 1)[:SAMPLED]
    cache: Any = StaticCache(config=model.config, max_cache_len=length)
    model(input_ids=many[:, :-1], past_key_values=cache, logits_to_keep=1)
    attention, mlp = (prunable.anatomy.at(0, kind) for kind in ("attention", "mlp"))
    rows = torch.randn(sequences * length, *prunable.dense[mlp]).to(prunable.head_weight.dtype)
    total = torch.zeros(rows.shape[1], rows.shape[1])

    def moments() -> None:
        with statistics.products_of(rows.dtype):
            statistics.add_moments(total, rows.float())

    def token() -> None:
        for layer in cache.layers:
            layer.cumulative_length = torch.tensor(length - 1)  # the same place again
        with engine.grouped_attention(model):
            model(input_ids=many[:, -1:], past_key_values=cache)

    return {
        "an attention block": lambda: prunable.block(inputs.hidden, inputs, attention, prunable.dense[attention]),
        f"one more token of {SAMPLED} sequences": token,
        "second moments of one MLP": moments,
        "all moments": lambda: statistics.gather(prunable, ids),
    }


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    flag(parser)
    typed = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(typed.threads)
    recipe = Recipe.build(mapping_for(typed.model))
    model, _ = load_dense(resolve(recipe, print), recipe)
    with grouped_attention(model):
        print(f"{model.dtype}, {model.device.type}, {typed.threads} threads, attention: ", end="")
        print(model.config._attn_implementation)
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (typed.sequences, typed.length), generator=torch.Generator().manual_seed(0))
    heading = f"{typed.sequences} x {typed.length} tokens"
    columns = ((heading, "{}"), ("stock, ms", "{:.1f}"), ("here, ms", "{:.1f}"), ("times faster", "{:.1f}"))
    rows: list[list[Cell]] = []
    for name, work in passes(model, ids.to(model.device)).items():
        with stock():
            before = best(typed.repeats, work)
        after = best(typed.repeats, work)
        rows.append([name, before, after, before / after])
    print(markdown(columns, rows))
    record(typed.record, "passes", columns, rows, setting={"model": typed.model, "dtype": str(model.dtype)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
