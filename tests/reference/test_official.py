"""Our loop, fed with the official code's choices, ends every dimension where the official code did (no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from multipruner.core.costs import BlockCost, Costs
from multipruner.core.layout import Layout
from multipruner.core.objective import Choice
from multipruner.core.structure import Structure
from multipruner.search import DIMENSIONS, Dimension, Grid, Problem, sequential_path
from tests.support.layers import uniform
from tests.support.official import HEAD_DIM, REFERENCE, after

ANATOMY = uniform(30, 9, 3, 1536, head_dim=HEAD_DIM)
SMOLLM2 = ANATOMY.dense
# SmolLM2-135M: hidden 576, head_dim 64, vocabulary 49,152, tied embeddings
PER_HEAD, PER_CHANNEL = Layout(str(2 * 576 * HEAD_DIM)), Layout(str(3 * 576))
ATTENTION = BlockCost(
    "attention", {}, 576, ((Layout("kv_groups * queries"), PER_HEAD), (Layout("kv_groups"), PER_HEAD))
)
COSTS = Costs(
    ANATOMY,
    (ATTENTION, BlockCost("mlp", {}, 576, ((Layout("channels"), PER_CHANNEL),))) * 30,
    constant=49152 * 576 + 576,
    head_macs=49152 * 576,
    bytes_per_parameter=2,
)
GRID = Grid({"channels": 128, "kv_groups": 1})

pytestmark = pytest.mark.skipif(
    not REFERENCE.exists(), reason=f"the official code's decisions are not in {REFERENCE} (they are not redistributed)"
)


class Official:
    """Chooses what the official code chose, and counts the candidates it was shown."""

    def __init__(self, steps: list[dict[str, Any]]) -> None:
        self.steps, self.structure = iter(steps), SMOLLM2

    def __call__(self, structure: Structure) -> float:
        return 0.0

    def argmin(self, structures: Sequence[Structure], progress: Callable[[int, int], None] | None = None) -> Choice:
        step = next(self.steps)
        assert len(structures) == step["candidates"]
        self.structure = after(self.structure, step)
        assert self.structure in structures
        return Choice(self.structure, math.log(step["perplexity"]))

    def commit(self, structure: Structure) -> None:
        assert structure == self.structure


@pytest.mark.parametrize("name", ["multipruner_r20", "multipruner_r10", "blocks_only_r20"])
def test_dimensions_end_where_the_official_ones_do(name: str) -> None:
    reference = json.loads((REFERENCE / f"official_{name}.json").read_text())
    shares: dict[Dimension, float] = dict(zip(DIMENSIONS, reference["shares"], strict=True))
    official = Official(reference["steps"])
    problem = Problem(COSTS, reference["target_ratio"], DIMENSIONS, shares, GRID, "reach")
    steps = sequential_path(problem, dict.fromkeys(DIMENSIONS, official))
    assert [(s.stage, s.kind, s.layer) for s in steps] == [
        (s["stage"], s["kind"], s["layer"]) for s in reference["steps"]
    ]
    # the official count leaves the norms of removed blocks in
    norms = 576 * sum(not size for size in official.structure)
    assert COSTS.parameters(official.structure) == reference["final_parameters"] - norms
