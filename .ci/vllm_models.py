"""Models in which whatever can be missing is missing, cut without any measurement: what is asked is whether they load.

    python .ci/vllm_models.py FOLDER

It writes FOLDER/dense, SmolLM2-135M-Instruct as it is, and FOLDER/pruned.
"""

from __future__ import annotations

import sys
from pathlib import Path

import multipruner
from multipruner.core.families import anatomy_of
from multipruner.core.structure import GONE, Anatomy, Size, Structure
from multipruner.recipes import read
from multipruner.sources.dense import load_dense
from multipruner.sources.resolve import resolve

ROUND = 10
"""After so many layers the same things are missing again."""


def main() -> None:
    folder = Path(sys.argv[1])
    recipe = multipruner.Recipe.build({**read("llama"), "ratio": 0.2, "dtype": "float32"})
    found = resolve(recipe, print)
    dense, tokenizer = load_dense(found, recipe)
    dense.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    anatomy = anatomy_of(dense.config)
    first = multipruner.Ranking.identity(anatomy)
    plan = multipruner.PruningPlan.from_structure(
        structure(anatomy), first, anatomy, model=found.name, model_type=dense.config.model_type
    )
    small = multipruner.apply_plan(dense, plan)
    multipruner.save(folder / "pruned", small, tokenizer, plan=plan, report={}, card="")
    for line in told(plan):
        print(line, flush=True)


def structure(anatomy: Anatomy) -> Structure:
    """Every tenth layer without attention, without MLP, without both, with fewer groups, with fewer query heads in
    each, with fewer of both, or narrower; the first one has no attention.
    """
    return Structure(tuple(size(place.layer, place.kind, place.dense) for place in anatomy))


def size(layer: int, kind: str, dense: Size) -> Size:
    first, *rest = dense
    if kind == "attention":
        cuts = {0: GONE, 3: GONE, 4: (first - 1, *rest), 5: (first, *(n - 1 for n in rest)),
                6: (first - 1, *(n - 1 for n in rest))}  # fmt: skip
    else:
        cuts = {2: GONE, 3: GONE, 7: (first * 2 // 3,), 8: (1000,)}
    return cuts.get(layer % ROUND, dense)


def told(plan: multipruner.PruningPlan) -> list[str]:
    """Say what is missing, by kind of block."""
    said = []
    for kind in ("attention", "mlp"):
        sizes = [size for place, size in zip(plan.anatomy, plan.structure, strict=True) if place.kind == kind]
        found = {size: sizes.count(size) for size in sorted(set(sizes), reverse=True)}
        named = (f"{n} x {' x '.join(map(str, size)) or 'gone'}" for size, n in found.items())
        said.append(f"{kind}: {', '.join(named)}")
    return [*said, f"layers: {len(plan.layers)} of {plan.anatomy.layers}"]


if __name__ == "__main__":
    main()
